"""The program as a whole, and each command but `quantize`, as a user would run it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command_line import COMMAND, environment, heeding_interrupts, process, run

import agq_gguf
from agq_gguf import demo
from agq_gguf.cli import app as cli
from agq_gguf.cli import output
from agq_gguf.errors import HostError
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.measure.row import Row
from agq_gguf.runtime.chat_format import Prompt
from agq_gguf.runtime.text import TextModel

# the program as a whole


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom agq_gguf.cli import app as cli\n"
        "for words in (['--help'], ['bench', '--help']):\n"
        "    sys.argv[1:] = words\n"
        "    try:\n        cli.main()\n    except SystemExit as e:\n        assert e.code == 0\n"
        "heavy = {'torch', 'llama_cpp', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("Usage: agq-gguf") == 2


def test_inspect_does_not_load_torch(small: Path) -> None:
    code = "import sys\nfrom agq_gguf.inspection.inspect import inspect_file\n"
    code += "inspect_file(sys.argv[1])\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code, str(small)], check=True, env=environment())


def test_help_at_80_columns() -> None:
    """No option name and no summary is cut, and no line is longer."""
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    commands = group.commands
    assert set(commands) >= {"quantize", "inspect", "evaluate", "bench", "generate", "chat", "backend-path", "demo"}
    narrow = {"COLUMNS": "80", "TERM": "dumb"}
    summaries = run("--help", env=narrow).stdout
    assert "..." not in summaries.split("Commands:")[1] and "…" not in summaries
    for name, command in commands.items():
        assert re.search(rf"^  {name} +\S", summaries, re.MULTILINE)
        shown = run(name, "--help", env=narrow).stdout
        assert max(map(len, shown.splitlines())) <= 80, name
        assert "Usage" in shown and "…" not in shown
        options = [name for parameter in command.params for name in parameter.opts + parameter.secondary_opts]
        for option in options:
            assert not option.startswith("-") or re.search(rf"(?<!\S){option}(?![\w-])", shown), (name, option)


def test_version() -> None:
    lines = dict(line.split(" ", 1) for line in run("--version").stdout.splitlines())
    assert set(lines) == {"agq-gguf", "llama-cpp-python", "gguf", "ggml"}
    assert lines["agq-gguf"] == agq_gguf.__version__
    assert re.match(r"\d+\.\d+\.\d+$", lines["ggml"])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nothing"], "No such command"),
        (["inspect"], "Missing argument"),
        (["bench", "x.gguf", "--flash-attn", "perhaps"], "perhaps"),
        (["bench", "x.gguf", "-r", "0"], "-r"),
        (["evaluate", "x.gguf", "--text", "t"], "--reference"),
        (["quantize", "a", "b", "--memory", "4Q"], "4Q"),
        (["quantize", "a", "b", "--target-bpw", "99"], "must be 4.25 to 16 bits per weight"),
        (["quantize", "a", "b", "-t", "513"], "512"),
        (["generate", "x.gguf", "-p", "x", "-t", "9999"], "512"),
        (["doctor", "-t", "9999"], "512"),
        (["quantize", "a", "b", "--no-such-option"], "No such option"),
    ],
)
def test_wrong_usage(arguments: list[str], wanted: str) -> None:
    assert wanted in run(*arguments, code=2).stderr


@pytest.fixture(scope="module")
def unusable(tmp_path_factory: pytest.TempPathFactory, small: Path) -> dict[str, Path]:
    """Things that are not models."""
    folder = tmp_path_factory.mktemp("unusable")
    (folder / "text.gguf").write_text("this is a text, not a model, and long enough to have a header")
    (folder / "truncated.gguf").write_bytes(small.read_bytes()[:200_000])
    (folder / "empty.gguf").write_bytes(b"")
    names = ("none.gguf", "text.gguf", "truncated.gguf", "empty.gguf")
    return {"folder": folder, **{name: folder / name for name in names}}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none.gguf", "No such file"),
        ("folder", "is a folder; give the name of a GGUF file"),
        ("text.gguf", "not a GGUF file"),
        ("truncated.gguf", "truncated"),
        ("empty.gguf", "too short"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "inspect", "evaluate", "bench", "generate", "chat"])
def test_unusable_files(
    command: str, what: str, message: str, unusable: dict[str, Path], words_file: Path, small: Path, tmp_path: Path
) -> None:
    path = unusable[what]
    commands: dict[str, list[object]] = {
        "quantize": [path, tmp_path / "out.gguf"],
        "evaluate": [path, "--reference", small, "--text", words_file],
        "generate": [path, "-p", "the"],
    }
    error = run(command, *commands.get(command, [path]), code=2).stderr
    if (command, what) == ("quantize", "folder"):  # it takes folders, but not this one
        message = "no Hugging Face checkpoint"
    assert message in error
    assert str(path) in error
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where() -> None:
    shown = process("--debug", "inspect", "none.gguf")
    assert shown.returncode == 1
    assert "Traceback" in shown.stderr
    assert "InputError: none.gguf" in shown.stderr


def test_a_missing_plugin_is_explained(llama_agq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise HostError("llama-cpp-python 0.2.0 was found; supported are 0.3.30 to 0.3.36")

    monkeypatch.setattr("agq_gguf.runtime.model_file.register_for_models", refuse)
    error = run("generate", llama_agq, "-p", "the", code=4).stderr
    assert "holds 14 AGQ4 tensors, which need the AGQ plugin" in error
    assert "supported are 0.3.30 to 0.3.36" in error


def test_a_process_whose_reader_is_gone(llama_agq: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", llama_agq, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.wait(60) == 141
        assert child.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inspect", "MODEL"], ["inspect", "MODEL", "--json"],
                  ["generate", "MODEL", "-p", "the", "-n", "2"]],
)  # fmt: skip
def test_output_that_is_full_or_closed(arguments: list[str], llama_agq: Path) -> None:
    words = " ".join([*COMMAND, *arguments]).replace("MODEL", str(llama_agq))

    def shell(redirection: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", f"{words} {redirection}"], capture_output=True, text=True, timeout=120, check=False,
            env=environment(),
        )  # fmt: skip

    full = shell(">/dev/full")
    assert full.returncode == 5, full
    assert full.stderr == "error: the output cannot be written: No space left on device\n"
    for redirection in (">&-", "<&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"):
        shown = shell(redirection)
        assert (shown.returncode, shown.stderr) == (0, ""), (redirection, shown)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_work_does_not_need_a_log(redirection: str, llama_f16: Path, llama_agq: Path, tmp_path: Path) -> None:
    """And llama.cpp's log is not written into the files."""
    made = tmp_path / "made.gguf"
    words = " ".join([*COMMAND, "quantize", str(llama_f16), str(made), "--calibration", "none"])
    shown = subprocess.run(["sh", "-c", f"{words} {redirection}"], timeout=120, check=False, env=environment())
    assert shown.returncode == 0
    run("verify", made)


