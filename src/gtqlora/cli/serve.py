"""`gtqlora bitdelta serve`: variants of one base behind OpenAI's HTTP interface, until Ctrl-C."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from gtqlora.cli.console import open_console, say_whole, stage_progress, starting
from gtqlora.cli.settings import Model, embedded_model

Variants = Annotated[
    Path, Parameter(help="Folders that `gtqlora export --to peft` or `gtqlora bitdelta compress` wrote for this base.")
]


def serve(
    base: Model,
    *variants: Variants,
    host: Annotated[str, Parameter(help="Loopback address to listen on; no other is taken.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on; 0 is any free one.")] = 8080,
    device: Annotated[str, Parameter(help="Where the base is, e.g. cuda.")] = "cpu",
    context: Annotated[int, Parameter(help="Tokens of a prompt and its answer together, at most.")] = 8192,
    max_tokens: Annotated[int, Parameter(help="Tokens of an answer, at most.")] = 4096,
    batch: Annotated[int, Parameter(help="Requests that run at a time.")] = 16,
    queue: Annotated[int, Parameter(help="Requests that wait for a place, at most; others get status 429.")] = 64,
) -> None:
    """Serve many variants on one resident base, every request its own: `model` is a folder's name, or the base's.

    Only what was certified is served. Any OpenAI client works: its base URL is http://HOST:PORT/v1, its key any text.
    """
    with starting():
        from gtqlora.bitdelta.engine import Engine
        from gtqlora.bitdelta.resident import resident
        from gtqlora.bitdelta.server import Limits, Server, listening, uvicorn_server
        from gtqlora.config.values import require

    for name, value in (("context", context), ("max-tokens", max_tokens), ("batch", batch), ("queue", queue)):
        require(value >= 1, f"--{name} {value}: must be at least 1")
    with listening(host, port) as listener:
        with stage_progress():
            model = resident(embedded_model(base), variants, device=device)
        most = min(context, model.subject.max_length)
        limits = Limits(context=most, max_tokens=min(max_tokens, most))
        engine = Engine(model, places=batch, waiting=queue)
        shown = f"[{host}]" if ":" in host else host
        names, console = ", ".join(model.names), open_console()
        say_whole(console, f"serving {names} on http://{shown}:{listener.getsockname()[1]}/v1; Ctrl-C stops")
        own = f" (the model's own limit, below --context {context})" if most < context else ""
        say_whole(console, f"{limits}{own}; {batch} requests at a time, {queue} waiting")
        try:
            with suppress(KeyboardInterrupt):  # raised again once open requests have ended
                uvicorn_server(Server(engine, limits), limits).run(sockets=[listener])
        finally:
            engine.close()
        say_whole(console, "stopped")
