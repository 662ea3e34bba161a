"""Token pruning: a pruned run must equal one in which dropped tokens are only hidden."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import low_level
import numpy as np
import pytest
import tiny_models
from low_level import GetModel, LowContext, LowModel, models_fixture

import agq_gguf
from agq_gguf.errors import InputError
from agq_gguf.format.pruning_record import Direction, Heads, Pruning, pruning_bytes
from agq_gguf.gguf_io.reader import open_gguf
from agq_gguf.inspection.inspect import inspect_file
from agq_gguf.pruning.file import carriers, write_plan

LAYERS = 4


def _write(arch: str, path: Path) -> None:
    getattr(tiny_models, f"write_{arch}")(path, dtype="f32", n_layer=LAYERS, seed=3)


model = models_fixture(_write, "agq4")


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 400, n).tolist()


def run(model: LowModel, prune: str, n: int = 200, decode: int = 4, **options: object) -> tuple[np.ndarray, list[int]]:
    """Logits of the last prompt token and of the tokens generated behind it, and the fate of the prompt's tokens."""
    with model.context(prune, **options) as context:
        logits = [context.decode(tokens(n))]
        fate = agq_gguf.last_pruned()
        for i in range(decode):
            logits.append(context.decode([int(logits[-1].argmax())], n + i))
    return np.concatenate(logits), fate


# At least 32 tokens are left in every segment: fewer would go through another attention kernel than in the masked run.
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["1:0.5", "1:0.3,2:0.5", "1:t0.9", "2:0.4;score=recent", "0:0.5;score=first"])
@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "falcon", "qwen2"])
def test_pruned_equals_masked(model: GetModel, arch: str, spec: str, flash: bool) -> None:
    m = model(arch)
    pruned, fate = run(m, spec, flash=flash, n_ubatch=100)
    masked, masked_fate = run(m, "mask," + spec, flash=flash, n_ubatch=100)
    assert fate == masked_fate and len(fate) == 200
    assert 15 <= sum(layer >= 0 for layer in fate) <= 150
    assert np.array_equal(pruned, masked)
    whole, _ = run(m, "off", flash=flash, n_ubatch=100)
    assert not np.allclose(pruned, whole, atol=1e-3)


@pytest.fixture(scope="module")
def learned(model: GetModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetModel]:
    """Models whose file has directions for the layers 0 to 2, which are not those of a trained model."""
    folder = tmp_path_factory.mktemp("learned")
    loaded: dict[str, LowModel] = {}

    def get(arch: str) -> LowModel:
        if arch not in loaded:
            with open_gguf(model(arch).path) as reader:
                width = reader.tensors["token_embd.weight"].shape[1]
                rng, held_by = np.random.default_rng(5), carriers(reader, pruning_bytes(channels=width))
                records = {
                    held_by[layer]: Pruning("learned", 1.0, direction=Direction.of(rng.normal(0, 0.2, width)))
                    for layer in range(LAYERS - 1)
                }
                write_plan(reader, folder / f"{arch}.gguf", records, {}, lambda *_: None)
            loaded[arch] = LowModel(folder / f"{arch}.gguf")
        return loaded[arch]

    yield get
    for m in loaded.values():
        m.close()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("spec", ["1:0.5", "0:0.3,2:0.5", "1:t0.9"])
@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "qwen2"])
def test_learned_score(learned: GetModel, arch: str, spec: str, flash: bool) -> None:
    m, how = learned(arch), {"flash": flash, "n_ubatch": 100}
    pruned, fate = run(m, f"{spec};score=learned", **how)
    masked, masked_fate = run(m, f"mask,{spec};score=learned", **how)
    _, other_fate = run(m, f"{spec};score=random", **how)
    again, fate_again = run(m, f"{spec};score=learned;reuse=1", **how)
    assert fate == masked_fate and fate != other_fate and np.array_equal(pruned[0], masked[0])
    np.testing.assert_allclose(pruned, masked, atol=1e-4)  # of a few rows, attention adds chunks of the cells there are
    assert 15 <= sum(layer >= 0 for layer in fate) <= 150
    if "," not in spec:  # what is left behind a first layer is not the same
        assert fate == fate_again
    assert not np.allclose(again, pruned, atol=1e-3)