def test_interrupted(small: Path) -> None:
    arguments = ["bench", small, "-p", "8", "-n", "8", "-r", "1000000", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=heeding_interrupts,
    ) as child:  # fmt: skip
        assert child.stderr is not None
        assert re.fullmatch(r"bench: 0%(, [\d.]+ MiB)? \(loading small\.gguf\)\n", child.stderr.readline())
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert child.stderr.read().splitlines()[-1] == "error: interrupted"


# inspect


def test_inspect(llama_agq: Path) -> None:
    shown = run("inspect", llama_agq).stdout
    assert "tiny random llama, architecture llama" in shown
    assert re.search(r"agq4 +14 +153\.0 KiB +4\.25", shown)
    assert re.search(
        r"blk\.0\.ffn_up\.weight +agq4 +256 x 128 +17\.0 KiB +0\.\d{3}% +8-bit activations, scale: rotated", shown
    )
    assert re.search(r"agq\.activation_bits +8", shown)
    found = json.loads(run("inspect", llama_agq, "--json").stdout)
    keys = {"path", "architecture", "name", "parameters", "file_bytes", "tensor_bytes", "bits_per_weight", "types"}
    assert set(found) == keys | {"metadata", "hyperparameters", "tensors", "pruning"}
    assert found["types"]["agq4"]["tensors"] == 14
    assert set(found["tensors"][0]) == {"name", "type", "shape", "bytes", "agq", "problem", "error"}
    errors = {tensor["name"]: tensor["error"] for tensor in found["tensors"]}
    assert 0 < errors["blk.0.ffn_up.weight"] < 0.01 and errors["output_norm.weight"] is None


