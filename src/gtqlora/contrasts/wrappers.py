"""Plain frames around a prompt: a story, a role, politeness, another language, a conversation that leads to it.

An edit may keep refusing what is asked plainly and be talked round more easily than the original (arXiv 2602.06256), so
`verify` asks harmful prompts again inside of these. They are data, `wrappers.json`, and hold nothing harmful. A model
that does not read their words, as one of a made-up language, brings frames of its own in a file of the same name, or is
asked after harmless questions of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from gtqlora.contrasts.rows import Row
from gtqlora.errors import ModelError
from gtqlora.families.files import WRAPPERS, has, read_json, small_files
from gtqlora.judging.judge import Message, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILT_IN = Path(__file__).with_name(WRAPPERS)
_PLACE = "{prompt}"
_ROWS = 3


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

    def around(self, prompt: Messages) -> Messages:
        """Return a prompt with the frame around its last message, which is the user's."""
        *before, asked = prompt
        *lead_in, last = self.turns
        # not `format`: what is asked may hold braces
        content = last["content"].replace(_PLACE, asked["content"].strip())
        return (*before, *lead_in, {"role": "user", "content": content})


def wrappers_for(model: str, tokenizer: PreTrainedTokenizerBase, harmless: Sequence[Row] = ()) -> tuple[Wrapper, ...]:
    """Return the frames that a model can read: ours, or if its tokenizer has no words for them those of its folder.

    Args:
        harmless: benign rows, which make frames of a model that has no others.

    Raises:
        ModelError: the folder's file holds something else.
    """
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


def _read(file: Path) -> list[Wrapper]:
    try:
        found = cast("list[Mapping[str, list[Message]]]", read_json(file)["wrappers"])
        return [
            Wrapper(str(one["name"]), tuple({"role": m["role"], "content": str(m["content"])} for m in one["turns"]))
            for one in found
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: not a list of wrappers ({type(error).__name__}: {error})") from error
