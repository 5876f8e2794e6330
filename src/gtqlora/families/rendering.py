"""The chat template of an untrusted model, rendered under limits of time, memory and length."""

from __future__ import annotations

import atexit
import difflib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NotRequired, TypedDict

from transformers import PreTrainedTokenizerBase

from gtqlora.config.values import Scalar, is_variable
from gtqlora.errors import ConfigError, ModelError, TemplateRefusal
from gtqlora.families.files import first_line
from gtqlora.progress import note

SECONDS = 5.0
"""Limit of processor time for one rendering; an ordinary template takes less than 0.001."""
SECONDS_EACH = 0.05
"""Limit of the average processor time of a template's renderings: thousands of rows are rendered several times each."""
_WAIT = 60.0
"""Seconds by the clock after which the renderer is lost; on a busy machine processor time takes longer."""
# Bytes beyond what the renderer has mapped when it starts.
_MEMORY = 2**29
_CHARACTERS, _TIMES = 50_000, 10
"""A rendering may hold this many characters, and so many times those of its messages."""
_TEXTS, _LONGEST = 40_000, 5_000
"""So many renderings are remembered, of so many characters each at most."""
_VARIABLES = "gtqlora_template_variables"
"""The attribute of a tokenizer that holds the variables of its template: where the template goes, they go."""
_WORKER = Path(__file__).with_name("render_worker.py")


class Request(TypedDict):
    """What the renderer is asked for.

    `generation` asks for the prompt up to where the answer begins; `variables` are the special tokens and the settings
    by name; `characters` is the largest length of the text. Without messages it is asked which variables are read.
    """

    template: str
    messages: list[dict[str, str]] | None
    generation: bool
    variables: dict[str, Scalar]
    characters: int


class Reply(TypedDict):
    """What the renderer says: a text, or why the template refused (its own error) or failed (any other one).

    `reads` are the variables that the template reads, in alphabetical order, and `switches` those of them of which it
    only asks whether they are true.
    """

    seconds: float
    text: NotRequired[str]
    reads: NotRequired[list[str]]
    switches: NotRequired[list[str]]
    refused: NotRequired[str]
    failed: NotRequired[str]


class _Lost(Exception):
    """The renderer died or does not answer."""


class _Renderer:
    """The process that renders, started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Return the process, started if there is none."""
        if self._process is None:
            # Relative entries would mean other folders, as the process runs in another one. The empty entry is the
            # current folder, whose modules may be a stranger's.
            paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", str(_WORKER), str(SECONDS), str(_MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us; it ends when its input does
            )
        return self._process

    def warm_up(self) -> None:
        """Start the process, and do not wait until it is ready."""
        with self._lock:
            self.start()

    def ask(self, request: Request) -> Reply:
        """Return the renderer's reply.

        Raises:
            _Lost: it died over the request; the next request starts another renderer.
        """
        with self._lock:
            process = self.start()
            assert process.stdin is not None and process.stdout is not None
            try:
                data = json.dumps(request).encode()
                process.stdin.write(len(data).to_bytes(4, "big") + data)
                process.stdin.flush()
                return json.loads(_received(process.stdout, int.from_bytes(_received(process.stdout, 4), "big")))
            except (_Lost, OSError) as error:
                raise _Lost(self._ended()) from error
            except BaseException:  # an interrupt leaves half an answer in the pipe
                self._ended()
                raise

    def _ended(self) -> str:
        """Stop the process, and return why it stopped answering."""
        process, self._process = self._process, None
        assert process is not None
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        # SIGPROF: its own timer ended it. SIGKILL: it was still running, and we did so just now.
        slow = code in (-signal.SIGPROF, -signal.SIGKILL)
        return f"takes longer than {SECONDS:g} s to render" if slow else "crashes its renderer"

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()


def _received(source: IO[bytes], size: int) -> bytes:
    # Not `source.read`, which would wait without a limit for a process that hangs.
    data = b""
    while len(data) < size:
        if not select.select([source], [], [], _WAIT)[0]:
            raise _Lost
        part = os.read(source.fileno(), size - len(data))
        if not part:
            raise _Lost
        data += part
    return data


_renderer = _Renderer()
# The renderer leads a session of its own, so that nobody else ends it.
atexit.register(_renderer.close)
# A forked child must share neither its parent's process, whose answers it would take, nor a lock that a thread holds.
os.register_at_fork(after_in_child=_renderer.__init__)
_spent: dict[str, tuple[int, float]] = {}
"""Renderings by template, and their processor time."""
_reads: dict[str, Reply] = {}
"""What was said of the variables that a template reads."""
_texts: dict[bytes, str] = {}
"""Renderings by the hash of what was asked for: a stage renders each prompt a dozen times, and they must not differ."""


