"""Study the residual directions at every layer, from states at the last prompt token.

Shape letters: N pairs, M = 2N states, L states of a token (the embedding and every decoder layer), D hidden size,
R <= D coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gtqlora.localize.directions.erasure import erasure
from gtqlora.localize.directions.named import (
    MIN_GROUPS,
    REFUSAL,
    ROUNDING,
    Array,
    contrasts_of,
    cosines,
    leave_one_out,
    named_at,
    stacked,
    unit,
)
from gtqlora.localize.directions.separability import (
    Parts,
    components,
    mean_difference,
    principal,
    separation,
    splits,
)
from gtqlora.results.directions import Components, DirectionStudy, Erasure, LayerDirections
from gtqlora.stats import Interval

DIRECTION, FIRST_COMPONENT = "direction", "first_component"


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The directions themselves, and what is known of them.

    Attributes:
        tensors: unit directions_LD from all pairs, fp32: "direction" (refusal), the other named directions, and
            "first_component" of the paired differences.
    """

    study: DirectionStudy
    tensors: dict[str, Tensor]


def study(
    states_NLD: Tensor,
    twins_NLD: Tensor,
    kinds: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int,
    level: float = 0.95,
) -> Directions:
    """Study the directions between flagged prompts and their twins, layer by layer.

    Args:
        states_NLD, twins_NLD: fp32 on the CPU, of flagged prompts and of their twins in the same order.
        kinds: "lookalike" or "harmful", for each pair.
        groups: pairs of one group (a pair_id) are never split between fitting and judging, and count as one.

    Raises:
        ModelError: a state is not finite; the message names the layer.
    """
    states_MLD = stacked(states_NLD, twins_NLD)
    n_groups = len(set(groups))
    weights = contrasts_of(kinds, groups)
    without = leave_one_out(kinds, groups)
    parts = splits(groups, seed) if n_groups >= MIN_GROUPS else []
    groups_N = np.asarray(groups)
    layers: list[LayerDirections] = []
    tensors: list[dict[str, Array]] = []
    for layer in range(states_MLD.shape[1]):
        # a layer at a time, in fp64: covariances of fp32 states lose what separates them
        states_MD = states_MLD[:, layer].double().numpy()
        named = named_at(weights, states_MD)
        norms = {name: float(np.linalg.norm(vector)) for name, vector in named.items()}
        states_MR = coordinates(states_MD)
        judged = _judge(states_MR, groups_N, parts, states_MD.shape[1], seed, level) if parts else _Judged()
        layers.append(
            LayerDirections(
                layer=layer,
                norm=norms.pop(REFUSAL),
                norms=norms,
                separation=judged.separation,
                components=judged.components,
                erasure=judged.erasure,
                cosines=cosines(weights, without, states_MR, level=level),
            )
        )
        tensors.append(_tensors(named, states_MD))
    angles = [angle for layer in layers for angle in layer.cosines]
    found = DirectionStudy(
        n_pairs=len(kinds),
        n_groups=n_groups,
        cosines=len(angles),
        cosines_not_told=sum(angle.value is None for angle in angles),
        layers=layers,
    )
    return Directions(study=found, tensors=_over_layers(tensors))


def coordinates(states_MD: Array) -> Array:
    """Return the states about their mean, of unit spread (root mean square length), in coordinates_MR with R <= M.

    What is measured does not depend on where the states lie, how long they are or how they are rotated, so M states in
    D dimensions are turned into at most M coordinates. States that differ by no more than fp32 rounding become 0.
    """
    about_MD = states_MD - states_MD.mean(0)
    spread = np.sqrt((about_MD**2).sum(1).mean())
    if spread <= ROUNDING * np.linalg.norm(states_MD, axis=1).max():
        return np.zeros((len(states_MD), 1))
    # R of a QR decomposition of the transpose holds the states in a basis of the space that they span.
    # with fewer states than dimensions a QR keeps all angles and lengths in far fewer coordinates
    few = len(about_MD) < about_MD.shape[1]
    return (np.asarray(np.linalg.qr(about_MD.T, mode="r")).T if few else about_MD) / spread


@dataclass(frozen=True, kw_only=True)
class _Judged:
    separation: Interval | None = None
    components: Components | None = None
    erasure: Erasure | None = None


def _judge(
    states_MR: Array, groups_N: NDArray[np.str_], parts: Sequence[Parts], hidden: int, seed: int, level: float
) -> _Judged:
    """Measure, on held-out halves, what directions made on the other halves are worth."""
    flagged_NR, twins_NR = np.split(states_MR, 2)
    return _Judged(
        separation=separation(flagged_NR, twins_NR, groups_N, parts, mean_difference, level),
        components=components(flagged_NR, twins_NR, groups_N, parts, seed=seed, level=level),
        erasure=erasure(flagged_NR, twins_NR, groups_N, parts[0], hidden, level=level),
    )


def _tensors(named: dict[str, Array], states_MD: Array) -> dict[str, Array]:
    """Return the unit directions of one layer under their names in the file."""
    flagged_ND, twins_ND = np.split(states_MD, 2)
    renamed = {DIRECTION if name == REFUSAL else name: unit(vector) for name, vector in named.items()}
    return {**renamed, FIRST_COMPONENT: principal(flagged_ND - twins_ND, 1)[0]}


def _over_layers(tensors: list[dict[str, Array]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([found[name] for found in tensors])).float() for name in tensors[0]}
