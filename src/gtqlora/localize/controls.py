"""Controls of an interchange: other prompts of the same kind and behaviour, whose routing is as far away as the twin's.

A swap with the twin shows something only where a swap with a prompt that carries the same flag does not do the same.
Such a prompt is of the same kind, as kinds may differ in mechanism, and it is the one whose experts overlap with those
of the prompt about as much as the twin's do: a nearer one would disturb less, and prove less.

Shape letters: N pairs, L MoE layers, E experts, K experts per token, S tokens of each prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gtqlora.capture import Recorder, Subject, forward, left_padded, router_hooks
from gtqlora.contrasts import Row
from gtqlora.judging.folding import flat
from gtqlora.localize.pairs import Pair
from gtqlora.progress import track

SAME_TOPIC, OTHER_TOPIC = "another prompt of its topic", "a prompt of another topic"
CONTROLS = (SAME_TOPIC, OTHER_TOPIC)
MISSING = ("no other prompt of its topic", "no prompt of another topic")
"""What is said where there is none of each."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """What stands in for the twin of one pair in a control.

    Attributes:
        pair: the other pair.
        overlap: share of the chosen experts that its flagged prompt has in common with ours, token by token.
        topic: its topic is as it should be, the same or another; else there was none, and this one stood in.
        kind: it is of the same kind; else there was none.
    """

    pair: Pair
    overlap: float
    topic: bool
    kind: bool


@dataclass(frozen=True, kw_only=True)
class Controlled:
    """A pair with its two controls, in the order of `CONTROLS`, and the overlap of its prompt with its twin."""

    pair: Pair
    controls: tuple[Control, Control]
    overlap: float


def controlled(subject: Subject, pairs: Sequence[Pair], batch_size: int) -> list[Controlled]:
    """Return the aligned pairs that have another one of their length, each with its controls."""
    alike: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.aligned:
            alike[len(pair.prompt)].append(pair)
    # a pair without another one of its length has no control
    groups = [group for group in alike.values() if len(group) > 1]
    found = {
        id(one.pair): one
        for group in track(groups, "overlap of routing", len(groups))
        for one in _in_group(subject, group, batch_size)
    }
    return [found[id(pair)] for pair in pairs if id(pair) in found]


def _in_group(subject: Subject, group: list[Pair], batch_size: int) -> list[Controlled]:
    flagged_NLSK, twins_NLSK = (
        chosen_experts(subject, prompts, batch_size)
        for prompts in ([pair.prompt for pair in group], [pair.twin for pair in group])
    )
    overlap_NN, twin_N = overlaps(flagged_NLSK, twins_NLSK, subject.anatomy.spec.n_experts)
    return [
        Controlled(pair=pair, controls=_drawn(group, i, overlap_NN[i], twin_N[i]), overlap=float(twin_N[i]))
        for i, pair in enumerate(group)
    ]


@torch.no_grad()
def chosen_experts(subject: Subject, prompts: Sequence[list[int]], batch_size: int) -> Tensor:
    """Return the experts that prompts of one length choose, shape (N, L, S, K), on the CPU."""
    found = []
    for start in range(0, len(prompts), batch_size):
        batch, recorder = prompts[start : start + batch_size], Recorder()
        ids_BS, mask_BS = left_padded(batch, subject.pad_id, subject.device)
        with router_hooks(subject.model, subject.anatomy, recorder):
            forward(subject, ids_BS, mask_BS)
        layers = [recorder.decisions[position].indices_TK for position in range(len(subject.anatomy.moe))]
        # a tensor of smallest integers that hold any expert's number: there may be many tokens
        stacked = torch.stack([indices_TK.view(*ids_BS.shape, -1) for indices_TK in layers], 1)
        found.append(stacked.to("cpu", torch.int16))
    return torch.cat(found)


def overlaps(
    flagged_NLSK: Tensor, twins_NLSK: Tensor, n_experts: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return the shares of experts in common: of all flagged prompts with each other, and of each with its twin."""
    n, layers, tokens, chosen = flagged_NLSK.shape
    between_NN, twin_N = torch.zeros(n, n), torch.zeros(n)
    # layer by layer: all of them at once would be large
    for layer in range(layers):
        ours_NC, theirs_NC = (
            F.one_hot(side[:, layer].long(), n_experts).sum(-2).flatten(1).float()
            for side in (flagged_NLSK, twins_NLSK)
        )
        between_NN += ours_NC @ ours_NC.T
        twin_N += (ours_NC * theirs_NC).sum(-1)
    whole = layers * tokens * chosen
    return (between_NN / whole).numpy(), (twin_N / whole).numpy()


def _drawn(group: Sequence[Pair], place: int, overlap_N: NDArray[np.floating], twin: float) -> tuple[Control, Control]:
    """Return the nearest to the twin in overlap, of the same topic and of another; what is missing is stood in for."""
    row = group[place].row
    # the nearest first; of the other kind only where there is none of the same
    others = sorted((i for i in range(len(group)) if i != place), key=lambda i: abs(overlap_N[i] - twin))
    others = [i for i in others if group[i].row.kind == row.kind] or others
    related = [i for i in others if _same_topic(group[i].row, row)]
    strange = [i for i in others if i not in related]
    # two different ones where there are two
    same, other = (related or strange[1:] or strange)[0], (strange or related[1:] or related)[0]
    return tuple(  # type: ignore[return-value]
        Control(pair=group[i], overlap=float(overlap_N[i]), topic=bool(fitting), kind=group[i].row.kind == row.kind)
        for i, fitting in ((same, related), (other, strange))
    )


def _same_topic(one: Row, other: Row) -> bool:
    topics = [flat(row.topic or "") for row in (one, other)]
    return one.pair_id == other.pair_id or (topics[0] == topics[1] != "")


__all__ = ["CONTROLS", "OTHER_TOPIC", "SAME_TOPIC", "Control", "Controlled", "chosen_experts", "controlled", "overlaps"]
