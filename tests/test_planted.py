"""Prompts with planted facts: lengths, the same prompts every time, and which tokens spell the answer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from test_default_text import with_metadata

from agq_gguf.errors import InputError
from agq_gguf.pruning.facts import CITIES, FACT_WORDS, NAMES, WORDINGS, WORDS, functions
from agq_gguf.pruning.planted import KINDS, Chat, Planted, in_prose, plant, sentences_of
from agq_gguf.runtime.model import Model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
UNUSABLE = [
    "{% for",
    "{{ raise_exception('never') }}",
    "{{ 1 }}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
]
TOKENS = (1500, 1700)  # the tiny tokenizers have a token for each letter of most words


def sentences(count: int = 200) -> list[str]:
    """Sentences of the words that tiny models know."""
    dice = random.Random(5)
    return [" ".join(["The", *dice.choices(tiny_models.WORDS, k=dice.randint(8, 20))]) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with different tokenizers; "joined" has tokens such as " Paris." and "is a"."""
    folder = tmp_path_factory.mktemp("planted")
    small: dict[str, Any] = {"n_layer": 1, "n_embd": 64, "n_head": 2, "n_kv": 2, "n_ff": 64}
    found = {name: tiny_models.WRITERS[name](folder / name, **small) for name in ("llama", "qwen2")}
    with pytest.MonkeyPatch.context() as patch:
        joined = [f"{value}." for value in CITIES] + [f'{word}"' for word in WORDS]
        patch.setattr(tiny_models, "WORDS", tiny_models.WORDS + joined)
        found["joined"] = tiny_models.write_llama(folder / "joined", vocab=2048, **small)
    return found


def model_of(source: Path, template: str, folder: Path) -> Model:
    path = with_metadata(source, folder / "chat.gguf", chat_template=template) if template else source
    return Model(path, vocab_only=True)


def spelled(model: Model, tokens: object) -> str:
    return b"".join(model.bytes_of(int(token)) for token in np.atleast_1d(np.asarray(tokens))).decode()


def check(model: Model, found: Planted) -> None:
    """The value's tokens are exactly those that spell the answer; the reply leads up to it."""
    value, text = spelled(model, found.answer).strip(), spelled(model, found.prompt)
    assert len(value) > 2 and text.count(value) == 1
    first, last = found.value[0], found.value[-1]
    assert found.value == tuple(range(first, last + 1))
    at = text.index(value)
    ends = np.cumsum([len(model.bytes_of(int(token))) for token in found.prompt])
    starts = ends - [len(model.bytes_of(int(token))) for token in found.prompt]
    raw_at = len(text[:at].encode())
    assert starts[first] <= raw_at < ends[first] and starts[last] < raw_at + len(value) <= ends[last]
    assert spelled(model, found.reply).strip() and value not in spelled(model, found.reply)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["", TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "joined"])
