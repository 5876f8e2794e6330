"""Which texts are nearly the same, and which share what they are about: plain overlap of words, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from gtqlora.contrasts.rows import Row, digest
from gtqlora.judging.folding import words
from gtqlora.judging.messages import Messages
from gtqlora.progress import track_many

_RUN = 3
_OVERLAP = 0.7
"""Share of the runs of words, of all that either of two texts has, from which on they are nearly the same."""
_COMMON = 64
"""A run of words in more texts than this says nothing of any two, and comparing all would take long."""
# Words that are in every set, whatever its prompts are about; shorter ones are not looked at.
_SHORT = 4
_EVERYWHERE = (
    "about again best between could does each explain from give good have help here into list make more most need "
    "person people should some step steps such tell that their them then there these they thing things this those "
    "using very want ways well what when where which while will with without word words would write your"
)
_STOP = frozenset(_EVERYWHERE.split())


def _runs(text: str) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(zip(*(found[i:] for i in range(_RUN)), strict=False)) or frozenset([tuple(found)])


def near_duplicates(texts: Sequence[str]) -> dict[int, int]:
    """Return for each text that is nearly the same as an earlier one the position of that one.

    A text that is nearly the same as one that is left out itself stays.
    """
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes: dict[int, int] = {}
    found: dict[int, int] = {}
    for place, own in enumerate(map(_runs, track_many(texts, "comparing prompts"))):
        held = [holders.get(run) for run in own]
        if (first := _first(held, sizes)) is not None:
            found[place] = first
            continue
        sizes[place] = len(own)
        for run, others in zip(own, held, strict=True):
            if others is None:
                holders[run] = [place]
            elif len(others) < _COMMON:
                others.append(place)
    return found


def _first(held: Sequence[list[int] | None], sizes: Mapping[int, int]) -> int | None:
    """Return the first text that one is nearly the same as.

    Args:
        held: which texts hold each of its runs; None: no text does.
        sizes: how many runs each text has.
    """
    own, known = len(held), [others for others in held if others]
    # what both have is no less than the share of one's own: mostly there is no need to look at who has the runs
    if len(known) < (least := _OVERLAP * own):
        return None
    shared = Counter(chain.from_iterable(known))
    near = [o for o, n in shared.items() if n >= least and n >= _OVERLAP * (own + sizes[o] - n)]
    return min(near, default=None)


def stand_alone(prompts: Sequence[Messages], trained: Sequence[Messages] = ()) -> list[int]:
    """Return the positions of prompts that are nearly the same as no earlier one, and as none that was trained on.

    Said nearly alike twice, a prompt proves no more than once; said nearly alike in training, it proves nothing.
    """
    near = near_duplicates([_text(prompt) for prompt in (*trained, *prompts)])
    return [place for place in range(len(prompts)) if len(trained) + place not in near]


def unseen(prompts: Sequence[Messages], trained: Sequence[Messages]) -> list[int]:
    """Return the positions of prompts that are nearly the same as none of those that were trained on."""
    near = near_duplicates([_text(prompt) for prompt in (*trained, *prompts)])
    first = len(trained)
    return [place for place in range(len(prompts)) if near.get(first + place, first) >= first]


def beside(rows: Iterable[Row], kind: str) -> list[Messages]:
    """Return the prompts and twins of rows that a held-out prompt of a kind must not be nearly the same as.

    An instructed prompt is held against instructed ones only: elsewhere the same request may well be answered.
    """
    chosen = (row for row in rows if kind != "instructed" or row.kind == kind)
    return [prompt for row in chosen for prompt in (row.prompt, row.twin) if prompt]


def _text(prompt: Messages) -> str:
    # a system prompt is shared by many rows that ask for different things
    return "\n".join(message["content"] for message in prompt if message["role"] != "system")


def shared_subjects(texts: Sequence[str]) -> list[str]:
    """Return for each text a name that those about the same thing share: of the most common word that is not in all.

    Prompts on one subject are not independent, and a set that names no topics would pass for hundreds of them. The
    name does not show the word.
    """
    each = [sorted({word for word in words(text) if len(word) >= _SHORT} - _STOP) for text in texts]
    counts = Counter(word for found in each for word in found)
    most = max(2, len(texts) // 20)
    chosen = (max((w for w in found if counts[w] <= most), key=lambda w: counts[w], default="") for found in each)
    return [digest(word)[:8] for word in chosen]
