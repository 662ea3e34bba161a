"""The page of `report` and the pictures of `bench` and `evaluate`."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_chromium
from command_line import process, run

from agq_gguf.errors import InputError, OutputError
from agq_gguf.gguf_io.metadata import error_table
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.gguf_io.writer import Writer, layout
from agq_gguf.inspection import plots, report
from agq_gguf.inspection.report_page import render
from agq_gguf.matrix.options import MatrixOptions
from agq_gguf.measure.bench import Result, Speed
from agq_gguf.measure.evaluate import Evaluation
from agq_gguf.quantization import pipeline
from agq_gguf.quantization.options import QuantizeOptions

RESULTS = [
    Result(
        f"{name}.gguf", 10, 9, 8, Speed(64, [90.0, 100.0, 110.0], 100 / slow, (95 / slow, 105 / slow), 1 / slow),
        Speed(16, [50.0], 50.0, (50.0, 50.0), 1.0), None,
    )
    for name, slow in (("fast", 1.0), ("slow", 2.0))
]  # fmt: skip
EVALUATION = Evaluation(512, 4, 1024, 1.75, 1.7, 0.004, 0.0002, 0.001, 0.09, 0.5, 0.97, [i / 200 for i in range(101)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "bench.json").write_text(json.dumps({"threads": 2, "models": [asdict(result) for result in RESULTS]}))
    evaluation = {"model": "/home/somebody/<script><b>x", "text": "t", **asdict(EVALUATION)}
    (folder / "evaluate.json").write_text(json.dumps(evaluation))
    return folder / "bench.json", folder / "evaluate.json"


@pytest.fixture(scope="module")
def with_errors(llama_agq: Path) -> Path:
    """The model with the errors that quantize writes."""
    path = llama_agq.with_name("with-errors.gguf")
    with open_gguf(llama_agq) as reader:
        names = [name for name, tensor in reader.tensors.items() if tensor.type_name == "agq4"]
        added = {
            "general.name": "</script><b>y",
            **error_table(dict(zip(names, np.linspace(0.001, 0.01, len(names)).tolist(), strict=True))),
        }
        placed = layout((t.name, t.type_name, t.shape) for t in reader.tensors.values())
        with Writer(path, reader.metadata, added, placed) as writer:
            for name in reader.tensors:
                writer.write(name, [reader.raw(name)])
    return path


@pytest.fixture(scope="module")
def page(with_errors: Path, words_file: Path, measured: tuple[Path, Path]) -> Path:
    bench, evaluation = measured
    target = with_errors.with_suffix(".html")
    run("report", with_errors, "-o", target, "--text", words_file, "--tokens", 256, "--bench", bench, "--evaluate",
        evaluation, "-t", 1)  # fmt: skip
    return target


class Tags(HTMLParser):
    """Attributes of all tags outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_ranges_are_those_of_the_activations(llama_agq: Path, words_file: Path) -> None:
    """Against the inputs that a forward in numpy sees."""
    from reference_model import ReferenceModel

    from agq_gguf.calibration.collect import Calibrator
    from agq_gguf.text import load_text

    data = report.gather(llama_agq, text=words_file, tokens=256, threads=1)
    assert len(data.ranges) == 2 * 4  # q/k/v, output, gate/up, down; the output matrix is Q8_0
    with Calibrator.open(llama_agq, load_text(words_file), {}, max_tokens=256, threads=1) as calibrator:
        chunks = calibrator.chunks
    seen: dict[str, list[np.ndarray]] = {}

    class Spy(ReferenceModel):
        def linear(self, x: np.ndarray, name: str, expert: int | None = None) -> np.ndarray:
            seen.setdefault(name, []).append(np.asarray(x))
            return super().linear(x, name, expert)

    for chunk in chunks:
        Spy(llama_agq).logits([int(t) for t in chunk])
    for one in data.ranges:
        x = np.concatenate(seen[one.weights[0]])
        # Two correct runs differ by some int8 steps (docs/design.md).
        np.testing.assert_allclose(one.abs_max, np.abs(x).max(0), rtol=0.15)
        np.testing.assert_allclose(one.rms, np.sqrt((x**2).mean(0)), rtol=0.03)
        assert len(one.exponents) * 64 == len(one.abs_max) == len(one.order)


