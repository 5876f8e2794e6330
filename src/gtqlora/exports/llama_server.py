"""llama.cpp in a process of its own, which serves one GGUF on the loopback to whoever has the key.

If it crashes, or is killed, that is one line of error here.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NotRequired, TypedDict, TypeVar
from urllib.parse import urlsplit

import torch

from gtqlora.errors import RunError
from gtqlora.progress import track

T = TypeVar("T")

_WORKER = Path(__file__).with_name("llama_worker.py")
_SLOTS = 4
"""Prompts that llama.cpp decodes together."""
_SECONDS = 900.0
"""For one answer; after that llama.cpp is taken to hang."""
_ERROR = re.compile(r"(?:[\d.]+ E )?(.*(?:GGML_ASSERT|terminate called|what\(\):).*|(?<=E ).*)")
_SHOWN = 300
"""Characters of llama.cpp's message that are shown."""


class Settings(TypedDict):
    """What the worker is started with: paths, the key that clients must show, and how much runs at once."""

    model: str
    adapters: list[str]
    key: str
    slots: int
    context: int
    threads: int


class Scale(TypedDict):
    """An adapter, by its number from 0, and how much of it is added."""

    id: int
    scale: float


class Request(TypedDict):
    """A prompt in tokens, and how it is to be completed.

    `n_probs` is of how many tokens the log-probability is wanted beside the chosen one's; `grammar` forces tokens;
    `lora` gives each adapter, by its number, a scale for this request, which is 1 otherwise.
    """

    prompt: list[int]
    n_predict: int
    n_probs: NotRequired[int]
    grammar: NotRequired[str]
    lora: NotRequired[list[Scale]]


class Candidate(TypedDict):
    """A token and its log-probability in nats; None stands for what JSON cannot hold, such as NaN."""

    id: int
    logprob: float | None


class Token(Candidate):
    """A token that was chosen, and the likeliest ones in its place."""

    top_logprobs: list[Candidate]


class Reply(TypedDict):
    """What llama.cpp says of a completion.

    `stop_type` is "eos" if it ended by itself; `completion_probabilities` are there if they were asked for.
    """

    tokens: list[int]
    stop_type: str
    truncated: bool
    completion_probabilities: list[Token]


class _Tokens(TypedDict):
    tokens: list[int]


# Greedy whatever a GGUF recommends in its own metadata, and from nothing but the given tokens.
_GREEDY: Mapping[str, object] = {
    "samplers": ["top_k"],
    "top_k": 1,
    "temperature": 0.0,
    "return_tokens": True,
    "cache_prompt": False,
}


def require_llama_cpp() -> None:
    """Check that llama.cpp can be run here.

    Raises:
        RunError: the package is missing.
    """
    if find_spec("xllamacpp") is None:
        raise RunError("llama.cpp is not installed here; pip install 'gtqlora[gguf]'")


class Server:
    """One GGUF, maybe with adapters, loaded by llama.cpp; `serving` makes one.

    Args:
        model: the file, or the first one of a split GGUF.
        process: the worker, whose messages go to `log`.
        key: what it asks its clients for.
    """

    def __init__(self, model: Path, process: subprocess.Popen[bytes], log: IO[bytes], key: str) -> None:
        self.model, self.key, self._process, self._log = model, key, process, log
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().decode().strip())
        if not address.hostname or not address.port:
            raise self._lost(loading=True)
        self._host, self._port = address.hostname, address.port

    @property
    def pid(self) -> int:
        """Return the process that llama.cpp runs in."""
        return self._process.pid

    def complete(self, requests: Sequence[Request], label: str | None = None) -> list[Reply]:
        """Return greedy completions, some of them running together.

        Args:
            label: shown as progress.

        Raises:
            RunError: llama.cpp refuses a prompt, or died.
        """
        with ThreadPoolExecutor(_SLOTS) as pool:
            replies = pool.map(self._complete, requests)
            return list(replies if label is None else track(replies, label, len(requests)))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids that the file's own tokenizer gives for these texts, special tokens among them."""
        return [self._post("/tokenize", {"content": text, "parse_special": True}, _Tokens)["tokens"] for text in texts]

    def _complete(self, request: Request) -> Reply:
        reply = self._post("/completion", {**_GREEDY, **request}, Reply)
        if reply["truncated"]:
            raise RunError(
                f"{self.model}: its context is too short for {len(request['prompt'])} tokens and "
                f"{request['n_predict']} more; take a GGUF with the model's own context length"
            )
        return reply

    def _post(self, path: str, body: Mapping[str, object], kind: type[T]) -> T:
        """Return llama.cpp's answer, which is of this kind."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_SECONDS)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            found = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._lost(loading=False) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RunError(f"{self.model}: llama.cpp refuses a prompt ({found['error']['message'][:_SHOWN]})")
        return found

    def _lost(self, *, loading: bool) -> RunError:
        """Return the error for a process that ended or hangs, with llama.cpp's own words."""
        what = "does not load it" if loading else "stopped in the middle"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return RunError(f"{self.model}: llama.cpp does not answer; try again on a machine that is less busy")
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines()]
        errors = [match[1] for line in lines if (match := _ERROR.match(line))]
        # In loading the first error is the cause and the others follow from it.
        why = errors[0 if loading else -1][:_SHOWN] if errors else f"it ended with code {code}"
        if code == -9:
            why = "it was killed, as by the system when memory runs out"
        return RunError(f"{self.model}: llama.cpp {what} ({why})")


@contextmanager
def serving(model: Path, *, adapters: Sequence[Path] = (), context: int) -> Iterator[Server]:
    """Load a GGUF in llama.cpp for the time of a `with` block.

    Args:
        context: tokens of the longest prompt with its completion.

    Raises:
        RunError: the package is missing, or llama.cpp does not load the file; its own message is in ours.
    """
    require_llama_cpp()
    key = secrets.token_hex()
    settings: Settings = {
        "model": str(model.absolute()),
        "adapters": [str(adapter.absolute()) for adapter in adapters],
        "key": key,
        "slots": _SLOTS,
        "context": context,
        "threads": torch.get_num_threads(),
    }
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # Ctrl-C is for us; it ends when its input does
        ) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            yield Server(model, process, log, key)
        finally:
            process.kill()
