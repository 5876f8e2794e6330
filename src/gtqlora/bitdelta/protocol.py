"""OpenAI's requests and replies: what is asked is read strictly, and what cannot be done is an error, never ignored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from gtqlora.bitdelta.engine import Piece
from gtqlora.bitdelta.sampling import Sampling
from gtqlora.errors import GtqloraError
from gtqlora.judging.judge import Message
from gtqlora.storage.contents import KINDS

Kind = Literal["chat", "text"]
T = TypeVar("T")

_DEFAULT_TOKENS = 512
_MOST_STOPS, _LONGEST_STOP = 4, 200
_ROLES = ("system", "developer", "user", "assistant")
# What asks for nothing may be there; clients send such keys by themselves.
_NOTHING: dict[str, tuple[object, ...]] = {
    **{"n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "top_logprobs": (0,)},
    **{"logprobs": (False,), "echo": (False,), "suffix": ("",), "logit_bias": ({},), "tools": ([],)},
    **{"tool_choice": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],)},
}
_IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
_KNOWN = {"model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens"}
_OWN: dict[Kind, set[str]] = {"chat": {"messages", "max_completion_tokens"}, "text": {"prompt"}}


class RequestError(GtqloraError):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        parameter: the key at fault.
    """

    def __init__(
        self, message: str, *, status: int = 400, parameter: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.parameter, self.code = status, parameter, code

    def body(self) -> dict[str, object]:
        """Return what the client is told."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompt: a text to go on with, or the messages of a conversation.
        any_length: whether it leaves open how long the answer may be; `sampling` then says what is usual.
    """

    model: str
    prompt: str | Sequence[Message]
    sampling: Sampling
    any_length: bool
    stream: bool
    usage_in_stream: bool


def read(body: bytes, kind: Kind, *, max_tokens: int) -> Asked:
    """Return what a request's body asks for.

    Args:
        max_tokens: that any answer may have.

    Raises:
        RequestError: it is no JSON object, or asks for what is not done here.
    """
    given = _Given(_object(body))
    given.check_keys(kind)
    options = given.get("stream_options", dict, {})
    stream = given.get("stream", bool, False)
    return Asked(
        model=given.required("model", str),
        prompt=given.messages() if kind == "chat" else given.required("prompt", str),
        sampling=_sampling(given, max_tokens),
        any_length=given.values.keys().isdisjoint({"max_tokens", "max_completion_tokens"}),
        stream=stream,
        usage_in_stream=stream and options.get("include_usage") is True,
    )


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    # clients send null for what they leave to the server
    return {key: each for key, each in value.items() if each is not None}


def _sampling(given: _Given, most: int) -> Sampling:
    asked = given.number(
        "max_completion_tokens", given.number("max_tokens", min(_DEFAULT_TOKENS, most), 1, most), 1, most
    )
    seed = given.get("seed", int, None)
    return Sampling(
        max_tokens=int(asked),
        temperature=given.number("temperature", 0.0, 0.0, 2.0),
        top_p=given.number("top_p", 1.0, 0.0, 1.0),
        seed=None if seed is None else seed % 2**63,
        stop=given.stops(),
    )


@dataclass(frozen=True)
class _Given:
    """The keys of a request."""

    values: Mapping[str, object] = field(default_factory=dict[str, object])

    def check_keys(self, kind: Kind) -> None:
        """Refuse keys that ask for what is not done here."""
        for key in self.values.keys() - _KNOWN - _OWN[kind] - _IGNORED:
            if key not in _NOTHING:
                raise RequestError(f"{key!a} is not known here; leave it out", parameter=key)
            if self.values[key] not in _NOTHING[key]:
                raise RequestError(f"{key} is not supported here; leave it out", parameter=key)

    def get(self, key: str, kind: type[T], default: T | None) -> T:
        """Return a key's value, which must be of a type."""
        value = self.values.get(key, default)
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise RequestError(f"{key} must be {KINDS[kind]}", parameter=key)
        return value  # type: ignore[return-value]

    def required(self, key: str, kind: type[T]) -> T:
        """Return the value of a key that must be there."""
        if key not in self.values:
            raise RequestError(f"{key} is missing", parameter=key)
        return self.get(key, kind, None)

    def number(self, key: str, default: float, least: float, most: float) -> float:
        """Return a number inside its bounds."""
        value = self.values.get(key, default)
        kinds = int if isinstance(default, int) else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise RequestError(f"{key} must be a number from {least:g} to {most:g}", parameter=key)
        return value

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        value = self.values.get("stop", [])
        found = [value] if isinstance(value, str) else value
        texts = isinstance(found, list) and all(
            isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in found
        )
        if not isinstance(found, list) or not texts or len(found) > _MOST_STOPS:
            raise RequestError(
                f"stop must be up to {_MOST_STOPS} texts of 1 to {_LONGEST_STOP} characters", parameter="stop"
            )
        return tuple(found)

    def messages(self) -> list[Message]:
        """Return the messages of a conversation."""
        found = self.required("messages", list)
        if not found:
            raise RequestError("messages must not be empty", parameter="messages")
        return [_message(value, f"messages[{place}]") for place, value in enumerate(found)]


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise RequestError(f"{where} must be an object with a role of {', '.join(_ROLES)}", parameter=where)
    more = sorted(key for key, each in value.items() if key not in ("role", "content", "name") and each is not None)
    if more:
        raise RequestError(f"{where}.{more[0]} is not supported here; leave it out", parameter=where)
    # OpenAI's newer name for it; templates of open models know the older one
    role = "system" if value["role"] == "developer" else value["role"]
    return {"role": role, "content": _content(value.get("content"), f"{where}.content")}


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"{where} must be a text, or a list of parts of type text", parameter=where)
    return "".join(map(str, texts))


# --- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Makes the objects of one answer."""

    kind: Kind
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, last: Piece) -> dict[str, object]:
        """Return the whole answer."""
        said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._object(name, {**said, "finish_reason": last.finish}), "usage": self.usage(last)}

    def opening(self) -> dict[str, object] | None:
        """Return what a stream begins with."""
        if self.kind == "text":
            return None
        return self._object(
            "chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        )

    def chunk(self, piece: Piece) -> dict[str, object]:
        """Return one piece of a stream."""
        if self.kind == "text":
            return self._object("text_completion", {"text": piece.text, "finish_reason": piece.finish})
        delta = {"content": piece.text} if piece.text else {}
        return self._object("chat.completion.chunk", {"delta": delta, "finish_reason": piece.finish})

    def closing(self, last: Piece) -> dict[str, object]:
        """Return the counts at the end of a stream, where they were asked for."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._object(name, None), "usage": self.usage(last)}

    def usage(self, last: Piece) -> dict[str, int]:
        """Return how many tokens there were."""
        total = self.prompt_tokens + last.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": last.tokens, "total_tokens": total}

    def _object(self, name: str, choice: dict[str, object] | None) -> dict[str, object]:
        choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        about = {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model}
        return {**about, "choices": choices}
