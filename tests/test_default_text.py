"""The calibration text in the package: what is in it, and when `quantize` uses it."""

from __future__ import annotations

import itertools
import re
from bisect import bisect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from command_line import run

import agq_gguf
from agq_gguf.calibration.default_text import FOLDER, default_calibration
from agq_gguf.calibration.session import Session
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.quantization.options import QuantizeOptions
from agq_gguf.runtime.dialogues import tokens_of
from agq_gguf.runtime.model import Model
from agq_gguf.text import Dialogue, LoadedText, fair_shares, interleaved, mix_texts

ROOT = Path(__file__).parents[1]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
BROKEN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content "
FEW = ("-t", 1, "-q", "--quality", "fast", "--calibration-tokens", 1024)


def with_metadata(source: Path, target: Path, **values: str) -> Path:
    """A copy of a model with other values of tokenizer.* metadata."""
    with open_gguf(source) as reader:
        placed = layout((t.name, t.type_name, t.shape) for t in reader.tensors.values())
        added = {f"tokenizer.{key.replace('__', '.')}": value for key, value in values.items()}
        with Writer(target, reader.metadata, added, placed) as writer:
            for name in reader.tensors:
                writer.write(name, [reader.raw(name)])
    return target


def origin(path: Path) -> str:
    with open_gguf(path) as reader:
        return str(reader.get("agq.calibration"))


def quantized(source: Path, folder: Path, *arguments: object) -> tuple[str, Any]:
    """What the file says of its calibration, and the command's result."""
    shown = run("quantize", source, folder / "out.gguf", *FEW, *arguments)
    return origin(folder / "out.gguf"), shown


# the text


def test_every_file_has_an_origin() -> None:
    page = (FOLDER / "ORIGINS.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", page, re.MULTILINE)
    files = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert set(named) == files - {"ORIGINS.md"} and len(named) == len(files) - 1


def long_lines(path: Path) -> set[str]:
    """The lines of a text file that hardly two people write by chance."""
    return {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) > 40}


def test_no_file_is_a_copy_of_another_file_of_the_project() -> None:
    written = {".py", ".cpp", ".h", ".c", ".md", ".txt", ".toml", ".json", ".cmake"}
    folders = ("agq_gguf", "benchmarks", "cpp", "cmake", "docs", "examples", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in written]
    paths += [path for path in ROOT.glob("*") if path.suffix in written]
    # The package under test may be an installed one: its own texts lie in the repository as well.
    own_folder = ROOT / "agq_gguf" / "data" / FOLDER.name
    assert own_folder.is_dir()
    others = {path: long_lines(path) for path in paths if own_folder not in path.parents}
    assert len(others) > 300
    for path in FOLDER.rglob("*.*"):
        own = long_lines(path)
        for other, lines in others.items():
            assert len(own & lines) < 0.1 * len(own) or len(own & lines) < 3, f"{path} repeats {other}"


def test_all_files_are_in_the_text_once() -> None:
    text = default_calibration()
    assert 250_000 < len(text.whole.encode()) < 350_000
    whole = re.sub(r"\s+", "", text.whole)
    for path in FOLDER.rglob("*.txt"):
        for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
            assert re.sub(r"\s+", "", paragraph) in whole, path
    dialogues = [piece for piece in text.parts[0] if isinstance(piece, Dialogue)]
    assert len(dialogues) == len(set(dialogues)) > 40
    assert {role for dialogue in dialogues for role, _ in dialogue.turns} == {"system", "user", "assistant"}


@pytest.fixture(scope="module")
def kinds() -> list[tuple[str, int]]:
    """Kind and bytes of each piece of the default text."""
    text = default_calibration()
    contents = {
        kind.name: re.sub(r"\s+", "", "".join(file.read_text("utf-8") for file in sorted(kind.iterdir())))
        for kind in FOLDER.iterdir()
        if kind.is_dir() and kind.name != "dialogues"
    }

    def kind_of(piece: str | Dialogue) -> str:
        if isinstance(piece, Dialogue):
            return "dialogues"
        wanted = re.sub(r"\s+", "", piece)
        return next(kind for kind, content in contents.items() if wanted in content)

    return [(kind_of(piece), len(plain.encode())) for piece, plain in zip(text.parts[0], text, strict=True)]


