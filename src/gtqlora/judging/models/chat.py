"""`chat:URL#MODEL`: a chat model behind a server that speaks OpenAI's protocol, with a written rubric.

The rubric is `rubric.txt` beside this module. Prompts and answers are material between marks that they cannot hold, and
a reply that is not exactly one label is undecided. A key is read from the environment and never recorded. Plain HTTP is
for this machine only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from urllib.parse import SplitResult

from gtqlora.config.addresses import can_be_read, holds_key, http_address
from gtqlora.errors import JudgeError
from gtqlora.judging.labels import UNDECIDED, Judgement, label_named
from gtqlora.judging.messages import Messages, as_text
from gtqlora.judging.thoughts import final
from gtqlora.posting import PAUSES, Endpoint, Unserved
from gtqlora.storage.contents import sha256_bytes

KEY = "GTQLORA_JUDGE_KEY"
"""The environment variable that holds the server's key, where it wants one."""
SECONDS = 120.0
"""Longest wait for a reply: a model on a CPU that is asked several times at once takes a minute."""
_AT_ONCE = 4
_NEW_TOKENS = 16
_PATH = "/chat/completions"


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
    pauses: Sequence[float] = PAUSES

    @property
    def digest(self) -> str:
        """Return which rubric judges; what stands behind a server cannot be known."""
        return f"rubric:{sha256_bytes(rubric().encode())[:16]}"

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
        return read_reply(self._replied(asked))

    def _replied(self, asked: Mapping[str, object]) -> str:
        endpoint = Endpoint(self.address, KEY, SECONDS, self.pauses)
        try:
            data = endpoint.post(asked)
        except Unserved as error:
            advice = None if error.status is None else _ADVICE.get(error.status, "is it an OpenAI-compatible server?")
            raise self._fault(f"{error} {advice}" if advice else str(error)) from error
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
    address = http_address(url)
    if address is None:
        raise JudgeError(name, "no address; write chat:http://127.0.0.1:8080 or chat:https://HOST/v1#MODEL")
    if holds_key(address):
        # Not with the name: it would show the key.
        raise JudgeError("chat:...", f"an address is recorded, so a key has no place in it; put it into {KEY}")
    if can_be_read(address):
        raise JudgeError(name, "plain HTTP to another machine can be read on the way; use https")
    return Chat(name, address._replace(path=_completions(address.path)), model)


def _completions(path: str) -> str:
    path = path.rstrip("/")
    if path.endswith(_PATH):
        return path
    # A bare host is llama.cpp's, vLLM's or Ollama's, all of which have it there.
    return (path or "/v1") + _PATH
