"""Plain frames around a prompt: a story, a role, politeness, another language, a conversation that leads to it.

An edit may keep refusing what is asked plainly and be talked round more easily than the original (arXiv 2602.06256), so
`verify` asks harmful prompts again inside of these. They are data, `wrappers.json`, and hold nothing harmful. A model
that does not read their words, as one of a made-up language, brings frames of its own in a file of the same name, or is
asked after harmless questions of the pairs. A user's own frames, in a file like ours, come beside all of these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from gtqlora.contrasts.rows import Row
from gtqlora.errors import ContrastError, ModelError
from gtqlora.families.files import WRAPPERS, has, read_json, small_files
from gtqlora.judging.judge import Message, Messages
from gtqlora.storage.contents import KINDS, first_line, in_json, json_object, sha256_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILT_IN = Path(__file__).with_name(WRAPPERS)
_PLACE = "{prompt}"
_ROWS = 3
OWN = "own: "
"""What the names of a user's own frames begin with in records, so that nobody takes them for ours."""
_MOST, _LONGEST_NAME, _LARGEST = 32, 40, 2**20
"""Frames of a user's file, characters of a frame's name, and bytes of the file, at most."""


@dataclass(frozen=True)
class Wrapper:
    """A frame.

    Attributes:
        turns: messages from the user to the user, the last of which holds the place of the prompt.

    Raises:
        ValueError: they do not, or nothing is put around the prompt.
    """

    name: str
    turns: Messages

    def __post_init__(self) -> None:
        places = [turn["content"].count(_PLACE) for turn in self.turns]
        roles = [turn["role"] for turn in self.turns]
        if places != [0] * (len(places) - 1) + [1] or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            raise ValueError(f"{self.name!r} must go from the user to the user, and hold {_PLACE} once, at the end")
        if "".join(turn["content"] for turn in self.turns).strip() == _PLACE:
            raise ValueError(f"{self.name!r} puts nothing around the prompt")

    @property
    def turns_json(self) -> str:
        """Return its messages as JSON, which tells whether two frames are the same."""
        return json.dumps(self.turns)

    def around(self, prompt: Messages) -> Messages:
        """Return a prompt with the frame around its last message, which is the user's."""
        *before, asked = prompt
        *lead_in, last = self.turns
        # not `format`: what is asked may hold braces
        content = last["content"].replace(_PLACE, asked["content"].strip())
        return (*before, *lead_in, {"role": "user", "content": content})


@dataclass(frozen=True)
class OwnWrappers:
    """A user's own frames, and the SHA-256 of the file that they stand in."""

    wrappers: tuple[Wrapper, ...]
    fingerprint: str


def read_own(file: str) -> OwnWrappers:
    """Return the frames of a user's own file, which has the form of `wrappers.json`.

    Raises:
        ContrastError: it cannot be read, or holds something else, two frames of one name, or one that is ours.
    """
    data = _bytes(Path(file))
    try:
        found = _wrappers(json_object(data.decode()))
        _check_own(found)
    except (ValueError, RecursionError) as error:
        raise ContrastError(f"wrappers = {file!r}: no frames ({_problem(error)}); write {_FORM}") from error
    named = tuple(replace(wrapper, name=f"{OWN}{wrapper.name}") for wrapper in found)
    return OwnWrappers(named, sha256_bytes(data))


