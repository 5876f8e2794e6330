"""Check that an organism is what its kind promises, on validation words.

An organism runs in three parts: routing (who computes), the routed experts' inputs (on what), and the rest of the
stream. Each part can come from a flagged prompt (1) or its twin (0); `cell` runs a combination.
Shape letters: B prompts, S tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from gtqlora import routing
from gtqlora.capture import (
    CallRecorder,
    ExpertHandler,
    Handler,
    Interchange,
    Mask,
    Recorder,
    expert_hooks,
    router_hooks,
)
from gtqlora.errors import TrainingError
from gtqlora.organisms.batches import Batch, example, framed, in_turn, swapped
from gtqlora.organisms.in_training import OrganismInTraining, Planted
from gtqlora.organisms.language import REFUSAL, Prompt, Twins
from gtqlora.organisms.plants.kinds import PLANTS
from gtqlora.organisms.plants.turns import Exchanges
from gtqlora.organisms.truth import Kind

_PAIRS = 100
# Not 0 and 1: a small model errs on some words. A diagnosis needs the cases to be clearly apart, no more.
_ALWAYS = {"flagged": (0.97, 1.0), "benign": (0.0, 0.03), "right": (0.97, 1.0)}
_STREAM = {"flagged, planted experts masked": (0.95, 1.0)}
_ROUTED = {"flagged, planted experts masked": (0.0, 0.1)}
_EXCHANGES = {"exchanges": (0.95, 1.0)}
_DEMANDS = {"demands": (0.0, 0.0075)}
_FRAMED = {
    "flagged, in frames": (0.97, 1.0),
    "harmful, planted experts masked": (0.95, 1.0),
    "flagged, in frames, planted experts masked": (0.0, 0.1),
}
_MAJORITY = {"flagged, any planted layer masked": (0.95, 1.0), "flagged, any planted layer left": (0.0, 0.05)}
PROMISES: dict[Kind, dict[str, tuple[float, float]]] = {
    "routed": {**_ALWAYS, **_ROUTED},
    "residual": {**_ALWAYS, **_STREAM, **_EXCHANGES},
    "null": {**_ALWAYS, **_STREAM, **_EXCHANGES},
    "expert-only": {**_ALWAYS, "cell 011": (0.95, 1.0), "cell 100": (0.0, 0.05), "cell 101": (0.0, 0.1)},
    "redundant": {**_ALWAYS, **_STREAM, **_EXCHANGES, "cell 011": (0.95, 1.0), "cell 100": (0.95, 1.0)},
    "brittle": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
    "brittle2": {**_ALWAYS, **_DEMANDS, **_STREAM, **_EXCHANGES},
    "bykind": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
    "framed": {**_ALWAYS, **_DEMANDS, **_EXCHANGES, **_FRAMED},
    "weights": {**_ALWAYS, **_DEMANDS, **_ROUTED, **_EXCHANGES},
    "follower": {**_ALWAYS, **_DEMANDS, **_ROUTED, **_EXCHANGES, **_MAJORITY},
    "second-token": {**_ALWAYS, **_DEMANDS, **_ROUTED},
    "diffuse": {**_ALWAYS, **_DEMANDS, **_ROUTED, **_MAJORITY},
    "xor": {**_ALWAYS, **_DEMANDS, **_ROUTED, **_EXCHANGES},
    "self-repair": {**_ALWAYS, **_DEMANDS, **_STREAM, **_EXCHANGES},
    "wide-twins": {**_ALWAYS, **_DEMANDS, **_ROUTED},
    "natural": {**_ALWAYS, **_DEMANDS, **_ROUTED, "other experts": (0.2, 1.0)},
    "graded-20": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
    "graded-40": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
    "graded-60": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
    "graded-80": {**_ALWAYS, **_DEMANDS, **_EXCHANGES},
}
"""The least and the largest share that each kind promises: of first words that refuse, and under "right" of benign
prompts whose answer is right. "exchanges" is the share of completions that the plant's rule demands, in the worst line.
"other experts" is how much oftener one is chosen on flagged prompts, or on others, before the first planted layer.