def test_a_direction_in_the_list_replaces_that_of_the_file(model: GetModel, learned: GetModel) -> None:
    """A list with the file's directions drops what the file's own records drop; another direction drops others."""
    stored = learned("llama")
    records = [t.agq.pruning for t in inspect_file(stored.path).tensors if t.agq and t.agq.pruning]
    held = [record.direction for record in records if record.direction]
    assert len(held) == LAYERS - 1
    spec = "0:0.3,2:0.5;score=learned"
    listed = "".join(f";direction={layer}:{held[layer].to_bytes().hex()}" for layer in (0, 2))
    logits, fate = run(stored, spec)
    for m in (model("llama"), stored):
        again, same_fate = run(m, spec + listed)
        assert same_fate == fate and np.array_equal(again, logits)
    turned = Direction(held[0].factor, tuple(reversed(held[0].codes))).to_bytes().hex()
    _, other_fate = run(stored, f"{spec};direction=0:{turned}")
    assert other_fate != fate


def test_learned_score_needs_a_direction(model: GetModel, learned: GetModel) -> None:
    for m, spec, reason in (
        (model("llama"), "1:0.5;score=learned", "the file has no learned score for layer 1"),
        (
            learned("falcon"),
            "1:0.5;score=learned",
            "a learned score needs layers in which the feed-forward part follows",
        ),
    ):
        low_level.log.clear()
        whole, _ = run(m, "off")
        kept, fate = run(m, spec)
        assert np.array_equal(whole, kept) and set(fate) == {-1}
        assert sum(reason in line for line in low_level.log) == 1


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "falcon", "qwen2"])
def test_score_heads(model: GetModel, tmp_path: Path, arch: str) -> None:
    """With heads in a list, and with the same in the file; `mask` agrees."""
    m, how = model(arch), {"flash": True, "n_ubatch": 200}
    heads = {0: Heads(((0, 1),), 4), 2: Heads(((0, 0), (1, 1), (2, 1)), 4)}
    listed = ";score=heads;keep=32;reach=3;overlap=4" + "".join(f";heads={i}:{h.spec()}" for i, h in heads.items())
    spec = "0:t0.7,2:t0.9"
    pruned, fate = run(m, spec + listed, **how)
    masked, masked_fate = run(m, f"mask,{spec}{listed}", **how)
    assert fate == masked_fate and np.array_equal(pruned[0], masked[0])
    assert 15 <= sum(layer >= 0 for layer in fate) <= 150
    with open_gguf(m.path) as reader:
        held_by = carriers(reader, pruning_bytes(heads=3))
        limits = {0: 0.7, 2: 0.9}
        records = {held_by[i]: Pruning("heads", limits[i], keep=32, reach=3, heads=h) for i, h in heads.items()}
        write_plan(reader, tmp_path / "heads.gguf", records, {}, lambda *_: None)
    stored = LowModel(tmp_path / "heads.gguf")
    by_file, file_fate = run(stored, "file", **how)
    by_list, list_fate = run(stored, f"{spec};score=heads;keep=32;reach=3", **how)
    stored.close()
    assert fate == file_fate == list_fate and np.array_equal(by_file, pruned) and np.array_equal(by_list, pruned)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("1:0.5;score=heads", "neither the file nor AGQ_PRUNE names heads for layer 1"),
        ("1:0.5;score=heads;heads=1:1.99", "heads, so there is no head 99"),
        ("0:0.5;score=heads;heads=all", "a ubatch does not end its prompt"),
    ],
)
def test_obstacles_of_heads(model: GetModel, spec: str, reason: str) -> None:
    """Without the question at the end of a prompt, its beginning cannot be ranked."""
    low_level.log.clear()
    m, n_ubatch = model("llama"), 100 if "all" in spec else 200
    whole, _ = run(m, "off", n_ubatch=n_ubatch)
    kept, fate = run(m, spec, n_ubatch=n_ubatch)
    assert set(fate[:100]) == {-1} and sum(reason in line for line in low_level.log) == 1
    if n_ubatch == 200:
        assert np.array_equal(whole, kept) and set(fate) == {-1}


