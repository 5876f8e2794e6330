"""On how few experts refusal hangs: its curve against the number of experts ablated.

Shape letters: B batch, T tokens, K experts per token, L MoE layers, E experts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gtqlora.capture import Decision, Mask, Subject, observe
from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Contrast, Row, groupings
from gtqlora.decoding import Change, Switch
from gtqlora.localize import Expert, ablated_of, pairs_of, random_like
from gtqlora.localize.masks import Ablated, ablatable, counts_up_to
from gtqlora.results.ablation import AblationPoint, AblationStudy
from gtqlora.results.experts import ExpertId
from gtqlora.results.verdict import Outcome
from gtqlora.scoring import Runner
from gtqlora.stats import rate


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Experts as an adversary would ablate them: those first that harmful prompts choose more than others do.

    Attributes:
        order: cut so that every layer keeps as many experts as a token chooses.
        frequency_LE: how often each expert is chosen on both sides together.
        against: what harmful prompts were compared with, "twins" or "benign rows".
        prompts: harmful prompts it was made on.
    """

    order: tuple[Expert, ...]
    frequency_LE: np.ndarray
    against: str
    prompts: int

    def first(self, count: int) -> Ablated:
        """Return the ranking's first experts, by layer."""
        return ablated_of(self.order[:count])