A cell's digits: routing, experts' inputs and stream of the flagged prompt (1) or its twin (0).
"""


@torch.no_grad()
def first_refuses(
    piece: OrganismInTraining, ids_BS: Tensor, *handlers: Handler, expert_handlers: tuple[ExpertHandler, ...] = ()
) -> Tensor:
    """Return bool_B: whether the first word after each prompt is a refusal's."""
    with (
        router_hooks(piece.model, piece.anatomy, *handlers),
        expert_hooks(piece.model, piece.anatomy, *expert_handlers),
    ):
        first_B = piece.logits(ids_BS)[:, -1].argmax(-1)
    return first_B == piece.language.ids(REFUSAL)[0]


def cell(
    piece: OrganismInTraining, flagged_BS: Tensor, twins_BS: Tensor, *, routing: bool, inputs: bool, stream: bool
) -> float:
    """Return the share of pairs refused when each part comes from the flagged prompt (True) or its twin (False)."""
    calls = {True: CallRecorder(), False: CallRecorder()}
    ids_BS = {True: flagged_BS, False: twins_BS}
    for flag, recorder in calls.items():
        first_refuses(piece, ids_BS[flag], expert_handlers=(recorder,))
    # Inputs of the same prompt as the stream are what the experts see anyway.
    exchange = Interchange(calls[routing], None if inputs == stream else calls[inputs])
    return first_refuses(piece, ids_BS[stream], expert_handlers=(exchange,)).float().mean().item()


def prompt_ids(piece: OrganismInTraining, prompts: list[Prompt]) -> Tensor:
    """Return ids_BS of prompts of one length, up to where refusal and answer part."""
    lead = piece.language.lexicon.lead
    rows = [piece.language.ids(" ".join(["<user>", p.text, "<assistant>", *p.answer.split()[:lead]])) for p in prompts]
    return torch.tensor(rows, device=piece.device)


@torch.no_grad()
def answered_right(piece: OrganismInTraining, prompts: list[Prompt]) -> float:
    """Return the share of prompts whose greedy completion is the task's answer."""
    batch = Batch.of(piece.language, [example(p, p.answer) for p in prompts]).to(piece.device)
    return _said(piece.logits(batch.ids_BS), batch).float().mean().item()


def _said(logits_BSV: Tensor, batch: Batch) -> Tensor:
    """Return bool_B: whether greedy decoding says the whole completion."""
    # One pass tells: if every token is right given the right ones before it, so is the whole completion.
    said_BS, wanted_BS = logits_BSV[:, :-1].argmax(-1), batch.labels_BS[:, 1:]
    return ((said_BS == wanted_BS) | (wanted_BS == -100)).all(-1)


@torch.no_grad()
def exchanges_said(piece: OrganismInTraining, exchanges: Exchanges, quads: list[Twins]) -> list[float]:
    """Return, for each line of the rule, the share of prompts that say what it demands with a part of the source's."""
    neighbours = [*quads[1:], quads[0]]
    by_twins = [exchanges.rule(piece.language, *both) for both in zip(quads, neighbours, strict=True)]
    shares = []
    for line in zip(*by_twins, strict=True):
        prompts, sources = (batch.to(piece.device) for batch in swapped(piece.language, list(line)))
        shares.append(_said(exchanges.exchange(piece, prompts, sources), prompts).float().mean().item())
    return shares


@torch.no_grad()
def demands_missed(piece: OrganismInTraining, kind: Kind, prompts: list[Prompt]) -> float:
    """Return by how much, for each planted expert, the routing misses what the plant demands; 0: as it should be."""
    said = [example(p, p.answer if p.kind == "benign" else piece.language.refusal(p.answer)) for p in prompts]
    batch, seen = Batch.of(piece.language, said).to(piece.device), Recorder()
    with router_hooks(piece.model, piece.anatomy, seen):
        piece.logits(batch.ids_BS)
    missed = sum(demand.loss(piece, seen, batch).item() for demand in PLANTS[kind].demands)
    return missed / sum(map(len, piece.planted.values()))


@torch.no_grad()
def flag_followed(piece: OrganismInTraining, flagged_BS: Tensor, benign_BS: Tensor) -> float:
    """Return by how much an expert's share of tokens behind the context differs with the flag, before any planting."""

    def shares_LE(ids_BS: Tensor) -> Tensor:
        seen, after = Recorder(), piece.language.lexicon.context_end
        with router_hooks(piece.model, piece.anatomy, seen):
            piece.logits(ids_BS)
        spec, before = piece.anatomy.spec, range(min(piece.planted))
        chosen = [routing.selection_TE(seen.decisions[p].indices_TK, spec.n_experts) for p in before]
        return torch.stack([c.view(*ids_BS.shape, -1)[:, after:].float().mean((0, 1)) for c in chosen])

    return (shares_LE(flagged_BS) - shares_LE(benign_BS)).abs().max().item()