def test_refined_groups_are_shown(llama_f16: Path, words_file: Path, tmp_path: Path) -> None:
    """Those of files with a scale per token; others have none."""
    out = tmp_path / "token.gguf"
    options = QuantizeOptions(threads=1, context=64, matrix=MatrixOptions(activation_scale="token", equalize=False))
    pipeline.quantize(llama_f16, out, calibration=words_file, options=options)
    data = report.gather(out, text=words_file, tokens=256, threads=1)
    refined = [one for one in data.ranges if one.exponents.any()]
    assert refined  # the tiny models have outlier channels
    for one in refined:
        channels = one.order[np.repeat(one.exponents, 64) > 0]
        assert one.abs_max[channels].max() == one.abs_max.max()
    run("report", out, "-o", tmp_path / "page.html", "--text", words_file, "--tokens", 256, "-t", 1)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>Outlier groups and their exponents</h2>" in page and "refined groups" in page


def test_page_has_everything_and_asks_for_nothing(page: Path, with_errors: Path) -> None:
    html = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    assert not [a for _, a in tags.found if "src" in a or "href" in a]
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles == [
        "Bytes by tensor type", "Activation range by layer", "Channels",
        "Error of each tensor", "Speed", "Quality", "Figures", "Tensors", "Metadata",
    ]  # fmt: skip
    figures = [json.loads(found) for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html)]
    assert len(figures) == 6
    with open_gguf(with_errors) as reader:
        assert all(f"<td>{name}</td>" in html for name in reader.tensors)
    assert "somebody" not in html  # the page may be given away
    assert "&lt;script&gt;&lt;b&gt;x" in html and "&lt;/script&gt;&lt;b&gt;y" in html  # names from files are text
    assert "script><b>" not in html
    assert "refined groups" not in html  # this file has none


@pytest.mark.slow
@needs_chromium
def test_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(page.as_uri())
        browser.wait("[...document.querySelectorAll('.figure')].every(f => f.dataset.drawn && f.querySelector('svg'))")
        assert browser.requests() == [page.as_uri()]
        assert not browser.problems()
        colours = {}
        for scheme in ("light", "dark"):
            browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            browser.run("new Promise(resolve => setTimeout(resolve, 500))")
            back, text, axis = (
                [int(part) for part in re.findall(r"\d+", browser.run(expression))[:3]]
                for expression in (
                    "getComputedStyle(document.body).backgroundColor",
                    "getComputedStyle(document.body).color",
                    "getComputedStyle(document.querySelector('.xtick text')).fill",
                )
            )
            assert abs(sum(back) - sum(text)) > 400 and abs(sum(back) - sum(axis)) > 400, scheme
            colours[scheme] = back
        assert sum(colours["light"]) > 600 > 200 > sum(colours["dark"])
        assert browser.run("document.querySelectorAll('#tensors tr').length") > 10
        assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_dropped_tokens(llama_agq: Path, words_file: Path, tmp_path: Path) -> None:
    """As the plugin tells them: the page has the prompt, with marks where tokens left."""
    path = tmp_path / "pruning.gguf"
    run("calibrate-pruning", llama_agq, "-o", path, "--calibration", words_file, "--share", 0.2, "--layers", 0,
        "--prompts", 2, "--keep", 16, "-t", 1)  # fmt: skip
    data = report.gather(path, text=words_file, tokens=64, threads=1)
    assert data.prompt is not None and data.prompt.layers == [0]
    whole = "".join(text for text, _ in data.prompt.pieces)
    assert words_file.read_text(encoding="utf-8")[:200] in whole
    (values,) = data.prompt.first_attention.values()
    known = values[np.isfinite(values)]
    assert len(values) == 384 and len(known) > 300 and (known >= 0).all() and (known <= 1).all()
    # Attention is shared by all that a token sees, so that to the first one falls along the prompt.
    assert np.nanmean(values[1:50]) > 2 * np.nanmean(values[250:])
    html = render(data)
    assert html.count('title="dropped after layer 0"') == sum(layer == 0 for _, layer in data.prompt.pieces) >= 1
    assert "<h2>Attention paid to the first token</h2>" in html and "<h2>Dropped tokens</h2>" in html


def test_model_without_agq4_and_without_a_run(llama_q8: Path, tmp_path: Path) -> None:
    run("report", llama_q8, "-o", tmp_path / "r.html", "--tokens", 0)
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Activation range" not in html and "q8_0" in html
    assert render(report.gather(llama_q8)).count("<h2>") == 3