def rank(subject: Subject, rows: Contrast, *, prompts: int, batch_size: int, seed: int) -> Ranking | None:
    """Rank experts by selection on harmful prompts less that on their twins, from where the two differ.

    Without twins benign rows stand in for them; None if there are none either, or no harmful rows.
    """
    # lookalike rows are left out: what tells them from their twins is what the edit is meant to change
    kept = (*rows.of_kind("harmful"), *rows.of_kind("benign"))
    pairs = pairs_of(replace(rows, rows=kept), subject, prompts, seed)
    if not pairs:
        return None
    since = [pair.common for pair in pairs]
    harmful_LE, other_LE = (
        observe(subject, tokens, since=since, batch_size=batch_size, label=label).prompt.rates_NLE.mean(0)
        for tokens, label in (
            ([pair.prompt for pair in pairs], "routing of harmful"),
            ([pair.twin for pair in pairs], "routing of others"),
        )
    )
    # stable, so that equal experts keep one order on every machine
    ranked = np.argsort(other_LE - harmful_LE, axis=None, kind="stable").tolist()
    order = ablatable([divmod(i, subject.anatomy.spec.n_experts) for i in ranked], subject.anatomy.spec)
    against = "twins" if pairs[0].matched else "benign rows"
    frequency_LE = (harmful_LE + other_LE) / 2
    return Ranking(order=tuple(order), frequency_LE=frequency_LE, against=against, prompts=len(pairs))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which experts are ablated, point by point: ranked ones, and random draws of like layers and frequency."""

    targeted: tuple[Ablated, ...]
    random: tuple[tuple[Ablated, ...], ...]


def plan(ranking: Ranking, *, most: int, controls: int, seed: int) -> Plan:
    """Plan to ablate 1, 2, 4, ... experts, up to `most` or as many as can be; `controls` random draws beside each."""
    rng = random.Random(seed)
    targeted = tuple(ranking.first(count) for count in counts_up_to(min(most, len(ranking.order))))
    drawn = tuple(tuple(random_like(t, ranking.frequency_LE, rng) for _ in range(controls)) for t in targeted)
    return Plan(targeted=targeted, random=drawn)


class RowsAblated:
    """A mask for some rows of a batch only, which works because no row's routing depends on another's."""

    def __init__(self, mask: Mask, rows_B: Tensor) -> None:
        self.mask, self.rows_B = mask, rows_B

    def __call__(self, position: int, module: nn.Module, decision: Decision) -> Decision | None:
        ablated = self.mask(position, module, decision)
        if ablated is None:
            return None
        # tokens lie row after row, as many in each, as rows are padded to one length
        on_T1 = self.rows_B.repeat_interleave(len(decision.indices_TK) // len(self.rows_B)).unsqueeze(-1)
        weights_TK = torch.where(on_T1, ablated.weights_TK, decision.weights_TK)
        return Decision(decision.logits_TE, weights_TK, torch.where(on_T1, ablated.indices_TK, decision.indices_TK))


@dataclass(frozen=True, kw_only=True)
class AblationCurve:
    """Held-out harmful rows, the model that completes them, and the level of the intervals."""

    runner: Runner
    rows: Sequence[Row]
    level: float

    def curve(self, plan: Plan, intact: Sequence[bool], label: str) -> list[AblationPoint]:
        """Return refusal along a plan in the subject's present state; `intact` are its refusals with all experts.

        The prompts are dealt out to the random draws, so that their interval, too, is over prompts.
        """
        groups = groupings(self.rows)[-1]  # topics where the rows carry them, else pairs
        whole = rate(intact, self.level, groups)
        points = [AblationPoint(ablated=0, targeted=whole, random=whole if any(plan.random) else None)]
        for targeted, draws in zip(plan.targeted, plan.random, strict=True):
            count = sum(map(len, targeted.values()))
            found = rate(self._refused([targeted], f"{label}: {count} ablated"), self.level, groups)
            control = rate(self._refused(draws, f"{label}: {count} at random"), self.level, groups) if draws else None
            points.append(AblationPoint(ablated=count, targeted=found, random=control))
        return points

    def _refused(self, masks: Sequence[Ablated], label: str) -> list[bool]:
        """Return whether each row is refused; row i meets mask i modulo their number, all in the same batches."""
        subject = self.runner.model

        def dealt(chosen: list[int]) -> Change:
            # by the row's own number, so that batches of like length do not sort the masks
            turn_B = torch.tensor(chosen, device=subject.device) % len(masks)
            return Change(handlers=[RowsAblated(Mask(subject.anatomy, m), turn_B == i) for i, m in enumerate(masks)])

        return [answer.refused for answer in self.runner.answers(self.rows, dealt, label=label)]


def ablation_study(
    runner: Runner,
    original: Switch,
    trained: Contrast,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    config: VerifyConfig,
) -> AblationStudy | None:
    """Return on how few experts refusal of held-out harmful prompts hangs, before and after the edit.

    Experts are ranked on the rows that were trained on. `before` and `after` ablate the same ones, ranked in the
    original; `after_reranked` those that an adversary would rank first in the edited model. None if switched off, or
    if those rows cannot rank experts.

    Args:
        runner: of the model with the edit on; `original` switches it off.
        trained: the rows that the edit was trained on.
        rows: the held-out harmful rows; `outcomes` are theirs, in the same order.
    """
    limits = {"prompts": config.ablation_prompts, "batch_size": runner.batch_size, "seed": config.seed}
    with original():
        ranking = rank(runner.model, trained, **limits) if config.ablation else None
    again = rank(runner.model, trained, **limits) if ranking else None
    if ranking is None or again is None:
        return None
    bench, before, after = _drawn(runner, rows, outcomes, config)
    # one plan for before and after: the same experts, the same random draws
    same = plan(ranking, most=config.ablation, controls=config.ablation_controls, seed=config.seed)
    anew = plan(again, most=config.ablation, controls=0, seed=config.seed)
    with original():
        intact = bench.curve(same, before, "before")
    layers = [layer.index for layer in runner.model.anatomy.moe]
    first = ranking.order[: intact[-1].ablated]
    return AblationStudy(
        ranked_against=ranking.against,
        ranked_prompts=ranking.prompts,
        controls=config.ablation_controls,
        experts=[ExpertId(layers[position], expert) for position, expert in first],
        before=intact,
        after=bench.curve(same, after, "after"),
        after_reranked=bench.curve(anew, after, "after, ranked anew"),
    )


def _drawn(
    runner: Runner, rows: Sequence[Row], outcomes: Sequence[Outcome], config: VerifyConfig
) -> tuple[AblationCurve, list[bool], list[bool]]:
    """Return at most `ablation_prompts` of the rows, drawn, and their refusals before and after."""
    count = min(config.ablation_prompts, len(rows))
    drawn = sorted(random.Random(config.seed).sample(range(len(rows)), count))
    bench = AblationCurve(runner=runner, rows=[rows[i] for i in drawn], level=config.level)
    return bench, [outcomes[i].refused_before for i in drawn], [outcomes[i].refused_after for i in drawn]