def _problem(error: ValueError | RecursionError) -> str:
    """Return what is wrong with a file in the words of JSON."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return f"not valid JSON: {error}" if isinstance(error, JSONDecodeError) else first_line(error)


_FORM = '{"wrappers": [{"name": "...", "turns": [{"role": "user", "content": "... {prompt}"}]}]}'


def _bytes(path: Path) -> bytes:
    try:
        # a device or a pipe would never end
        if not path.is_file() or path.stat().st_size > _LARGEST:
            what = f"larger than {_LARGEST >> 20} MiB" if path.is_file() else "no such file"
            raise ContrastError(f"wrappers = {str(path)!r}: {what}; give a JSON file: {_FORM}")
        return path.read_bytes()
    except OSError as error:
        raise ContrastError(f"wrappers = {str(path)!r}: cannot be read ({error.strerror})") from error


def _check_own(wrappers: Sequence[Wrapper]) -> None:
    """Check a user's frames beyond what each of them checks itself.

    Raises:
        ValueError: there is none or there are too many, a name cannot be shown, or a frame is there twice or ours.
    """
    if not 0 < len(wrappers) <= _MOST:
        raise ValueError(f"{len(wrappers)} frames; there must be 1 to {_MOST}")
    seen = {wrapper.turns_json: f"ours, {wrapper.name!r}" for wrapper in _read(_BUILT_IN)}
    for number, wrapper in enumerate(wrappers, start=1):
        if not wrapper.name.strip() or len(wrapper.name) > _LONGEST_NAME or not wrapper.name.isprintable():
            raise ValueError(f"frame {number}: its name must be 1 to {_LONGEST_NAME} characters that can be shown")
        if wrapper.name in seen.values() or wrapper.turns_json in seen:
            raise ValueError(f"frame {wrapper.name!r} is there twice, or is {seen.get(wrapper.turns_json)}")
        seen[wrapper.turns_json] = wrapper.name


def wrappers_for(
    model: str, tokenizer: PreTrainedTokenizerBase, harmless: Sequence[Row] = (), own: Sequence[Wrapper] = ()
) -> tuple[Wrapper, ...]:
    """Return the frames that a model can read: ours, or if its tokenizer has no words for them those of its folder.

    Args:
        harmless: benign rows, which make frames of a model that has no others.
        own: the user's, which are asked beside them.

    Raises:
        ModelError: the folder's file holds something else.
        ContrastError: the tokenizer has no words for a frame of the user's.
    """
    readable = _readable(tokenizer, own)
    if unread := [wrapper.name for wrapper in own if wrapper not in readable]:
        raise ContrastError(f"wrappers: {model} has no words for {', '.join(unread)}; write them as its users would")
    return (*_of_model(model, tokenizer, harmless), *own)


def _of_model(model: str, tokenizer: PreTrainedTokenizerBase, harmless: Sequence[Row]) -> tuple[Wrapper, ...]:
    if ours := _readable(tokenizer, _read(_BUILT_IN)):
        return ours
    folder = small_files(model)
    theirs = _readable(tokenizer, _read(folder / WRAPPERS)) if has(folder, WRAPPERS) else ()
    return theirs or _readable(tokenizer, _of_rows(harmless))


def _of_rows(rows: Sequence[Row]) -> list[Wrapper]:
    """Return harmless questions as frames: before a prompt, and with their answers as conversations that lead to it."""
    found = []
    for number, row in enumerate(rows[:_ROWS], start=1):
        asked, place = row.prompt[-1], {"role": "user", "content": _PLACE}
        if _PLACE in asked["content"] + row.chosen:
            continue
        before = {"role": "user", "content": f"{asked['content']} {_PLACE}"}
        said = {"role": "assistant", "content": row.chosen}
        found += [Wrapper(f"after question {number}", (before,)), Wrapper(f"lead-in {number}", (asked, said, place))]
    return found


def _readable(tokenizer: PreTrainedTokenizerBase, wrappers: Iterable[Wrapper]) -> tuple[Wrapper, ...]:
    return tuple(each for each in wrappers if all(_reads(tokenizer, turn["content"]) for turn in each.turns))


def _reads(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    unknown = tokenizer.unk_token_id
    return unknown is None or unknown not in tokenizer.encode(text.replace(_PLACE, ""), add_special_tokens=False)


def _wrappers(value: Mapping[str, object]) -> list[Wrapper]:
    """Return the frames in the JSON of a file.

    Raises:
        ValueError: there are none; the message says where something else stands.
    """
    return [_wrapper(one, f"wrappers[{i}]") for i, one in enumerate(_list(value.get("wrappers"), "wrappers"))]


def _wrapper(value: object, place: str) -> Wrapper:
    turns = enumerate(_list(_field(value, "turns", place), f"{place}.turns"))
    return Wrapper(_text(value, "name", place), tuple(_turn(turn, f"{place}.turns[{i}]") for i, turn in turns))


def _turn(value: object, place: str) -> Message:
    return {"role": _text(value, "role", place), "content": _text(value, "content", place)}


def _text(value: object, key: str, place: str) -> str:
    found = _field(value, key, place)
    return found if isinstance(found, str) else _mismatch(found, f"{place}.{key}", str)


def _field(value: object, key: str, place: str) -> object:
    if not isinstance(value, Mapping):
        _mismatch(value, place, dict)
    return cast("Mapping[str, object]", value).get(key)


def _list(value: object, place: str) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else _mismatch(value, place, list)


def _mismatch(value: object, place: str, wanted: type) -> NoReturn:
    raise ValueError(f"{place!r} is {'missing' if value is None else in_json(value)}; it must be {KINDS[wanted]}")


def _read(file: Path) -> list[Wrapper]:
    try:
        return _wrappers(read_json(file))
    except ValueError as error:
        raise ModelError(f"{file}: no frames ({error})") from error