def test_every_large_part_of_the_text_is_as_varied_as_the_whole(kinds: list[tuple[str, int]]) -> None:
    """Calibration takes chunks all over the text, so no kind may be gathered in one place."""
    total = sum(size for _, size in kinds)
    whole = {kind: sum(size for k, size in kinds if k == kind) / total for kind, _ in kinds}
    assert len(whole) == 7 and min(whole.values()) > 0.03
    seen, before = dict.fromkeys(whole, 0), 0
    for kind, size in kinds:
        seen[kind] += size
        before += size
        if before > 80_000:
            for k, share in whole.items():
                assert abs(seen[k] / before - share) < 0.07, (k, before)


def test_most_chunks_hold_one_kind(kinds: list[tuple[str, int]]) -> None:
    ends = list(itertools.accumulate(size for _, size in kinds))
    chunk = 1536  # bytes, about 512 tokens
    begins = range(0, ends[-1] - chunk, chunk)
    held = [{kinds[i][0] for i in range(bisect(ends, at), bisect(ends, at + chunk - 1) + 1)} for at in begins]
    assert sum(len(found) == 1 for found in held) > 0.7 * len(held)


def test_interleaving_and_shares() -> None:
    assert interleaved([list("abcd"), list("xy")]) == list("axbcyd")
    assert interleaved([["big", "small"], ["x"]], [[90, 10], [1]]) == ["big", "x", "small"]
    assert interleaved([[], ["x"]]) == ["x"]
    assert fair_shares([100, 100], 10) == [5, 5]
    assert fair_shares([2, 100, 100], 12) == [2, 5, 5]
    assert fair_shares([3, 4], 100) == [3, 4] and fair_shares([0, 9], 4) == [0, 4]


# the command


def test_it_is_the_default(small: Path, tmp_path: Path) -> None:
    said, shown = quantized(small, tmp_path)
    assert re.fullmatch(r"the default text, (9|10)\d\d tokens", said)
    assert f"calibration: {said}" in shown.stdout and "without calibration" not in shown.stderr
    by_default = (tmp_path / "out.gguf").read_bytes()
    said, _ = quantized(small, tmp_path, "--calibration", "default")
    assert (tmp_path / "out.gguf").read_bytes() == by_default


def test_none_leaves_it_out(small: Path, words_file: Path, tmp_path: Path) -> None:
    said, shown = quantized(small, tmp_path, "--calibration", "none")
    assert said == "none" and "calibration: none" in shown.stdout
    assert "quantized without calibration" in shown.stderr
    out = tmp_path / "new.gguf"
    shown = run("quantize", small, out, "--calibration", "none", "--calibration", words_file, code=2)
    assert "cannot be combined" in shown.stderr
    assert (
        "leave out --calibration none"
        in run("quantize", small, out, "--calibration", "none", "--prune", 0.3, code=2).stderr
    )
    assert not out.exists()


