"""Uses an AGQ4 model in a LangChain chain, in this process; `LlamaCpp` needs one extra line, `agq_gguf.register()`.

python examples/langchain_llamacpp.py model-agq4.gguf "a dog" "a box"
"""

from __future__ import annotations

import argparse

from langchain_community.llms import LlamaCpp
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

import agq_gguf


def main() -> None:
    """Runs one chain for each subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("subject", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()

    agq_gguf.register()  # from here on, llama-cpp-python loads AGQ4
    model = LlamaCpp(model_path=arguments.model, n_ctx=512, max_tokens=arguments.tokens, temperature=0.0, verbose=False)
    chain = PromptTemplate.from_template("Once upon a time there was {subject}") | model | StrOutputParser()
    for subject, text in zip(
        arguments.subject, chain.batch([{"subject": s} for s in arguments.subject], {"max_concurrency": 1}), strict=True
    ):
        print(f"{subject}:{text}")


if __name__ == "__main__":
    main()
