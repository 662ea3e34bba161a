"""A model card for the Hugging Face hub, from what a file says of itself and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from agq_gguf.comparison import page
from agq_gguf.comparison.result import Comparison
from agq_gguf.errors import InputError
from agq_gguf.format import blocks
from agq_gguf.gguf_io import metadata
from agq_gguf.gguf_io.shards import open_model
from agq_gguf.inspection.inspect import ModelInfo, inspect_file

_HUB = "https://huggingface.co/"
_RUN = """## Run it

With llama-cpp-python, and agq-gguf installed:

```python
import agq_gguf, llama_cpp

agq_gguf.register()
{code}
```

With any llama.cpp program that loads backends at run time:

```sh
GGML_BACKEND_PATH=$(agq-gguf backend-path) {command}
```
"""
_GENERATE = """llm = llama_cpp.Llama({name!r}, verbose=False)
print(llm("Once upon a time", max_tokens=64)["choices"][0]["text"])"""
_EMBED = """llm = llama_cpp.Llama({name!r}, embedding=True, verbose=False)
print(llm.embed("Once upon a time"))"""


def card(model: Path, *, base_model: str = "", licence: str = "", compared: Comparison | None = None) -> str:
    """A model card: YAML front matter as the hub wants it, what the file is, how to run it, and what was measured.

    `base_model` is a repository of the hub, such as ``HuggingFaceTB/SmolLM2-135M-Instruct``. It and `licence` default
    to what the file's metadata says. Raises InputError for a file that cannot be read, or that holds no
    AGQ4 tensor.
    """
    info = inspect_file(model)
    if blocks.TYPE_NAME not in info.types:
        raise InputError(f"{model}: holds no AGQ4 tensor, which the card is about; make one with `agq-gguf quantize`")
    with open_model(model) as reader:
        base = base_model or str(reader.get("general.base_model.0.repo_url", "")).removeprefix(_HUB)
        licence = licence or str(reader.get("general.license", ""))
        languages = reader.get("general.languages", [])
        generates = reader.flag(f"{reader.architecture}.attention.causal", True)
    front = {
        "base_model": base,
        "base_model_relation": "quantized" if base else "",
        "license": licence,
        "language": [str(language) for language in languages],
        "library_name": "gguf",
        "pipeline_tag": "text-generation" if generates else "feature-extraction",
        "quantized_by": "agq-gguf",
        "tags": ["gguf", "agq4", "llama.cpp"],
    }
    # JSON's strings and lists are YAML's, too.
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value]
    parts = ["\n".join(["---", *lines, "---\n"]), _what(model, info), _run(model.name, generates), _types(info)]
    if compared is not None:
        parts.append(f"## Measured\n\n{page.table(compared)}")
    return "\n".join(parts)


def _what(model: Path, info: ModelInfo) -> str:
    title = info.name or model.stem
    quality = info.metadata.get(metadata.QUALITY.removeprefix(metadata.PREFIX), "")
    calibration = info.metadata.get(metadata.CALIBRATION.removeprefix(metadata.PREFIX), "")
    how = f" Quality {quality!r}, calibration: {calibration}." if quality else ""
    return (
        f"# {title}, AGQ4\n\n"
        f"`{model.name}` is {title} ({info.architecture}, {info.parameters / 1e6:.0f} million parameters) in "
        f"{info.file_bytes / 1e6:.0f} MB, {info.bits_per_weight:.2f} bits per weight. agq-gguf quantized it to its "
        f"type AGQ4, which a plugin adds to unmodified llama.cpp programs.{how}\n"
    )


def _run(name: str, generates: bool) -> str:
    program = "llama-cli" if generates else "llama-embedding"
    code = (_GENERATE if generates else _EMBED).format(name=name)
    return _RUN.format(code=code, command=f"{program} -m {name}")


def _types(info: ModelInfo) -> str:
    rows = [
        f"| {name} | {found.tensors} | {found.bytes / 1e6:.1f} | {found.bits_per_weight:.2f} |"
        for name, found in info.types.items()
    ]
    return "\n".join(
        ["## What it is made of\n", "| type | tensors | MB | bits per weight |", "|---|---|---|---|", *rows, ""]
    )