def test_several_texts_share_the_tokens(small: Path, words: str, words_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the cat sat on the mat. " * 4000, encoding="utf-8")
    said, _ = quantized(small, tmp_path, "--calibration", words_file, "--calibration", other)
    assert said.startswith(f"{words_file.name} + other.txt, ")
    short = ["a few words " * 30]
    with Session(small, mix_texts(words_file, other, short)) as session:
        chunks = [tuple(chunk[1:]) for chunk in session.chunks(64, 64 * 13)]
        counts = []
        for source in ([words], [other.read_text(encoding="utf-8")], short):
            tokens = tokens_of(session.model, source)[0]
            own = {tuple(tokens[i : i + 63]) for i in range(0, len(tokens), 63)}
            counts.append(sum(chunk in own for chunk in chunks))
    assert len(chunks) == 13 and 0 < counts[2] < 5 and abs(counts[0] - counts[1]) <= 1 and sum(counts) == 13
    assert mix_texts(words_file).name == words_file.name


def test_python_has_no_default(small: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(quality="fast", calibration_tokens=512, matrix=MatrixOptions(learn_codebook=False))
    assert agq_gguf.quantize(small, tmp_path / "a.gguf", options=options).guidance == "none"
    report = agq_gguf.quantize(small, tmp_path / "b.gguf", calibration=agq_gguf.default_calibration(), options=options)
    assert report.guidance.startswith("the default text, ")


def test_an_encoder_uses_it(bert_f16: Path, tmp_path: Path) -> None:
    assert quantized(bert_f16, tmp_path)[0].startswith("the default text, ")


def test_a_model_that_reads_no_text_is_quantized_without(small: Path, tmp_path: Path) -> None:
    source = with_metadata(small, tmp_path / "in.gguf", ggml__model="none")
    said, shown = quantized(source, tmp_path)
    assert said == "none" and "warning: the default text was not used: " in shown.stderr
    assert "has no tokenizer" in shown.stderr
    run("quantize", source, tmp_path / "new.gguf", "--calibration", "default", code=2)


# chat templates


DIALOGUE = Dialogue((("system", "be brief"), ("user", "the cat"), ("assistant", "the dog")))


def test_dialogues_are_rendered_with_the_template(small: Path, tmp_path: Path) -> None:
    model_file = with_metadata(small, tmp_path / "chat.gguf", chat_template=TEMPLATE)
    with Model(model_file) as model:
        tokens, warnings = tokens_of(model, ["before ", DIALOGUE])
        text = model.detokenize(tokens)
        assert warnings == [] and "<|system|>be brief" in text and "<|assistant|>the dog" in text
        assert "Assistant:" not in text
        assert np.count_nonzero(tokens == model.eos) == 3  # special tokens, not their letters
    assert quantized(model_file, tmp_path)[0].startswith("the default text, ")
    rendered = (tmp_path / "out.gguf").read_bytes()
    quantized(small, tmp_path)
    assert len((tmp_path / "out.gguf").read_bytes()) < len(rendered)


def test_a_template_without_a_system_role(small: Path, tmp_path: Path) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    with Model(with_metadata(small, tmp_path / "chat.gguf", chat_template=refuses)) as model:
        tokens, warnings = tokens_of(model, [DIALOGUE])
        assert warnings == [] and "<|user|>be brief\n\nthe cat" in model.detokenize(tokens)


@pytest.mark.parametrize(
    "template", [BROKEN, "{{ raise_exception('never') }}", "{{ messages[99].content.upper() }}", " "]
)
def test_a_broken_template_is_a_warning(template: str, small: Path, tmp_path: Path) -> None:
    broken = with_metadata(small, tmp_path / "broken.gguf", chat_template=template)
    with Model(broken) as model, Model(small) as plain:
        tokens, warnings = tokens_of(model, ["before ", DIALOGUE])
        wanted, none = tokens_of(plain, ["before ", DIALOGUE])
        assert np.array_equal(tokens, wanted) and none == []
        assert len(warnings) == 1 and warnings[0].startswith("the model's chat template cannot be used (")
    said, shown = quantized(broken, tmp_path)
    assert said.startswith("the default text, ")
    assert shown.stderr.count("chat template cannot be used") == 1


def test_the_date_in_a_template_is_always_the_same(small: Path, tmp_path: Path) -> None:
    dated = "{{ strftime_now('%Y %B') }}" + TEMPLATE
    with Model(with_metadata(small, tmp_path / "chat.gguf", chat_template=dated)) as model:
        text = model.detokenize(tokens_of(model, [DIALOGUE])[0])
    assert "2026 January" in text


def test_pruning_uses_it(tmp_path: Path) -> None:
    source = tiny_models.write_llama(tmp_path / "in.gguf", n_layer=2, n_ff=128, context=256)
    shown = run("quantize", source, tmp_path / "out.gguf", *FEW, "--prune", 0.2)
    assert re.search(r"measured on the default text, \d+ prompts of \d+ tokens", shown.stdout)


def test_pruning_takes_several_texts(words_file: Path, tmp_path: Path) -> None:
    source = tiny_models.write_llama(tmp_path / "in.gguf", n_layer=2, n_ff=128, context=256)
    text = mix_texts(words_file, LoadedText("dialogue", ((DIALOGUE,) * 40,)))
    options = QuantizeOptions(quality="fast", calibration_tokens=512, matrix=MatrixOptions(learn_codebook=False))
    agq_gguf.quantize(source, tmp_path / "out.gguf", calibration=text, options=options)
    choice = agq_gguf.PruneOptions(share=0.2, prompts=4, threads=1)
    report = agq_gguf.calibrate_pruning(tmp_path / "out.gguf", tmp_path / "out.gguf", calibration=text, choice=choice)
    assert report is not None and report.origin.startswith(f"{words_file.name} + dialogue, ")
