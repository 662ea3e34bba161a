from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import typer
from typer.testing import CliRunner

import agq_gguf
from agq_gguf import cli, cli_output, convert, demo, host
from agq_gguf.errors import HostError
from agq_gguf.quantizer import MatrixOptions
from agq_gguf.reader import open_gguf

COMMAND = [sys.executable, "-m", "agq_gguf.cli"]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
runner = CliRunner()


def run(*arguments: object, code: int = 0, **options):
    """Runs a command in this process; its exit code must be `code`, an error must be one line."""
    result = runner.invoke(cli.app, [str(a) for a in arguments], **options)
    assert result.exit_code == code, f"{result.exception!r}\n{result.output}"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    # 2 without such a line is typer's own refusal of an option, with its usage.
    assert len(errors) == (code != 0) or (code == 2 and "Usage" in result.stderr)
    assert "Traceback" not in result.output
    return result


def environment(**variables: str) -> dict[str, str]:
    """The variables of a process that finds this package."""
    root = str(Path(agq_gguf.__file__).parent.parent)
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": search, **variables}


def heeding_interrupts() -> None:
    """For a child process: shells have background jobs ignore SIGINT, and their children after them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env=environment(), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that quantizes in a moment."""
    path = tmp_path_factory.mktemp("small") / "small.gguf"
    return tiny_models.write_llama(path, n_layer=1, n_ff=128)


@pytest.fixture
def quick_options(monkeypatch: pytest.MonkeyPatch) -> None:
    options = partial(convert.QuantizeOptions, calibration_tokens=512, matrix=MatrixOptions(learn_codebook=False))
    monkeypatch.setattr(convert, "QuantizeOptions", options)


# the program as a whole


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom agq_gguf import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "heavy = {'torch', 'llama_cpp', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["bench", "--help"]):
        shown = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=environment()
        )
        assert shown.returncode == 0, shown.stderr
        assert "Usage: agq-gguf" in shown.stdout


def test_every_command_has_help() -> None:
    names = {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands}
    assert names >= {"quantize", "inspect", "evaluate", "bench", "generate", "chat", "backend-path", "demo"}
    for name in names:
        assert "Usage" in run(name, "--help").stdout


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
        ("folder", "Is a directory"),
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
    arguments = {
        "quantize": [path, tmp_path / "out.gguf"],
        "evaluate": [path, "--reference", small, "--text", words_file],
        "generate": [path, "-p", "the"],
    }.get(command, [path])
    error = run(command, *arguments, code=2).stderr
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

    monkeypatch.setattr(host, "register", refuse)
    error = run("generate", llama_agq, "-p", "the", code=4).stderr
    assert "holds 14 AGQ4 tensors, which need our plugin" in error
    assert "supported are 0.3.30 to 0.3.36" in error


