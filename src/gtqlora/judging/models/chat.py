"""`chat:URL#MODEL`: a chat model behind a server that speaks OpenAI's protocol, with a written rubric.

The rubric is `rubric.txt` beside this module. Prompts and answers are material between marks that they cannot hold, and
a reply that is not exactly one label is undecided. A key is read from the environment and never recorded. Plain HTTP is
for this machine only.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import cast
from urllib.parse import SplitResult, urlsplit

from gtqlora.config.judges import is_loopback
from gtqlora.errors import ConfigError, JudgeError
from gtqlora.judging.labels import UNDECIDED, Judgement, label_named
from gtqlora.judging.messages import Messages, as_text
from gtqlora.judging.thoughts import final
from gtqlora.storage.contents import first_line, sha256_bytes

KEY = "GTQLORA_JUDGE_KEY"
"""The environment variable that holds the server's key, where it wants one."""
SECONDS = 120.0
"""Longest wait for a reply: a model on a CPU that is asked several times at once takes a minute."""
_AT_ONCE = 4
_PAUSES = (1.0, 4.0, 16.0)
"""Seconds before each new try, where the server is busy or fails for a moment."""
_LONGEST_PAUSE = 60.0
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_NEW_TOKENS = 16
_REPLY_BYTES = 2**20
_PATH = "/chat/completions"


class _TryAgain(Exception):
    """The server may reply if it is asked again, after so many seconds if it says so."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


@cache
def rubric() -> str:
    """Return what the judge is told."""
    return files("gtqlora.judging.models").joinpath("rubric.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class Chat:
    """A chat model behind a server as a judge.

    Attributes:
        name: the judge's.
        address: of the server's chat completions.
        model: what the server calls the model; "" where it has one only.
        pauses: seconds before each new try.
    """

    name: str
    address: SplitResult
    model: str
    pauses: Sequence[float] = _PAUSES

    @property
    def digest(self) -> str:
        """Return which rubric judges; what stands behind a server cannot be known."""
        return f"rubric:{sha256_bytes(rubric().encode())[:16]}"

    @cached_property
    def _headers(self) -> dict[str, str]:
        # Read when it is first used, so that neither the settings nor the identity can hold it.
        key = os.environ.get(KEY, "").strip()
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{KEY}: holds characters that no key has")
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Judgement]:
        """Ask the server about every answer, a few at once.

        Raises:
            JudgeError: the server is not there, refuses, or does not speak the protocol.
        """
        # A few at once keep a server's batch filled; more would wait in its queue until they time out.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                return list(pool.map(self._judged, prompts, answers))
            except BaseException:  # the answers that wait need not be sent to a server that failed
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _judged(self, prompt: Messages, answer: str) -> Judgement:
        asked: dict[str, object] = {
            "messages": [
                {"role": "system", "content": rubric()},
                {"role": "user", "content": question(prompt, answer)},
            ],
            "temperature": 0,
            "max_tokens": _NEW_TOKENS,
        }
        # A server with one model may refuse the name of another, so that none is better than a wrong one.
        if self.model:
            asked["model"] = self.model
        return read_reply(self._replied(json.dumps(asked).encode()))

    def _replied(self, body: bytes) -> str:
        for pause in (*self.pauses, None):
            try:
                return self._content(self._posted(body))
            except _TryAgain as error:
                if pause is None:
                    raise self._fault(f"{error}, {len(self.pauses) + 1} times; try again later") from error
                time.sleep(min(pause if error.seconds is None else error.seconds, _LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    def _posted(self, body: bytes) -> bytes:
        """Return the body of the server's reply; redirections are none, as they might lead elsewhere."""
        # Not urllib: it follows redirections with the key, and asks proxies that the environment names.
        kind = http.client.HTTPSConnection if self.address.scheme == "https" else http.client.HTTPConnection
        connection = kind(cast(str, self.address.hostname), self.address.port, timeout=SECONDS)
        try:
            connection.request("POST", self.address.path, body, self._headers)
            reply = connection.getresponse()
            data = reply.read(_REPLY_BYTES + 1)
        except (ConnectionRefusedError, OSError, http.client.HTTPException) as error:
            raise self._broken(error) from error
        finally:
            connection.close()
        if reply.status in _BUSY:
            # Seconds, or a date, which servers of models do not send.
            told = reply.getheader("Retry-After", "")
            raise _TryAgain(f"HTTP {reply.status}", float(told) if told.isdigit() else None)
        if reply.status != 200:
            raise self._fault(f"HTTP {reply.status} {_ADVICE.get(reply.status, 'is it an OpenAI-compatible server?')}")
        if len(data) > _REPLY_BYTES:
            raise self._fault("its reply is longer than 1 MiB")
        return data

    def _broken(self, error: Exception) -> Exception:
        if isinstance(error, ConnectionRefusedError):
            return self._fault("nothing listens there; start the server, or correct the address")
        if isinstance(error, TimeoutError):
            return _TryAgain(f"no reply within {SECONDS:g} s")
        if isinstance(error, ConnectionError | http.client.HTTPException):
            return _TryAgain(f"the connection broke ({type(error).__name__})")
        return self._fault(f"cannot be reached ({first_line(error)})")

    def _content(self, data: bytes) -> str:
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
            raise self._fault("its reply is no chat completion; is it an OpenAI-compatible server?") from error
        # A model that only thought, or called a tool, has no content, which is no fault of the protocol.
        return content if isinstance(content, str) else ""

    def _fault(self, what: str) -> JudgeError:
        # Never the server's own words: they may repeat the prompt.
        return JudgeError(self.name, what)