def test_inspect_damaged(llama_agq: Path, tmp_path: Path) -> None:
    with open_gguf(llama_agq) as reader:
        at = reader.tensors["blk.0.attn_q.weight"].offset
    data = bytearray(llama_agq.read_bytes())
    data[at + 48] ^= 0xFF
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    shown = run("inspect", path, code=3)
    assert "DAMAGED" in shown.stdout
    assert "1 damaged AGQ4 tensors; first: blk.0.attn_q.weight" in shown.stderr
    assert json.loads(run("inspect", path, "--json", code=3).stdout)["parameters"] > 0
    for command in (["generate", path, "-p", "the", "-n", 2], ["bench", path, "-p", 4, "-n", 1, "-r", 1]):
        died = process(*command, "-t", 1)
        assert died.returncode in (2, 4), died.stderr
        assert died.stderr.splitlines()[-1].startswith("error: ")


# evaluate, bench


def test_evaluate(llama_f16: Path, llama_q8: Path, words_file: Path) -> None:
    arguments = [llama_q8, "--reference", llama_f16, "--text", words_file, "-c", 64, "--chunks", 2, "-t", 1]
    shown = run("evaluate", *arguments)
    assert "62 positions scored, in 2 chunks of 64 tokens" in shown.stdout
    assert "evaluate: 100%" in shown.stderr
    found = json.loads(run("evaluate", *arguments, "--json").stdout)
    assert set(found) == {
        "model", "reference", "text", "context", "chunks", "positions", "perplexity", "reference_perplexity",
        "mean_kl", "mean_kl_error", "median_kl", "kl_999", "max_kl", "top1_agreement", "kl_percentiles",
    }  # fmt: skip
    assert f"{found['mean_kl']:.6f}" in shown.stdout
    assert 0 < found["median_kl"] <= found["kl_999"] <= found["max_kl"]


def test_evaluate_refuses(llama_f16: Path, words_file: Path, gpt2_f16: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "empty" in run("evaluate", llama_f16, "--reference", llama_f16, "--text", empty, code=2).stderr
    error = run("evaluate", gpt2_f16, "--reference", llama_f16, "--text", words_file, code=2).stderr
    assert "different tokenizers" in error


def test_bench(llama_q4: Path, llama_q8: Path) -> None:
    arguments = [llama_q4, llama_q8, "-p", 16, "-n", 4, "-r", 3, "-t", 1, "--flash-attn", "off"]
    shown = run("bench", *arguments)
    assert re.search(r"llama-f16-q4_0\.gguf +281\.6 KiB +[\d.]+ ± \d+% +1\.00 ", shown.stdout)
    assert "1 threads, flash attention off" in shown.stdout
    found = json.loads(run("bench", *arguments, "--json").stdout)
    assert (found["threads"], found["flash_attention"], found["repetitions"]) == (1, "off", 3)
    assert [Path(model["model"]).name for model in found["models"]] == ["llama-f16-q4_0.gguf", "llama-f16-q8_0.gguf"]
    for model in found["models"]:
        assert set(model["prompt"]) == {"tokens", "samples", "median", "quartiles", "ratio"}
        assert model["prompt"]["median"] == sorted(model["prompt"]["samples"])[1]
        assert set(model["start"]) == {"first_token_seconds", "resident_bytes", "baseline_bytes"}


def test_bench_profile(llama_agq: Path) -> None:
    shown = run("bench", llama_agq, "-p", 16, "-n", 0, "-r", 1, "-t", 1, "--profile").stdout
    table = shown[shown.index("llama-agq4.gguf, prompt") :]
    assert re.search(r"MUL_MAT ffn_down +2 +[\d.]+ +[\d.]+%\n", table)
    assert re.search(r"\nall +\d+ +[\d.]+ +100\.0%", table)
    assert "generation" not in table.split("tokens/s")[0]


# generate, chat


@pytest.mark.parametrize("kind", ["llama_f16", "llama_agq"])
def test_generate(kind: str, request: pytest.FixtureRequest) -> None:
    import llama_cpp

    path = request.getfixturevalue(kind)
    shown = run("generate", path, "-p", "the red key", "-n", 6, "--temp", 0, "-t", 1)
    llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False)
    answer = llama("the red key", max_tokens=6, temperature=0)
    assert isinstance(answer, dict)
    wanted = answer["choices"][0]["text"]
    llama.close()
    assert shown.stdout == output.safe(wanted) + "\n"
    assert shown.stderr == ""