def test_a_process_whose_reader_is_gone(llama_agq: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, "inspect", llama_agq, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.wait(60) == 141
        assert child.stderr.read() == b""


def test_interrupted(small: Path) -> None:
    arguments = ["bench", small, "-p", "8", "-n", "8", "-r", "1000000", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=heeding_interrupts,
    ) as child:  # fmt: skip
        assert child.stderr is not None
        assert re.fullmatch(r"bench: 0%(, [\d.]+ MiB)? \(start of small\.gguf\)\n", child.stderr.readline())
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
        assert child.stderr.read().splitlines()[-1] == "error: interrupted"


# quantize


@pytest.mark.usefixtures("quick_options")
def test_quantize(small: Path, words_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    shown = run("quantize", small, target, "--calibration", words_file, "-t", 1, "--memory", "1G")
    assert re.search(r"agq4 +7 +[\d.]+ KiB +4\.25", shown.stdout)
    kept = re.findall(r"f32 +(\d) +one-dimensional(?:; adjusted with the matrices behind it)? ", shown.stdout)
    assert sum(map(int, kept)) == 3
    assert re.search(r"q8_0 +1 +output type is q8_0 +output\.weight", shown.stdout)
    assert "calibrate: 100%" in shown.stderr
    assert "quantize: 100%" in shown.stderr
    assert not CONTROL.search(shown.output)
    with open_gguf(target) as reader:
        assert reader.tensors["blk.0.ffn_up.weight"].type_name == "agq4"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.usefixtures("quick_options")
def test_quantize_without_calibration_warns_and_replaces(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("an older file")
    shown = run("quantize", small, target, "-t", 1, "--quiet", "--output-type", "agq4")
    assert shown.stderr.startswith("warning: quantized without calibration")
    assert "output type is" not in shown.stdout
    with open_gguf(target) as reader:
        assert reader.tensors["output.weight"].type_name == "agq4"


def test_dry_run_writes_nothing(small: Path, tmp_path: Path) -> None:
    shown = run("quantize", small, tmp_path / "out.gguf", "--dry-run", "--output-type", "f16")
    assert re.search(r"blk\.0\.ffn_up\.weight +128 x 128 +f16 +agq4 +8\.5 KiB", shown.stdout)
    assert re.search(r"output\.weight +512 x 128 +f16 +f16 +128\.0 KiB +output type is f16", shown.stdout)
    assert "nothing was written" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("same file", 2, "is the model that is read"),
        ("no folder", 5, "cannot write there"),
        ("output type", 2, "unknown output type 'q3_k'"),
        ("empty text", 2, "calibration text"),
        ("missing text", 2, "none.txt"),
        ("missing imatrix", 2, "none.gguf"),
        ("quantized source", 2, "already quantized"),
    ],
)
def test_quantize_refuses(
    case: str, code: int, message: str, small: Path, llama_q8: Path, words_file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("an older file")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    arguments: list[object] = {
        "same file": [small, small],
        "no folder": [small, tmp_path / "nowhere" / "out.gguf"],
        "output type": [small, target, "--output-type", "q3_k"],
        "empty text": [small, target, "--calibration", empty],
        "missing text": [small, target, "--calibration", tmp_path / "none.txt"],
        "missing imatrix": [small, target, "--imatrix", tmp_path / "none.gguf"],
        "quantized source": [llama_q8, target],
    }[case]
    assert message in run("quantize", *arguments, "-t", 1, code=code).stderr
    assert target.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "out.gguf"]


def test_quantize_without_torch(small: Path, tmp_path: Path) -> None:
    code = "import sys\nsys.modules['torch'] = None\nfrom agq_gguf import cli\ncli.main()\n"
    arguments = ["quantize", small, tmp_path / "out.gguf"]
    shown = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (shown.returncode, shown.stdout) == (4, "")
    assert shown.stderr == "error: quantizing needs torch: pip install 'agq-gguf[convert]'\n"


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("4G", 4 << 30), ("512m", 512 << 20), ("1.5GiB", 3 << 29), ("64KB", 65536), ("1000", 1000), ("2T", 2 << 40)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert cli.parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "4 Q", "1e9", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        cli.parse_size(text)


# inspect


def test_inspect(llama_agq: Path) -> None:
    shown = run("inspect", llama_agq).stdout
    assert "tiny random llama, architecture llama" in shown
    assert re.search(r"agq4 +14 +153\.0 KiB +4\.25", shown)
    assert re.search(
        r"blk\.0\.ffn_up\.weight +agq4 +256 x 128 +17\.0 KiB +0\.\d{3}% +8-bit activations per token, exp", shown
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


def test_names_cannot_reach_the_terminal(tmp_path: Path, small: Path) -> None:
    path = tmp_path / "escape.gguf"
    path.write_bytes(small.read_bytes().replace(b"tiny random llama", b"tiny\x1b[31m \xff\x07[b]llama"[:17]))
    shown = run("inspect", path)
    assert not CONTROL.search(shown.output)
    assert "tiny\ufffd[31m" in shown.stdout


# evaluate, bench


def test_evaluate(llama_f16: Path, llama_q8: Path, words_file: Path) -> None:
    arguments = [llama_q8, "--reference", llama_f16, "--text", words_file, "-c", 64, "--chunks", 2, "-t", 1]
    shown = run("evaluate", *arguments)
    assert "62 positions scored, in 2 chunks of 64 tokens" in shown.stdout
    assert "evaluate: 100%" in shown.stderr
    found = json.loads(run("evaluate", *arguments, "--json").stdout)
    assert set(found) == {
        "model", "reference", "text", "context", "chunks", "positions", "perplexity", "reference_perplexity",
        "mean_kl", "mean_kl_error", "median_kl", "kl_999", "max_kl", "top1_agreement",
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
    wanted = llama("the red key", max_tokens=6, temperature=0)["choices"][0]["text"]
    llama.close()
    assert shown.stdout == cli_output.safe(wanted) + "\n"
    assert shown.stderr == ""


def test_generate_same_seed_same_text(llama_f16: Path) -> None:
    texts = [run("generate", llama_f16, "-p", "the", "-n", 8, "-s", seed, "-t", 1).stdout for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_refuses(llama_f16: Path, bert_f16: Path, words: str) -> None:
    assert "encoder" in run("generate", bert_f16, "-p", "the", code=2).stderr
    assert "exceed context window" in run("generate", llama_f16, "-p", words, "-t", 1, code=2).stderr


def test_chat_from_a_pipe(llama_agq: Path) -> None:
    shown = process(
        "chat", llama_agq, "-n", 4, "-t", 1, "--temp", 0, "--system", "be brief", input="hello\n\nthe cat\n"
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ">" not in shown.stdout.split("\n")[0][:2]
    assert len(shown.stdout) > 4


def test_chat_keeps_the_conversation(llama_f16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def answer(llama: object, messages: list[dict[str, str]], **options: object):
        seen.append([f"{m['role']}: {m['content']}" for m in messages])
        yield from ("an", "swer")

    monkeypatch.setattr(host, "chat_answer", answer)
    assert run("chat", llama_f16, "-t", 1, input="one\ntwo").stdout == "answer\nanswer\n"
    assert seen == [["user: one"], ["user: one", "assistant: answer", "user: two"]]


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

    def work(folder: Path, *, threads: int, progress) -> demo.Demonstration:
        assert folder.is_dir()
        folders.append(folder)
        row = demo.Row("AGQ4", "path", 2_000_000, 4.7, 0.012, 5.5, 1234.5, 99.4)
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
    assert "cannot be used as a folder" in run("demo", "--keep", tmp_path / "file", code=2).stderr


# cli_output.py


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with cli_output.ProgressView() as view:
        for done in range(101):
            view.update("work", done, 100, "" if done == 100 else f"item {done}")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"work: 0%(, [\d.]+ [KMG]?i?B)? \(item 0\)", lines[0])
    assert [line.split("%")[0] for line in lines] == [f"work: {n}" for n in range(0, 101, 10)]
    assert re.fullmatch(r"work: 100% in 0 s(, [\d.]+ [KMG]?i?B)?", lines[-1])


def test_progress_tells_phase_layer_speed_time_and_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(cli_output.time, "monotonic", lambda: now)
    monkeypatch.setattr(cli_output, "resident", lambda: 3 << 29)
    with cli_output.ProgressView() as view:
        view.update("calibrate", 0, 4000, "")
        now = 110.0
        view.update("calibrate", 1000, 4000, "pass 1 of 1")
        view.update("quantize", 0, 10**9, "blk.0.attn_q.weight")
        now = 130.0
        view.update("quantize", 5 * 10**8, 10**9, "blk.3.ffn_up.weight")
    assert capsys.readouterr().err.splitlines() == [
        "calibrate: 0%, 1.50 GiB",
        "calibrate: 25%, 100 tokens/s, 30 s left, 1.50 GiB (pass 1 of 1)",
        "quantize: 0%, 1.50 GiB (layer 0, attn_q.weight)",
        "quantize: 50%, 25M weights/s, 20 s left, 1.50 GiB (layer 3, ffn_up.weight)",
    ]


def test_quantize_as_json(small: Path, tmp_path: Path) -> None:
    shown = run("quantize", small, tmp_path / "out.gguf", "-t", 1, "--json")
    found = json.loads(shown.stdout)
    assert found["paths"] == [str(tmp_path / "out.gguf")] and found["n_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert {tensor["type_name"] for tensor in found["tensors"]} >= {"agq4", "f32"}
    assert shown.stderr == ""


def test_sizes_for_people() -> None:
    shown = [cli_output.size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 << 30, 5 << 40)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.00 GiB", "5120.00 GiB"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_bars_on_a_terminal(small: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    arguments = ["bench", small, "-p", "8", "-n", "2", "-r", "2", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=follower, stderr=follower, env=environment(TERM="xterm", COLUMNS="80")
    ) as child:
        os.close(follower)
        seen = b""
        try:
            while part := os.read(leader, 4096):
                seen += part
        except OSError:
            pass  # Linux says so when the other side is closed
        assert child.wait(60) == 0
    os.close(leader)
    assert b"\x1b[?25l" in seen and b"\x1b[?25h" in seen  # the cursor is hidden, and comes back
    assert b"100%" in seen
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode()))
    assert max(map(len, lines)) <= 80, lines