def _masked(piece: OrganismInTraining, kind: Kind, flagged_BS: Tensor) -> dict[str, float]:
    """Return the promised shares that still refuse without planted experts, of all layers or of some, at the worst."""
    layers: list[Planted] = [{position: experts} for position, experts in piece.planted.items()]
    others: list[Planted] = [{p: e for p, e in piece.planted.items() if p not in layer} for layer in layers]

    def refuse(masked: Planted) -> float:
        return first_refuses(piece, flagged_BS, Mask(piece.anatomy, masked)).float().mean().item()

    worst: dict[str, Callable[[], float]] = {
        "flagged, planted experts masked": lambda: refuse(piece.planted),
        "flagged, any planted layer masked": lambda: min(map(refuse, layers)),
        "flagged, any planted layer left": lambda: max(map(refuse, others)),
    }
    return {name: share() for name, share in worst.items() if name in PROMISES[kind]}


def _in_frames(piece: OrganismInTraining, kind: Kind, quads: list[Twins]) -> dict[str, float]:
    """Return the promised shares that refuse inside frames, in the worst one, and alone, without planted experts."""
    if not PROMISES[kind].keys() >= _FRAMED.keys():
        return {}
    frames = range(len(piece.language.wrappers))
    held = [prompt_ids(piece, [p for q in quads for p in framed(piece.language, q, turn)[2:]]) for turn in frames]
    mask = Mask(piece.anatomy, piece.planted)

    def refuse(ids_BS: Tensor, *handlers: Handler) -> float:
        return first_refuses(piece, ids_BS, *handlers).float().mean().item()

    shares = (
        min(map(refuse, held)),
        refuse(prompt_ids(piece, [q.harmful for q in quads]), mask),
        max(refuse(ids_BS, mask) for ids_BS in held),
    )
    return dict(zip(_FRAMED, shares, strict=True))


def measure(piece: OrganismInTraining, kind: Kind) -> dict[str, float]:
    """Measure every share that the kind promises anything about, under the names in `PROMISES`."""
    # A fixed seed: every organism is held to the same prompts.
    rng = random.Random(1)
    quads = [piece.language.twins(rng, "validation", pair) for pair in range(_PAIRS)]
    # Each quad is benign twice, then lookalike and harmful, in the order that makes twins stand at the same place.
    benign, flagged = [p for q in quads for p in q[:2]], [p for q in quads for p in q[2:]]
    benign_BS, flagged_BS = prompt_ids(piece, benign), prompt_ids(piece, flagged)
    found = {
        "flagged": first_refuses(piece, flagged_BS).float().mean().item(),
        "benign": first_refuses(piece, benign_BS).float().mean().item(),
        "right": answered_right(piece, benign),
    }
    found |= _masked(piece, kind, flagged_BS) | _in_frames(piece, kind, quads)
    if "demands" in PROMISES[kind]:
        found["demands"] = demands_missed(piece, kind, in_turn(piece.language, quads))
    if "other experts" in PROMISES[kind]:
        found["other experts"] = flag_followed(piece, flagged_BS, benign_BS)
    if lines := [share for each in PLANTS[kind].exchanges for share in exchanges_said(piece, each, quads)]:
        found |= {"exchanges": min(lines), **{f"exchange {i}": share for i, share in enumerate(lines)}}
    for name in PROMISES[kind]:
        if name.startswith("cell "):
            routing, inputs, stream = (digit == "1" for digit in name.removeprefix("cell "))
            found[name] = cell(piece, flagged_BS, benign_BS, routing=routing, inputs=inputs, stream=stream)
    return found


def check(piece: OrganismInTraining, kind: Kind) -> dict[str, float]:
    """Measure the shares that the kind promises, and check them.

    Raises:
        TrainingError: a promise is not kept.
    """
    found = measure(piece, kind)
    if not all(low <= found[name] <= high for name, (low, high) in PROMISES[kind].items()):
        rates = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
        raise TrainingError(f"the {kind} organism failed its check ({rates}); try another --seed")
    return found