def test_options_are_checked_and_nest(model: GetModel) -> None:
    for text in (
        "3",
        "3:1",
        "3:-0.1",
        "x:0.5",
        "3:t",
        "3:0.5,3:0.2",
        "file;score=recent",
        "3:0.5;score=best",
        "off,3:0.5",
        "mask,3:0.5;reuse=1",
        "3:0.5;reuse=2",
        "file;direction=3:0000803f0100000001",
        "3:0.5;direction=3",
        "3:0.5;direction=3:",
        "3:0.5;direction=3:0000803f010000000",  # half a byte
        "3:0.5;direction=3:0000803f0100000001zz",
        "3:0.5;direction=3:0000803f01000000",  # no number
        "3:0.5;direction=3:0000803f010000000101",  # a number too many
        "3:0.5;direction=3:0000803f0000000001",  # no channels
        "3:0.5;direction=3:000080ff0100000001",  # infinity
        "3:0.5;direction=3:000080bf0100000001",  # below zero
        "3:0.5;direction=4:0000803f0100000001",  # not in the list
        "file;heads=3:1.2",
        "3:0.5;heads=3",
        "3:0.5;heads=3:",
        "3:0.5;heads=3:1",
        "3:0.5;heads=3:1.x",
        "3:0.5;heads=3:4.0",  # of a later layer
        "3:0.5;heads=4:1.2",  # not in the list
        "3:0.5;heads=3:1.2;heads=3:1.2",
        "3:0.5;heads=3:" + "+".join(["1.2"] * 17),
        "3:0.5;heads=3:1.2;overlap=64",
        "file;overlap=5",
        "file;revive=0.1",
        "3:0.5;revive=0.1",  # not by heads
        "3:0.5;score=heads;heads=3:1.2;revive=0",
        "3:0.5;score=heads;heads=3:1.2;revive=1.1",
        "3:0.5;score=heads;heads=3:1.2;revive=x",
        "3:0.5,4:t0.1;score=heads;heads=all;revive=0.1",  # a threshold
        "3:0.5;score=heads;heads=3:1.2;revive=0.1;reuse=1",
        "mask,3:0.5;score=heads;heads=3:1.2;revive=0.1",
        "3:0.5;direction=3:0000803f0100000001;direction=3:0000803f0100000001",
    ):
        with pytest.raises(InputError, match="is not understood"), agq_gguf.options(prune=text):
            pass
    with agq_gguf.options(prune="1:0.5"):
        with agq_gguf.options(prune="off"):
            assert plain_fate(model()) == 0
        assert plain_fate(model()) == 100
    assert plain_fate(model()) == 0


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "qwen2"])
def test_states_used_again_are_those_that_left(arch: str, flash: bool, tmp_path: Path) -> None:
    """Without feed-forward parts a token leaves behind the last layer but one as it enters the last: nothing is lost.

    Its keys and values are then what they would be without pruning.
    """
    path = tmp_path / "flat.gguf"
    getattr(tiny_models, f"write_{arch}")(path, dtype="f32", n_layer=LAYERS, seed=3)
    raw = bytearray(path.read_bytes())
    with open_gguf(path) as reader:
        for name, tensor in reader.tensors.items():
            if "ffn_down" in name:
                raw[tensor.offset : tensor.offset + tensor.n_bytes] = bytes(tensor.n_bytes)
    path.write_bytes(raw)
    m = LowModel(path)
    spec = f"{LAYERS - 2}:0.6;score=random"
    whole, _ = run(m, "off", flash=flash, n_ubatch=100)
    dropped, fate = run(m, spec, flash=flash, n_ubatch=100)
    again, same_fate = run(m, f"{spec};reuse=1", flash=flash, n_ubatch=100)
    m.close()
    assert fate == same_fate and sum(layer >= 0 for layer in fate) == 120
    lost = np.abs(again - whole).max()  # other numbers of tokens go through other kernels
    assert lost < 0.01 and lost < 0.05 * np.abs(dropped - whole).max()


def test_states_used_again_need_layers_one_behind_the_other(model: GetModel) -> None:
    """In Falcon's attention and feed-forward part stand side by side: nothing is dropped."""
    low_level.log.clear()
    whole, _ = run(model("falcon"), "off")
    again, fate = run(model("falcon"), "1:0.5;reuse=1")
    assert np.array_equal(whole, again) and set(fate) == {-1}
    assert sum("states cannot be reused" in line for line in low_level.log) == 1


def plain_fate(model: LowModel) -> int:
    """How many of 200 tokens a context drops that is created with the options at hand."""
    with LowContext(model) as context:
        context.decode(tokens(200))
        return sum(layer >= 0 for layer in agq_gguf.last_pruned())


@pytest.mark.parametrize("score", ["first", "received", "recent"])
def test_threads_do_not_change_the_choice(model: GetModel, score: str) -> None:
    fates = [run(model("qwen2"), f"1:0.5;score={score}", decode=0, threads=n)[1] for n in (1, 2, 3)]
    assert fates[0] == fates[1] == fates[2]