_ADVICE = {
    401: f"(it wants a key: put it into {KEY})",
    403: f"(it does not take the key in {KEY})",
    404: "(no such path or model: write chat:URL#MODEL)",
    400: "(it does not take the request; does it want a model? write chat:URL#MODEL)",
    422: "(it does not take the request; does it want a model? write chat:URL#MODEL)",
}


def question(prompt: Messages, answer: str) -> str:
    """Return what the judge is asked: the prompt and the answer between marks that neither can hold."""
    asked = as_text(prompt)
    # Of the texts themselves: nobody can write a text that holds its own hash.
    mark = hashlib.sha256(json.dumps([asked, answer]).encode()).hexdigest()[:16]
    parts = [f"<{kind} {mark}>\n{text}\n</{kind} {mark}>" for kind, text in (("request", asked), ("answer", answer))]
    return "\n\n".join([*parts, "The label of the answer, in one word:"])


def read_reply(said: str) -> Judgement:
    """Return the label that a reply consists of, without the thought before it; whatever else it says is undecided."""
    word = (final(said) or "").strip().strip(".*\"'`").casefold()
    return Judgement(label_named(word) or UNDECIDED)


def chat(name: str) -> Chat:
    """Return the judge behind the address that a judge's name holds; nothing is asked yet.

    Raises:
        JudgeError: it is no address, plain HTTP to another machine, or one that holds a password or a key.
    """
    url, _, model = name.removeprefix("chat").removeprefix(":").partition("#")
    try:
        address = urlsplit(url)
        sound = address.scheme in ("http", "https") and address.hostname and (address.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or any(character.isspace() or not character.isprintable() for character in url):
        raise JudgeError(name, "no address; write chat:http://127.0.0.1:8080 or chat:https://HOST/v1#MODEL")
    if address.username or address.password or address.query:
        # Not with the name: it would show the key.
        raise JudgeError("chat:...", f"an address is recorded, so a key has no place in it; put it into {KEY}")
    if address.scheme == "http" and not is_loopback(url):
        raise JudgeError(name, "plain HTTP to another machine can be read on the way; use https")
    return Chat(name, address._replace(path=_completions(address.path)), model)


def _completions(path: str) -> str:
    path = path.rstrip("/")
    if path.endswith(_PATH):
        return path
    # A bare host is llama.cpp's, vLLM's or Ollama's, all of which have it there.
    return (path or "/v1") + _PATH
