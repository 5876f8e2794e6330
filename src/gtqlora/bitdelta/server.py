"""Variants behind OpenAI's HTTP interface, on loopback only: whoever can reach the port can use the models."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gtqlora.bitdelta.engine import BusyError, Engine, Piece
from gtqlora.bitdelta.engine import Request as Work
from gtqlora.bitdelta.protocol import Asked, Kind, Reply, RequestError, read
from gtqlora.bitdelta.sampling import Sampling
from gtqlora.contrasts.template import encode_prompt, tokens
from gtqlora.errors import ConfigError, GtqloraError, RunError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise RunError("serving needs two more packages: pip install 'gtqlora[serve]'") from missing

_JSON = "application/json"
_PATHS = "what is: /v1/chat/completions, /v1/completions, /v1/models, /health"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may ask for.

    Attributes:
        context: tokens of a prompt and its answer together.
        max_tokens: of an answer.
        body: bytes of a request.
        idle: seconds that a client may take to send a request, or to take what it is sent.
    """

    context: int
    max_tokens: int
    body: int = 2**20
    idle: float = 30.0

    def __str__(self) -> str:
        return f"at most {self.context} tokens of prompt and answer together, {self.max_tokens} of an answer"


class Server:
    """The HTTP interface of an engine."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits, self._model = engine, limits, engine.model
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
            ],
            exception_handlers={GtqloraError: _told, HTTPException: _told_status, Exception: _failed},
        )

    async def _health(self, request: Request) -> Response:
        _check_local(request)
        state = {"running": self._engine.running, "waiting": self._engine.waiting, "models": list(self._model.names)}
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped", **state}, 200 if alive else 503)

    async def _models(self, request: Request) -> Response:
        _check_local(request)
        return JSONResponse({"object": "list", "data": [self._about(name) for name in self._model.names]})

    async def _one_model(self, request: Request) -> Response:
        _check_local(request)
        name = request.path_params["name"]
        self._variant(name)
        return JSONResponse(self._about(name))

    def _about(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "gtqlora"}

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def _text(self, request: Request) -> Response:
        return await self._answer(request, "text")

    async def _answer(self, request: Request, kind: Kind) -> Response:
        _check_local(request)
        _check_type(request)
        asked = read(await self._body(request), kind, max_tokens=self._limits.max_tokens)
        variant = self._variant(asked.model)
        # in a thread: a chat template may take seconds, and other answers stream meanwhile
        prompt, sampling = await asyncio.to_thread(self._encoded, asked, variant)
        reply = Reply(kind=kind, model=asked.model, prompt_tokens=len(prompt))
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        work = Work(prompt=prompt, variant=variant, sampling=sampling, tell=_teller(pieces))
        try:
            self._engine.submit(work)
        except BusyError as error:
            raise RequestError(str(error), status=429, code="rate_limit_exceeded") from error
        if asked.stream:
            return _Stream(work, pieces, reply, usage=asked.usage_in_stream, idle=self._limits.idle)
        return await _whole(request, work, pieces, reply)

    async def _body(self, request: Request) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.idle):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.body:
                        raise RequestError(f"the request is larger than {self._limits.body} bytes", status=413)
        except TimeoutError as error:
            raise RequestError(f"the request did not come within {self._limits.idle:g} s", status=408) from error
        return bytes(body)

    def _variant(self, name: str) -> int:
        if name not in self._model.names:
            served = ", ".join(self._model.names)
            message = f"there is no model {name!a} here; served are {served}"
            raise RequestError(message, status=404, parameter="model", code="model_not_found")
        return self._model.names.index(name)

    def _encoded(self, asked: Asked, variant: int) -> tuple[list[int], Sampling]:
        """Return a prompt's tokens, and how it is answered."""
        tokenizer = self._model.voices[variant].tokenizer
        text = isinstance(asked.prompt, str)
        found = tokens(tokenizer, asked.prompt) if text else encode_prompt(tokenizer, asked.prompt)  # type: ignore[arg-type]
        if not found:
            raise RequestError("the prompt is empty", parameter="prompt" if text else "messages")
        left, sampling = self._limits.context - len(found), asked.sampling
        if asked.any_length:
            sampling = replace(sampling, max_tokens=max(1, min(sampling.max_tokens, left)))
        if sampling.max_tokens > left:
            raise RequestError(
                f"the prompt has {len(found)} tokens and the answer may have {sampling.max_tokens}; together at most "
                f"{self._limits.context} are taken",
                code="context_length_exceeded",
            )
        return found, sampling