def test_report_refuses(llama_agq: Path, tmp_path: Path, measured: tuple[Path, Path]) -> None:
    bench, evaluation = measured
    for options, message in (
        ({"bench": [evaluation]}, "expected the output of `agq-gguf bench --json`"),
        ({"evaluations": [bench]}, "expected the output of `agq-gguf evaluate --json`"),
        ({"bench": [llama_agq]}, "expected the output of"),
        ({"bench": [tmp_path / "none"]}, "No such file"),
        ({"text": tmp_path / "none"}, "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            report.gather(llama_agq, tokens=64, threads=1, **options)
    run("report", llama_agq, "-o", tmp_path / "no" / "r.html", "--tokens", 0, code=OutputError.exit_code)


def test_a_page_is_never_written_over_what_is_read(llama_agq: Path, tmp_path: Path) -> None:
    model, other, speed = (tmp_path / name for name in ("m.gguf", "other.gguf", "speed.json"))
    for path in (model, other):
        path.write_bytes(llama_agq.read_bytes())
    speed.write_text("[]", encoding="utf-8")
    (tmp_path / "link.html").symlink_to(other)
    for target, options in ((model, []), (other, []), (tmp_path / "link.html", []), (speed, ["--bench", speed])):
        before = target.read_bytes()
        error = run("report", model, "-o", target, "--tokens", 0, *options, code=2).stderr
        assert "write to another file" in error and target.read_bytes() == before
    assert "is a folder" in run("report", model, "-o", tmp_path, code=OutputError.exit_code).stderr
    # Said before the work.
    assert "report:" not in run("report", model, "-o", tmp_path / "no" / "r.html", code=OutputError.exit_code).stderr


def test_a_page_of_a_name_that_is_no_text(llama_agq: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    path.write_bytes(llama_agq.read_bytes())
    for command in (
        ["report", path, "--tokens", 0, "-o", tmp_path / "r.html"],
        ["card", path, "-o", tmp_path / "c.md"],
    ):
        shown = process(*command)
        assert (shown.returncode, "Traceback" in shown.stderr) == (0, False), shown
    assert "caf?.gguf" in (tmp_path / "r.html").read_text(encoding="utf-8")


# pictures


def is_picture(path: Path) -> bool:
    from matplotlib.image import imread

    pixels = imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 800 and pixels[..., :3].std() > 0.05


def test_plot_bench(tmp_path: Path) -> None:
    plots.plot_bench(RESULTS, tmp_path / "bench.png")
    assert is_picture(tmp_path / "bench.png")
    with pytest.raises(InputError, match="nothing was measured"):
        plots.plot_bench([Result("a", 1, 1, 1, None, None, None)], tmp_path / "none.png")


def test_plot_options(llama_agq: Path, llama_q4: Path, llama_f16: Path, words_file: Path, tmp_path: Path) -> None:
    run("bench", llama_agq, llama_q4, "-p", 8, "-n", 2, "-r", 1, "-t", 1, "--plot", tmp_path / "b.png")
    run("evaluate", llama_agq, "--reference", llama_f16, "--text", words_file, "-c", 64, "--chunks", 2, "-t", 1,
        "--plot", tmp_path / "e.png")  # fmt: skip
    assert is_picture(tmp_path / "b.png") and is_picture(tmp_path / "e.png")
    assert "must end in one of" in run("bench", llama_agq, "--plot", tmp_path / "b.gguf", code=2).stderr


@pytest.mark.parametrize("command", ["bench", "evaluate", "compare"])
def test_a_picture_that_cannot_be_written(command: str, small: Path, words_file: Path, tmp_path: Path) -> None:
    """Refused before the work, as every other file; no model is ever replaced."""
    (tmp_path / "model.png").write_bytes(small.read_bytes())
    (tmp_path / "folder.svg").mkdir()
    (tmp_path / "file").write_text("")
    words: dict[str, list[object]] = {
        "evaluate": ["--reference", small, "--text", words_file],
        "compare": ["-o", tmp_path / "made"],
    }
    cases = [("no/p.png", 5, "cannot write there"), ("file/p.png", 5, "cannot write there"),
             ("folder.svg", 5, "is a folder"), ("model.png", 2, "is a GGUF model")]  # fmt: skip
    if sys.platform == "linux":
        cases.append(("/proc/p.png", 5, "cannot write there"))
    for name, code, message in cases:
        shown = run(command, small, *words.get(command, []), "--plot", tmp_path / name, code=code)
        assert message in shown.stderr and shown.stderr.count("\n") == 1  # no progress: nothing was done
    assert (tmp_path / "model.png").read_bytes() == small.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg", "model.png"]
