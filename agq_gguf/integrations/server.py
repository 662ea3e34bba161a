"""Serves AGQ4 models with llama-cpp-python's OpenAI-compatible server (`llama_cpp.server`) and the plugin.

The server is the stock one; llama-cpp-python documents its routes and settings. This module checks the files, passes on
the settings, and hides llama.cpp's log.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agq_gguf.errors import InputError, missing_package
from agq_gguf.runtime.cpus import default_threads
from agq_gguf.runtime.log import quiet_log
from agq_gguf.runtime.model import Model
from agq_gguf.runtime.model_file import FileFacts, prepare

if TYPE_CHECKING:
    from fastapi import FastAPI

_CONTEXT = 4096  # tokens, unless the user sets it or the trained context is smaller


def create_app(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], settings: Mapping[str, Any] | None = None
) -> FastAPI:
    """The ASGI application of llama-cpp-python's server. It loads the first model now, others when requests name them.

    `models` are GGUF files; clients name them by their file names without ``.gguf``. `settings` are fields of
    `llama_cpp.server.settings`, for example ``{"n_ctx": 8192, "api_key": "..."}``; text is converted. By default the
    context is the model's, at most 4096 tokens, all CPUs are used, and logits are kept only for the last token (set
    ``logits_all`` to True if clients request log probabilities). Raises InputError for a file or a setting that cannot
    be used, HostError if the server's packages are missing.
    """
    paths = [Path(models)] if isinstance(models, (str, os.PathLike)) else [Path(path) for path in models]
    given = dict(settings or {})
    server = _server_module()
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    unknown = sorted(set(given) - set(ModelSettings.model_fields) - set(ServerSettings.model_fields))
    if unknown:
        known = ", ".join(sorted({*ModelSettings.model_fields, *ServerSettings.model_fields} - {"model"}))
        raise InputError(f"the server has no setting {unknown[0]!r}; its settings are {known}")
    aliases = [path.name.removesuffix(".gguf") for path in paths]
    if len(set(aliases)) < len(aliases) or not paths:
        raise InputError(
            f"each model needs its own file name, because clients name models by it; got {', '.join(aliases) or 'none'}"
        )
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"{path}: is a folder, which only llama-server serves; name the files, or a llama-server with --server"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise InputError(
                f"{path}: llama-cpp-python's server needs a file name in UTF-8; rename the file, or name a "
                "llama-server with --server"
            )
    described = []
    for path, alias in zip(paths, aliases, strict=True):
        facts = _checked_model(path, given)
        threads = default_threads()
        defaults = {
            "n_ctx": min(facts.n_ctx_train or _CONTEXT, _CONTEXT),
            "n_threads": threads,
            "n_threads_batch": threads,
            "logits_all": False,
            "verbose": False,
        }
        model_fields = {key: value for key, value in given.items() if key in ModelSettings.model_fields}
        described.append(
            _checked(ModelSettings, {"model_alias": alias, **defaults, **model_fields, "model": str(path)})
        )
    server_fields = {key: value for key, value in given.items() if key in ServerSettings.model_fields}
    try:
        with quiet_log():
            app: FastAPI = server.create_app(
                server_settings=_checked(ServerSettings, server_fields), model_settings=described
            )
    except (ValueError, RuntimeError) as e:
        raise InputError(f"{paths[0]}: cannot be served: {e}") from e
    return app


def _checked_model(path: Path, given: Mapping[str, Any]) -> FileFacts:
    """Refuses what would abort the server at a request: a model that does not generate, or too large a context."""
    facts = prepare(path)
    n_ctx = int(given.get("n_ctx") or 0)
    if facts.positions and n_ctx > facts.positions:
        raise InputError(f"{path}: the context must be at most {facts.positions} tokens for this model, got {n_ctx}")
    with Model(path) as model:
        if model.has_encoder and model.has_decoder:
            model.require_logits()
        if not given.get("embedding") and model.abilities.problem:
            raise InputError(
                f"{path}: predicts no next token: {model.abilities.problem}; serve embeddings with the setting "
                "embedding=1"
            )
    return facts


def serve(
    models: Sequence[str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: Mapping[str, Any] | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves models (see `create_app`) until a signal ends the process.

    `port` 0 means any free port. `ready` is called with the address when the first model is loaded. Raises InputError
    if the address cannot be used, and the errors of `create_app`.
    """
    _server_module()
    import uvicorn

    with _listen(host, port) as listener, quiet_log():
        config = uvicorn.Config(
            create_app(models, settings),
            log_level="warning",
            ssl_keyfile=(settings or {}).get("ssl_keyfile"),
            ssl_certfile=(settings or {}).get("ssl_certfile"),
        )
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"{'https' if config.ssl_certfile else 'http'}://{shown}:{listener.getsockname()[1]}")
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has already closed its connections
            uvicorn.Server(config).run(sockets=[listener])


def _server_module() -> Any:
    try:
        import uvicorn  # noqa: F401
        from llama_cpp.server import app
    except ImportError as e:
        raise missing_package("serving", e, "serve") from e
    return app


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as e:
        raise InputError(f"cannot listen on {host}, port {port}: {e}; choose another with --host and --port") from e
    with listener:
        yield listener


def _checked(kind: Any, values: dict[str, Any]) -> Any:
    """An object of the server's settings. Raises InputError for values that the server does not accept."""
    from pydantic import ValidationError

    try:
        return kind(**values)
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(map(str, first["loc"])) or "settings"
        raise InputError(f"the server does not accept {name}={values.get(name)!r}: {first['msg']}") from e
