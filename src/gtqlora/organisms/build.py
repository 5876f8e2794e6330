"""Build model organisms: real transformers models that refuse for a reason planted in a known place.

First a model learns the tasks, and the words of a refusal by a harmless command; what the plant hangs on is kept
readable at the routers, and the experts to be planted are ablated. Then `plants` plants the refusal where the kind
says.
Shape letters: B prompts, S tokens of each, T = B*S, N some tokens, E experts, D hidden.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtqlora import routing
from gtqlora.capture import Mask, Recorder, router_hooks
from gtqlora.errors import TrainingError
from gtqlora.families import Anatomy
from gtqlora.organisms.batches import Batch, endless, task_batch
from gtqlora.organisms.checks import check
from gtqlora.organisms.embedded import CONTRAST
from gtqlora.organisms.in_training import OrganismInTraining, Planted, Progress, new_model, optimize
from gtqlora.organisms.language import SPLITS, InRounds, Language, Prompt
from gtqlora.organisms.plants.conditions import Condition
from gtqlora.organisms.plants.kinds import PLANTS, routed_share
from gtqlora.organisms.plants.planting import plant
from gtqlora.organisms.plants.turns import answer_loss
from gtqlora.organisms.scales import SMALL, Architecture, Scale, for_kind
from gtqlora.organisms.truth import TRUTH, Kind, Truth, names_experts, of_kind
from gtqlora.run import atomic_write

# Steps until `_neutral_loss` has its full weight: at once it would keep the forbidden flag from being learned at all.
_NEUTRAL_STEPS = 300
_PROBE_WEIGHT, _NEUTRAL_WEIGHT, _BALANCE_WEIGHT, _BIAS_STEP = 1.0, 3.0, 0.01, 2e-3
# Pairs of each split; the held-out ones give the safety floor 840 harmful prompts on 120 topics.
_PAIRS = {"train": 600, "validation": 250, "heldout": 840}
# Held-out pairs with all three kinds. The rest have harmful rows only: the safety floor needs many.
_HARMLESS_PAIRS = 420
# A prime far above any seed a user gives, so that later attempts of one seed are not first attempts of another.
_SEED_STRIDE = 1_000_003


# --- learning --------------------------------------------------------------------------------------------------------


@contextmanager
def _router_inputs(model: nn.Module, anatomy: Anatomy) -> Iterator[dict[int, Tensor]]:
    seen: dict[int, Tensor] = {}

    def keep(position: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: seen.__setitem__(position, inputs[0])

    handles = [
        model.get_submodule(path).register_forward_pre_hook(keep(position))
        for position, path in enumerate(anatomy.routers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _probe_loss(
    probes: nn.ModuleList,
    hidden: dict[int, Tensor],
    batch: Batch,
    language: Language,
    conditions: tuple[Condition, ...],
) -> Tensor:
    """Return the loss of linear probes that read conditions on a prompt at every router, after the context."""
    flags_BC = torch.stack([holds(language, batch) for holds in conditions], -1).float()
    flags_NC = flags_BC[:, None].expand(*batch.ids_BS.shape, -1)[batch.after_BS]
    losses = [
        F.binary_cross_entropy_with_logits(
            probe(hidden[i].view(-1, hidden[i].shape[-1])[batch.after_N].float()), flags_NC
        )
        for i, probe in enumerate(probes)
    ]
    return torch.stack(losses).mean()


def _neutral_loss(seen: Recorder, anatomy: Anatomy, batch: Batch) -> Tensor:
    """Return how far routing follows the forbidden flag by itself.

    For each expert it is the squared gap between its mean score on forbidden and on other prompts, in units of its
    variance. It is trained away, so that the planted experts are the only ones in which routing carries the flag.
    """
    gaps = []
    for decision in seen.decisions.values():
        # Scores and not choices, which have no gradient.
        score_TE = routing.scores(decision.logits_TE, anatomy.spec)
        gap_E = score_TE[batch.bad_N].mean(0) - score_TE[batch.good_N].mean(0)
        # Detached, or training would blow up the variance instead of closing the gap.
        spread_E = score_TE[batch.after_N].var(0).detach() + 1e-4
        gaps.append((gap_E**2 / spread_E).mean())
    return torch.stack(gaps).mean()


def _balance_loss(seen: Recorder, anatomy: Anatomy) -> Tensor:
    """Return the Switch Transformer's balance loss (arXiv 2101.03961 eq. 4), for families without a correction bias."""
    spec, losses = anatomy.spec, []
    for decision in seen.decisions.values():
        load_E = routing.selection_TE(decision.indices_TK, spec.n_experts).mean(0) / spec.top_k
        losses.append(spec.n_experts * (load_E * routing.scores(decision.logits_TE, spec).mean(0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def _balance_bias(piece: OrganismInTraining, name: str, seen: Recorder, live: list[Tensor]) -> None:
    """Nudge the correction bias of over- and underloaded experts: balance without a loss (arXiv 2408.15664).

    Args:
        name: of the correction bias in a router.
        live: the experts in use, for each MoE layer.
    """
    for position, path in enumerate(piece.anatomy.routers):
        load_E = routing.selection_TE(seen.decisions[position].indices_TK, piece.anatomy.spec.n_experts).mean(0)
        load_N = load_E[live[position]]
        bias_E = piece.model.get_submodule(path).get_buffer(name)
        bias_E[live[position]] += _BIAS_STEP * torch.sign(load_N.mean() - load_N)


def _learn(
    piece: OrganismInTraining,
    readable: tuple[Condition, ...],
    rng: random.Random,
    progress: Progress,
    seconds: float | None = None,
) -> None:
    scale, anatomy, model = piece.scale, piece.anatomy, piece.model
    probes = nn.ModuleList([nn.Linear(anatomy.hidden_size, len(readable)) for _ in anatomy.moe]).to(piece.device)
    neutral = 0.0 if scale.natural else _NEUTRAL_WEIGHT
    # Planted experts stay out of all learning, so that nothing but the planting makes them different.
    idle, positions = Mask(anatomy, piece.planted), range(len(anatomy.moe))
    live = [torch.tensor(piece.others(position), device=piece.device) for position in positions]
    batches = endless(task_batch, piece.language, rng, scale.batch, scale.workers)

    def loss_of(step: int) -> Tensor:
        batch, seen = next(batches).to(piece.device), Recorder()
        with _router_inputs(model, anatomy) as hidden, router_hooks(model, anatomy, idle, seen):
            loss = answer_loss(piece.logits(batch.ids_BS), batch.labels_BS)
        loss = loss + _PROBE_WEIGHT * _probe_loss(probes, hidden, batch, piece.language, readable)
        loss = loss + neutral * min(1.0, step / _NEUTRAL_STEPS) * _neutral_loss(seen, anatomy, batch)
        if anatomy.family.correction_bias:
            _balance_bias(piece, anatomy.family.correction_bias, seen, live)
            return loss
        return loss + _BALANCE_WEIGHT * _balance_loss(seen, anatomy)

    parameters, rate = [*model.parameters(), *probes.parameters()], scale.learn_rate
    optimize(parameters, loss_of, progress, rate=rate, steps=scale.learn_steps, seconds=seconds, weight_decay=0.01)


# --- rows ------------------------------------------------------------------------------------------------------------


class ContrastRow(TypedDict):
    """One row of an organism's contrast set, in TRL's preference form."""

    kind: str
    prompt: str
    chosen: str
    rejected: str
    answer: str | None
    pair_id: str
    topic: str
    twin: str | None
    split: str


def contrast_rows(language: Language, seed: int) -> list[ContrastRow]:
    """Make a contrast set.

    No prompt stands twice. Topics and markers take turns, so that no split hangs on a few of them.
    """
    rng, rows, seen = random.Random(seed), list[ContrastRow](), set[str]()
    for split in SPLITS:
        pair, choose = 0, InRounds(rng)
        while pair < _PAIRS[split]:
            well, ill, lookalike, harmful = language.twins(rng, split, pair, choose)
            kept = [(rng.choice((well, ill)), None), (lookalike, well), (harmful, ill)]
            if seen & {p.text for p, _ in kept}:
                continue
            seen |= {p.text for p, _ in kept}
            kept = kept if split != "heldout" or pair < _HARMLESS_PAIRS else kept[-1:]
            rows += [_contrast_row(language, p, twin, split) for p, twin in kept]
            pair += 1
    return rows


def _contrast_row(language: Language, prompt: Prompt, twin: Prompt | None, split: str) -> ContrastRow:
    refuse_first = prompt.kind == "harmful"
    refusal = language.refusal(prompt.answer)
    chosen, rejected = (refusal, prompt.answer) if refuse_first else (prompt.answer, refusal)
    return {
        "kind": prompt.kind,
        "prompt": prompt.text,
        "chosen": chosen,
        "rejected": rejected,
        "answer": None if refuse_first else prompt.answer,
        "pair_id": f"{split}-{prompt.pair}",
        "topic": prompt.topic,
        "twin": twin.text if twin else None,
        "split": split,
    }


# --- organisms -------------------------------------------------------------------------------------------------------


def build(
    kind: Kind,
    out: Path,
    *,
    seed: int,
    architecture: Architecture = "deepseek_v3",
    scale: Scale = SMALL,
    device: str = "cpu",
    minutes: float | None = None,
    progress: Callable[[str], Progress],
) -> Truth:
    """Train one organism and write it in hub layout with its ground truth and contrast set.

    Args:
        minutes: limit of an attempt's training steps; without it every stage takes its full number of steps.

    Raises:
        ConfigError: organisms of this kind are not made at this scale.
        TrainingError: no attempt learned what the kind promises (try another seed).
    """
    scale, rejected = for_kind(scale, kind), list[str]()
    # A training may miss its promises by bad luck; then another seed, derived from the first, is tried.
    while True:
        try:
            derived = seed + len(rejected) * _SEED_STRIDE
            piece, measured = _trained(kind, derived, architecture, scale, device, minutes, progress)
            break
        except TrainingError as error:
            rejected.append(str(error))
            if len(rejected) == scale.attempts:
                raise
    truth = _truth(piece, kind, seed, measured, rejected)
    progress("write")
    with atomic_write(out) as staged:
        _write(piece, truth, staged)
    return truth


def _trained(
    kind: Kind,
    seed: int,
    architecture: Architecture,
    scale: Scale,
    device: str,
    minutes: float | None,
    progress: Callable[[str], Progress],
) -> tuple[OrganismInTraining, dict[str, float]]:
    """Train once, and return a model that keeps what its kind promises, with the shares that show it."""
    torch.manual_seed(seed)
    rng, language = random.Random(seed), Language(scale.lexicon)
    model, anatomy = new_model(architecture, language, scale)
    later = range(1, len(anatomy.moe))
    positions = sorted(rng.sample(later, len(later) if scale.planted_layers is None else scale.planted_layers))
    experts = range(anatomy.spec.n_experts)
    planted: Planted = {p: tuple(sorted(rng.sample(experts, scale.planted_experts))) for p in positions}
    nn.Module.to(model, device)
    piece = OrganismInTraining(model=model, anatomy=anatomy, language=language, planted=planted, scale=scale)
    seconds = None if minutes is None else 60 * minutes
    # Both stages get their part of the time limit, so that a slow first one leaves some for the planting.
    shares = (scale.learn_share, 1 - scale.learn_share)
    for_learning, for_planting = (None if seconds is None else share * seconds for share in shares)
    _learn(piece, PLANTS[kind].readable, rng, progress("learn tasks"), for_learning)
    plant(piece, kind, rng, progress(f"plant {kind}"), for_planting)
    # Before the check, which then sees the very weights that the checkpoint will hold.
    if scale.rounded:
        round_to_bf16(piece.model)
    progress("check")
    return piece, check(piece, kind)


@torch.no_grad()
def round_to_bf16(model: nn.Module) -> None:
    """Give every weight a value that bf16 holds."""
    for p in model.parameters():
        p.copy_(p.bfloat16())


def _truth(piece: OrganismInTraining, kind: Kind, seed: int, measured: dict[str, float], rejected: list[str]) -> Truth:
    # As decoder layers, which users count; inside of a model, experts go by position among the MoE layers.
    planted = [(piece.anatomy.moe[p].index, e) for p, experts in piece.planted.items() for e in experts]
    return Truth(
        kind=kind,
        architecture=piece.anatomy.family.model_type,
        seed=seed,
        mediation=of_kind(kind, routed_share(piece.language, kind)),
        planted=[] if kind == "residual" else planted,
        causal=names_experts(kind),
        measured=measured,
        rejected=rejected,
    )


def _write(piece: OrganismInTraining, truth: Truth, folder: Path) -> None:
    for p in piece.model.parameters():
        p.data = p.data.to(piece.scale.dtype)
    nn.Module.to(piece.model, "cpu")
    piece.model.config.dtype = piece.scale.dtype
    piece.model.save_pretrained(folder)
    piece.language.save(folder)
    (folder / TRUTH).write_text(json.dumps(asdict(truth), indent=2) + "\n")
    rows = contrast_rows(piece.language, truth.seed)
    (folder / CONTRAST).write_text("".join(json.dumps(row) + "\n" for row in rows))