def _teller(pieces: asyncio.Queue[Piece]) -> Callable[[Piece], None]:
    """Return what hands pieces from the engine's thread to this loop."""
    loop = asyncio.get_running_loop()

    def tell(piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return tell


# --- checks and errors -----------------------------------------------------------------------------------------------


def _check_local(request: Request) -> None:
    """Refuse requests under another name: a page in the user's browser may have its own name point here."""
    name = request.url.hostname
    if name is None or not is_loopback(name):
        raise RequestError("this server answers to loopback names only", status=403)


def _check_type(request: Request) -> None:
    """Refuse what a browser may send for any page without asking first."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise RequestError(f"the content type must be {_JSON}", status=415)


def is_loopback(host: str) -> bool:
    """Return whether a name or address means this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


async def _told(_request: Request, error: Exception) -> Response:
    told = error if isinstance(error, RequestError) else RequestError(str(error))
    return JSONResponse(told.body(), told.status)


async def _told_status(request: Request, error: Exception) -> Response:
    """Tell of a path or method that is not there, of which Starlette says no more than the status."""
    assert isinstance(error, HTTPException)
    allowed = (error.headers or {}).get("Allow")
    message = f"{request.method} {request.url.path!a} is not served here; " + (
        _PATHS if allowed is None else f"this path takes {allowed}"
    )
    told = RequestError(message, status=error.status_code)
    return JSONResponse(told.body(), told.status, error.headers)


async def _failed(_request: Request, _error: Exception) -> Response:
    return JSONResponse(RequestError("the server failed", status=500).body(), 500)


# --- answers ---------------------------------------------------------------------------------------------------------


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has hung up."""
    # whatever else comes is the rest of a body that was read already
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pieces(
    work: Work, pieces: asyncio.Queue[Piece], receive: Callable[[], Awaitable[Any]]
) -> AsyncIterator[Piece]:
    """Give the pieces of an answer; when it is left before its end, the engine is told.

    Raises:
        ClientDisconnect: the client has hung up.
    """
    gone = asyncio.ensure_future(_gone(receive))
    try:
        while True:
            coming = asyncio.ensure_future(pieces.get())
            await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                raise ClientDisconnect
            yield (piece := coming.result())
            if piece.finish is not None:
                return
    finally:
        work.cancel()
        gone.cancel()


async def _whole(request: Request, work: Work, pieces: asyncio.Queue[Piece], reply: Reply) -> Response:
    text, last = "", None
    try:
        async for last in _pieces(work, pieces, request.receive):
            text += last.text
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    if last is None or last.finish == "error":
        raise RequestError("the model failed on this request; see the server's log", status=500)
    return JSONResponse(reply.whole(text, last))


class _Stream(Response):
    """An answer as server-sent events."""

    def __init__(self, work: Work, pieces: asyncio.Queue[Piece], reply: Reply, *, usage: bool, idle: float) -> None:
        # without a length, which Starlette would give for the empty body that it sees
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._work, self._pieces, self._reply, self._usage, self._idle = work, pieces, reply, usage, idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come; a client that hangs up, or stops reading, gives its place back."""

        async def put(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._idle):
                await send(message)

        with suppress(ClientDisconnect, TimeoutError, OSError):
            try:
                await put({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for event in self._events(receive):
                    await put({"type": "http.response.body", "body": event, "more_body": True})
                await put({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                self._work.cancel()

    async def _events(self, receive: Receive) -> AsyncIterator[bytes]:
        if (opening := self._reply.opening()) is not None:
            yield _event(opening)
        async for piece in _pieces(self._work, self._pieces, receive):
            if piece.finish == "error":
                yield _event(RequestError("the model failed on this request", status=500).body())
            else:
                yield _event(self._reply.chunk(piece))
                if piece.finish is not None and self._usage:
                    yield _event(self._reply.closing(piece))
        yield b"data: [DONE]\n\n"


def _event(value: object) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


# --- listening -------------------------------------------------------------------------------------------------------


class _Impatient(H11Protocol):
    """Closes connections on which no request comes; uvicorn itself waits for the first one for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(self.timeout_keep_alive, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on loopback; port 0 is any free one.

    Raises:
        ConfigError: the host is another one.
        RunError: the port cannot be had.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"--host {host}: only loopback is served (127.0.0.1, ::1 or localhost), as there are no users or passwords "
            "here; put a reverse proxy that has them in front"
        )
    # bound before the model is loaded: a port that is taken should not be found out an hour later
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family)
    except (OSError, OverflowError) as error:
        raise RunError(f"--port {port} of {host} cannot be used ({error}); choose another") from error


def uvicorn_server(server: Server, limits: Limits) -> uvicorn.Server:
    """Return what runs the interface; `run(sockets=...)` returns when it is told to stop."""
    config = uvicorn.Config(
        server.app,
        http=_Impatient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(limits.idle),
        timeout_graceful_shutdown=5,
        limit_concurrency=1024,
    )
    return uvicorn.Server(config)