def test_generate_same_seed_same_text(llama_f16: Path) -> None:
    texts = [run("generate", llama_f16, "-p", "the", "-n", 8, "-s", seed, "-t", 1).stdout for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_refuses(llama_f16: Path, gpt2_f16: Path, bert_f16: Path, words: str) -> None:
    assert "predicts no next token" in run("generate", bert_f16, "-p", "the", code=2).stderr
    assert "expected 1 to" in run("generate", llama_f16, "-p", words, "-t", 1, code=2).stderr
    refused = run("generate", gpt2_f16, "-p", "", code=2).stderr  # this model has no token that begins a text
    assert refused == f"error: {gpt2_f16}: the prompt is empty; give a text that the model can continue\n"


def test_chat_from_a_pipe(llama_agq: Path) -> None:
    shown = process(
        "chat", llama_agq, "-n", 4, "-t", 1, "--temp", 0, "--system", "be brief", input="hello\n\nthe cat\n"
    )
    assert shown.returncode == 0 and "has no chat template" in shown.stderr
    assert ">" not in shown.stdout.split("\n")[0][:2]
    assert len(shown.stdout) > 4


def test_chat_keeps_the_conversation(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answer(text: TextModel, prompt: Prompt, **options: object) -> Iterator[str]:
        seen.append(prompt.text)
        yield from ("an", "swer")

    monkeypatch.setattr(TextModel, "continued", answer)
    shown = run("chat", llama_f16, "-t", 1, "--chat-format", "chatml", input="one\ntwo")
    assert shown.stdout == "answer\nanswer\n"
    first = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert seen == [first, f"{first}answer<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"]


# the rest


def test_backend_path() -> None:
    path = run("backend-path").stdout
    assert path.endswith("\n")
    assert Path(path[:-1]).is_file()
    assert Path(path[:-1]) == agq_gguf.backend_path()


@pytest.fixture
def shown_demo(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the work of the demo; test_demo.py tests that."""
    folders: list[Path] = []

    def work(folder: Path, *, threads: int, progress: object) -> demo.Demonstration:
        assert folder.is_dir()
        folders.append(folder)
        row = Row("AGQ4", "path", 2_000_000, 4.7, 0.012, 0.001, 5.5, 0.9, 1234.5, 99.4)
        return demo.Demonstration("Once", "Once upon", [row])

    monkeypatch.setattr(demo, "run", work)
    return folders


def test_demo(shown_demo: list[Path], tmp_path: Path) -> None:
    shown = run("demo").stdout
    assert "Once upon" in shown
    assert re.search(r"AGQ4 +1\.9 MiB +4\.70 +0\.01200 +5\.500 +12\d\d +99", shown)
    assert not shown_demo[0].exists()
    assert json.loads(run("demo", "--json", "--keep", tmp_path / "a" / "b").stdout)["rows"][0]["name"] == "AGQ4"
    assert shown_demo[1] == tmp_path / "a" / "b"
    assert shown_demo[1].is_dir()
    (tmp_path / "file").write_text("")
    assert "cannot create this folder" in run("demo", "--keep", tmp_path / "file", code=5).stderr
    if sys.platform == "linux":
        assert "cannot write there" in run("demo", "--keep", "/proc", code=5).stderr