def warm_up() -> None:
    """Start the renderer, which takes a second, while something else is done."""
    if not _texts:  # else there was one, or what it said is known
        _renderer.warm_up()


def with_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Scalar]) -> PreTrainedTokenizerBase:
    """Return the tokenizer, whose chat template is rendered with these variables from now on.

    A variable that the template never reads is a note, as it changes nothing.

    Raises:
        ConfigError: a variable is one of the tokenizer's special tokens, the template reads one of nearly that name, or
            it is a text where the template asks for true or false.
        ModelError: the template cannot be parsed.
    """
    if variables:
        known, switches = reads(tokenizer), _read(tokenizer).get("switches", [])
        for name, value in variables.items():
            _check_read(name, known, tokenizer)
            if name in switches and isinstance(value, str):
                raise ConfigError(
                    f"template.{name} = {value!r}: the chat template asks only whether it is true, and a text is not "
                    f"false; write {name} = false, without quotes, or true"
                )
        setattr(tokenizer, _VARIABLES, dict(variables))
    return tokenizer


def _check_read(name: str, known: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    if name in tokenizer.special_tokens_map:
        raise ConfigError(f"template.{name}: a special token of the tokenizer is no setting; leave it out")
    if name in known:
        return
    # A misspelt switch would leave thinking on, and nobody would see it.
    if close := difflib.get_close_matches(name, known, n=1):
        raise ConfigError(f"template.{name}: the chat template reads no such variable; did you mean {close[0]!r}?")
    note(
        f"template.{name} changes nothing: the chat template does not read it; "
        + (f"it reads {', '.join(known)}" if known else "it reads no variables but the messages")
    )


def reads(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the variables that the tokenizer's chat template reads and that settings can give.

    Raises:
        ModelError: the template cannot be parsed.
    """
    reply = _read(tokenizer)
    return tuple(name for name in reply.get("reads", []) if _is_setting(name, tokenizer))


def _is_setting(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return is_variable(name) and name not in tokenizer.special_tokens_map


def _read(tokenizer: PreTrainedTokenizerBase) -> Reply:
    template = _template(tokenizer)
    if template not in _reads:
        _reads[template] = _reply(tokenizer, _request(tokenizer, None, generation=False))
    return _reads[template]


def variables_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Scalar]:
    """Return the variables that its chat template is rendered with; see `with_variables`."""
    return getattr(tokenizer, _VARIABLES, {})


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, generation: bool) -> str:
    """Return what the tokenizer's chat template makes of the messages.

    Raises:
        TemplateRefusal: it refuses these messages, e.g. a system role it does not know.
        ModelError: it fails, takes too long, or renders nothing or too much.
    """
    request = _request(tokenizer, messages, generation=generation)
    asked = hashlib.sha256(json.dumps(request).encode()).digest()
    text = _texts.get(asked)
    if text is None:
        text = _rendered(tokenizer, request)
        if len(text) <= _LONGEST:
            if len(_texts) >= _TEXTS:
                _texts.clear()  # another thread's text may be among them
            _texts[asked] = text
    return text


def _request(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]] | None, *, generation: bool
) -> Request:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "template": _template(tokenizer),
        "messages": None if messages is None else [dict(message) for message in messages],
        "generation": generation,
        "variables": {**special, **variables_of(tokenizer)},
        "characters": _CHARACTERS + _TIMES * sum(len(message["content"]) for message in messages or ()),
    }


def _rendered(tokenizer: PreTrainedTokenizerBase, request: Request) -> str:
    text = _reply(tokenizer, request).get("text", "")
    if not text.strip():
        raise _fault(tokenizer, "renders nothing")
    return text


def _reply(tokenizer: PreTrainedTokenizerBase, request: Request) -> Reply:
    try:
        reply = _renderer.ask(request)
    except _Lost as error:
        raise _fault(tokenizer, str(error)) from error
    _account(tokenizer, request["template"], reply["seconds"])
    if "refused" in reply:
        raise TemplateRefusal(first_line(reply["refused"]))
    if "failed" in reply:
        raise _fault(tokenizer, f"fails ({first_line(reply['failed'])})")
    return reply


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except (ValueError, TypeError, AttributeError) as error:
        raise _fault(tokenizer, f"cannot be used ({first_line(error)})") from error


def _account(tokenizer: PreTrainedTokenizerBase, template: str, seconds: float) -> None:
    count, spent = _spent.get(template, (0, 0.0))
    _spent[template] = count, spent = count + 1, spent + seconds
    if spent > SECONDS + SECONDS_EACH * count:
        raise _fault(tokenizer, f"takes {spent / count:.2f} s for one rendering")


def _fault(tokenizer: PreTrainedTokenizerBase, what: str) -> ModelError:
    where = tokenizer.name_or_path or "the tokenizer"
    return ModelError(f"{where}: the chat template {what}; mend the model's chat template")
