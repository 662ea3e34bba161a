"""Uses an AGQ4 model on this machine with the `openai` client: a completion, and a streamed chat answer.

agq-gguf serve model-agq4.gguf
python examples/openai_client.py "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys

from openai import OpenAI


def main() -> None:
    """Requests both and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="the key that was given to the server with --api-key")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    model = client.models.list().data[0].id
    completion = client.completions.create(
        model=model, prompt=arguments.prompt, max_tokens=arguments.tokens, temperature=0
    )
    print(f"{model} continues: {completion.choices[0].text}")

    print(f"{model} answers: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.prompt}],
        max_tokens=arguments.tokens,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    main()
