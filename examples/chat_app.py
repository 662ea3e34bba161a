"""A chat in the browser: one page and the OpenAI-compatible server in one process.

    python examples/chat_app.py model-agq4.gguf

Then open http://127.0.0.1:8000. The page loads nothing from other servers.
"""

from __future__ import annotations

import argparse

import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from agq_gguf.integrations.server import create_app

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Chat</title>
<style>
  :root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
  body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; }
  .user { text-align: right; opacity: .7; }
  .assistant { white-space: pre-wrap; }
  form { display: flex; gap: .5rem; margin-top: 1rem; }
  input { flex: 1; font: inherit; padding: .5rem; }
  button { font: inherit; padding: .5rem 1rem; }
</style>
<h1>Chat</h1>
<main></main>
<form><input aria-label="Message" autofocus required><button>Send</button></form>
<script>
  const messages = [], log = document.querySelector("main"), input = document.querySelector("input");
  function add(role, text) {
    const p = document.createElement("p");
    p.className = role;
    p.textContent = text;
    log.append(p);
    return p;
  }
  async function send(text) {
    messages.push({role: "user", content: text});
    add("user", text);
    const shown = add("assistant", "");
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: {"content-type": "application/json"},
      body: JSON.stringify({messages, max_tokens: 128, stream: true}),
    });
    if (!response.ok) { shown.textContent = await response.text(); return; }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: {")) continue;
        shown.textContent += JSON.parse(line.slice(6)).choices[0].delta.content ?? "";
      }
    }
    messages.push({role: "assistant", content: shown.textContent});
    shown.dataset.done = "yes";
  }
  document.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send(input.value);
    input.value = "";
  });
</script>
</html>
"""


def build(model: str, **settings: object) -> FastAPI:
    """The server's application with the page at its root."""
    app = create_app(model, settings)

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return PAGE

    return app


def main() -> None:
    """Serves the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(build(arguments.model), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