def test_value_and_length(name: str, template: str, kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    lengths = set()
    with model_of(files[name], template, tmp_path) as model:
        for seed in range(6):
            found = plant(model, sentences(), kind, seed, TOKENS)
            check(model, found)
            assert found.kind == kind and TOKENS[0] <= len(found.prompt) <= TOKENS[1]
            assert (found.prompt[0] == model.bos) == (name != "qwen2" or bool(template))
            assert np.count_nonzero(found.prompt == model.bos) <= 1 + (name == "qwen2")
            text, tail = (spelled(model, found.prompt[start:]) for start in (0, len(found.prompt) - found.tail))
            # SentencePiece puts a space after a special token.
            wanted = f"{model.text_of(model.eos)}<|assistant|>" if template else "Answer:"
            assert tail.replace(" ", "").strip() == wanted and text.removesuffix(tail).endswith("?")
            lengths.add(len(found.prompt))
    assert len(lengths) > 1


def test_a_token_that_spells_the_value_and_what_follows(files: dict[str, Path]) -> None:
    joined = 0
    with Model(files["joined"], vocab_only=True) as model:
        for seed in range(12):
            for kind in ("facts", "functions"):
                found = plant(model, sentences(), kind, seed, TOKENS)
                value = spelled(model, found.answer).strip()
                piece = spelled(model, found.prompt[list(found.value)])
                joined += piece.endswith(".") or piece.endswith('"')
                assert piece.strip(' ."') == value
    assert joined


def test_what_each_kind_asks(files: dict[str, Path]) -> None:
    with Model(files["qwen2"], vocab_only=True) as model:
        texts = {kind: spelled(model, plant(model, sentences(), kind, 3, TOKENS).prompt) for kind in KINDS}
    assert len([name for name in NAMES if f"{name} " in texts["needle"] or f" {name}" in texts["needle"]]) == 2
    assert len([name for name in NAMES if f"{name} " in texts["facts"] or f" {name}" in texts["facts"]]) == 6
    assert texts["functions"].count("\ndef ") > 3 and texts["functions"].startswith("```python\n")
    assert "Question: What does the function `" in texts["functions"]


def test_the_same_seed_gives_the_same_prompt(files: dict[str, Path]) -> None:
    with Model(files["llama"], vocab_only=True) as model:
        for kind in KINDS:
            one, same, other = (plant(model, sentences(), kind, seed, TOKENS) for seed in (1, 1, 2))
            assert np.array_equal(one.prompt, same.prompt) and one.value == same.value
            assert not np.array_equal(one.prompt, other.prompt)


def test_a_narrow_range_is_met(files: dict[str, Path]) -> None:
    with Model(files["llama"], vocab_only=True) as model:
        for kind in KINDS:
            found = plant(model, sentences(), kind, 1, (1600, 1606))
            check(model, found)
            assert 1600 <= len(found.prompt) <= 1606


def test_a_template_without_a_system_role(files: dict[str, Path], tmp_path: Path) -> None:
    with model_of(files["llama"], NO_SYSTEM, tmp_path) as model:
        found = plant(model, sentences(), "needle", 1, TOKENS)
        check(model, found)
        assert spelled(model, found.prompt).endswith("</s> <|assistant|>")


def test_the_space_after_the_header_is_the_templates(files: dict[str, Path], tmp_path: Path) -> None:
    header = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    with model_of(files["qwen2"], header, tmp_path) as model:
        found = plant(model, sentences(), "needle", 1, TOKENS)
        assert spelled(model, found.prompt).endswith("?]") and spelled(model, found.reply).startswith(" ")
        assert found.tail == 1


@pytest.mark.parametrize("template", UNUSABLE)
def test_a_template_that_cannot_be_used(template: str, files: dict[str, Path], tmp_path: Path) -> None:
    with model_of(files["llama"], template, tmp_path) as model, Model(files["llama"], vocab_only=True) as plain:
        found, wanted = (plant(one, sentences(), "needle", 1, TOKENS) for one in (model, plain))
        assert np.array_equal(found.prompt, wanted.prompt)


def test_a_further_question_goes_on_the_conversation(files: dict[str, Path], tmp_path: Path) -> None:
    for template in ("", TEMPLATE):
        with model_of(files["llama"], template, tmp_path) as model:
            chat, facts = Chat(model), functions(random.Random(1), 2)
            user = in_prose(
                chat, [fact.text for fact in facts], facts[0].question, sentences(), random.Random(1), TOKENS, 1600
            )
            said = facts[0].reply + facts[0].value
            more = chat.further(user, f"{said}.", facts[1].question)
            assert more.startswith(chat.said(user, said)) and facts[1].question in more
            known = chat.tokens(chat.said(user, said))
            assert np.array_equal(chat.tokens(more)[: len(known)], known)


@pytest.mark.parametrize("kind", KINDS)
def test_too_short_a_text(kind: str, files: dict[str, Path]) -> None:
    with Model(files["llama"], vocab_only=True) as model:
        for few in ([], sentences(5)):
            with pytest.raises(InputError, match="too few sentences for a prompt of 20000 tokens"):
                plant(model, few, kind, 1, (20000, 21000))


def test_prompts_that_cannot_be(files: dict[str, Path]) -> None:
    with Model(files["llama"], vocab_only=True) as model:
        with pytest.raises(InputError, match="kind of prompt must be one of needle, facts, functions, got 'x'"):
            plant(model, sentences(), "x", 1, TOKENS)
        with pytest.raises(InputError, match=r"with its facts alone has .* tokens, expected at most 20"):
            plant(model, sentences(), "facts", 1, (10, 20))
        with pytest.raises(InputError, match="no prompt of 1600 to 1600 tokens"):
            plant(model, ["x" * 2000], "needle", 1, (1600, 1600))
        with pytest.raises(InputError, match="the minimum first, got 30 to 20"):
            plant(model, sentences(), "facts", 1, (30, 20))


def test_sentences_that_may_surround_facts() -> None:
    good = ["The tour had an impact on the development of rugby.", "Was it the first one of its kind in the north?"]
    bad = [
        "It had 26 players from all parts of the country.",
        'They said "no" to all that the others asked for.',
        "They said \u201cno\u201d to all that the others asked for.",
        "It is written <|im_end|> at the end of this line.",
        "and it goes on here, with the end of a sentence.",
        "Too short.",
        f"Then {NAMES[3]} came along and asked for more of it.",
        f"The train from {CITIES[4]} came an hour too late again.",
        "Nobody lives in the houses at the end of the road.",
        "So it went on and on" + " and on" * 40 + ".",
    ]
    assert sentences_of("\n".join([bad[0], good[0], *bad[1:], good[1]])) == good
    chinese = "\u8fd9\u662f\u4e00\u4e2a\u53e5\u5b50" * 8 + "\u3002"
    assert sentences_of(chinese * 3) == [chinese] * 3
    assert sentences_of("") == []


def test_the_words_of_facts() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 40
    for values in [*(wording.values for wording in WORDINGS), WORDS]:
        assert len(set(values)) == len(values) >= 30
        assert all(value == value.strip() and value.isalnum() for value in values)
    for wording in WORDINGS:
        assert wording.reply.endswith(" ")
        assert set(wording.values) <= FACT_WORDS | set(CITIES) or wording.values[0].isdigit()
        if wording.before.endswith(" a "):
            assert all(value[0] not in "aeiou" for value in wording.values)
