"""Make residual directions by name, and measure the angles between them.

Every direction but the orthogonalized one is a difference of means, that is a weighted sum of the states. Leaving a
group out, as the jackknife does, changes the weights and not the states.

Shape letters: N pairs, M = 2N states (the flagged ones, then their twins), L states of a token (the embedding and
every decoder layer), D hidden size or coordinates, G groups.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats as st
from torch import Tensor

from gtqlora.errors import ModelError
from gtqlora.results.directions import Cosine
from gtqlora.stats import Interval

REFUSAL = "refusal"
"""All flagged prompts less their twins."""
FALSE_REFUSAL = "false_refusal"
"""Lookalike prompts less their twins."""
TRUE_REFUSAL = "true_refusal"
"""Harmful prompts less their twins."""
INTENT = "intent"
"""Harmful prompts less the lookalike ones of the same group."""
ORTHOGONAL = "false_refusal_orthogonal"
"""False refusal without its part along true refusal."""

MIN_GROUPS = 8
"""With fewer groups (pair_ids) nothing is said."""

Array = NDArray[np.float64]

# Shorter than this share of the states' length is fp32 rounding.
ROUNDING = 1e-6


def stacked(states_NLD: Tensor, twins_NLD: Tensor) -> Tensor:
    """Return states_MLD: the flagged prompts' states, then their twins'.

    Raises:
        ModelError: a state is not finite; the message names the layer.
    """
    states_MLD = torch.cat([states_NLD, twins_NLD])
    finite_L = torch.isfinite(states_MLD).all(-1).all(0)
    if not finite_L.all():
        layer = int(finite_L.int().argmin())
        where = f"after layer {layer}" if layer else "of the embedding"
        raise ModelError(f"the residual states {where} hold NaN or infinity; check the model's weights and dtype")
    return states_MLD


def named_directions(
    states_NLD: Tensor, twins_NLD: Tensor, kinds: Sequence[str], groups: Sequence[str]
) -> dict[str, Tensor]:
    """Return direction_LD by name in fp32, of unit length, or 0 at a layer where the two means are the same.

    Without lookalike rows there is no `false_refusal`, without harmful ones no `true_refusal`, and so on.

    Raises:
        ModelError: a state is not finite; the message names the layer.
    """
    states_MLD = stacked(states_NLD, twins_NLD)
    weights = contrasts_of(kinds, groups)
    layers = [named_at(weights, states_MLD[:, layer].double().numpy()) for layer in range(states_MLD.shape[1])]
    return {name: torch.from_numpy(np.stack([unit(found[name]) for found in layers])).float() for name in layers[0]}


def contrasts_of(kinds: Sequence[str], groups: Sequence[str]) -> dict[str, Array]:
    """Return weights_M by name: their product with the states is a difference of means (Arditi et al., 2406.11717)."""
    kind_N = np.asarray(kinds)
    lookalike_N, harmful_N = kind_N == "lookalike", kind_N == "harmful"
    found = {REFUSAL: _less_twins(np.ones(len(kind_N), dtype=bool))}
    if lookalike_N.any():
        found[FALSE_REFUSAL] = _less_twins(lookalike_N)
    if harmful_N.any():
        found[TRUE_REFUSAL] = _less_twins(harmful_N)
    group_N = np.asarray(groups)
    both = np.intersect1d(group_N[lookalike_N], group_N[harmful_N])
    if len(both):
        among_N = np.isin(group_N, both)
        means_N = _group_means(group_N, harmful_N & among_N) - _group_means(group_N, lookalike_N & among_N)
        found[INTENT] = np.concatenate([means_N, np.zeros(len(kind_N))])
    return found


def _less_twins(rows_N: NDArray[np.bool_]) -> Array:
    share_N = rows_N / rows_N.sum()
    return np.concatenate([share_N, -share_N])


def _group_means(group_N: NDArray[np.str_], rows_N: NDArray[np.bool_]) -> Array:
    """Return weights_N of the mean over groups of the means of their rows."""
    _, place, sizes = np.unique(group_N[rows_N], return_inverse=True, return_counts=True)
    weights_N = np.zeros(len(group_N))
    weights_N[rows_N] = 1 / (sizes[place] * len(sizes))
    return weights_N


def named_at(weights: dict[str, Array], states_MD: Array) -> dict[str, Array]:
    """Return the difference of means by name, not normalized, from weights [..., M]; what is mere rounding is 0."""
    found = {name: weights_M @ states_MD for name, weights_M in weights.items()}
    if FALSE_REFUSAL in found and TRUE_REFUSAL in found:
        true, false = unit(found[TRUE_REFUSAL]), found[FALSE_REFUSAL]
        found[ORTHOGONAL] = false - (false * true).sum(-1, keepdims=True) * true
    least = ROUNDING * np.linalg.norm(states_MD, axis=1).max()
    return {name: np.where(_length(vector) > least, vector, 0.0) for name, vector in found.items()}


def _length(vector: Array) -> Array:
    return np.linalg.norm(vector, axis=-1, keepdims=True)


def unit(vector: Array) -> Array:
    """Scale vectors to length 1 along the last axis; 0 stays 0."""
    length = _length(vector)
    return vector / np.where(length > 0, length, 1.0)


def leave_one_out(kinds: Sequence[str], groups: Sequence[str]) -> dict[str, Array]:
    """Return weights_GM by name, each row without one group; names made by too few groups are left out."""
    kind_N, group_N = np.asarray(kinds), np.asarray(groups)
    weights = contrasts_of(kinds, groups)
    names = [name for name in weights if len(set(np.tile(group_N, 2)[weights[name] != 0])) >= MIN_GROUPS]
    out: dict[str, list[Array]] = {name: [] for name in names}
    for group in np.unique(group_N) if names else ():
        kept_N = group_N != group
        less = contrasts_of(kind_N[kept_N].tolist(), group_N[kept_N].tolist())
        for name in names:
            weights_M = np.zeros(2 * len(group_N))
            weights_M[np.tile(kept_N, 2)] = less[name]
            out[name].append(weights_M)
    return {name: np.stack(rows) for name, rows in out.items()}


def cosines(weights: dict[str, Array], without: dict[str, Array], states_MD: Array, *, level: float) -> list[Cosine]:
    """Estimate the cosines between all named directions at one layer, in the population that groups are drawn from.

    Noise in the means makes directions longer and, where two share states, more alike; a plain cosine keeps that bias.
    So inner products are jackknifed, which removes it exactly for means, and cosines get the jackknife's interval over
    pseudo-values (Efron, SIAM 1982, chapters 2 and 3).

    Args:
        weights, without: from `contrasts_of` and `leave_one_out`.
        states_MD: of unit spread.
    """
    known = _angles(weights, without, states_MD, float(st.norm.ppf(0.5 + level / 2))) if without else {}
    names = [*weights, ORTHOGONAL] if _has_orthogonal(weights) else list(weights)
    return [Cosine(first=a, second=b, value=known.get((a, b))) for a, b in combinations(names, 2)]


def _has_orthogonal(names: Collection[str]) -> bool:
    return FALSE_REFUSAL in names and TRUE_REFUSAL in names


def _angles(
    weights: dict[str, Array], without: dict[str, Array], states_MD: Array, z: float
) -> dict[tuple[str, str], Interval]:
    """Return the cosines between those of the K directions whose length is clearly above 0."""
    whole_KD = np.stack([weights[name] for name in without]) @ states_MD
    less_GKD = np.stack(list(without.values()), axis=1) @ states_MD
    n = len(less_GKD)
    pseudo_GKK = n * _inner(whole_KD) - (n - 1) * _inner(less_GKD)
    mean_KK = pseudo_GKK.mean(0)
    # Entry 0 is the mean of all pseudo-values, entries 1 to n are the means that leave one group out.
    inner, names = np.concatenate([mean_KK[None], (n * mean_KK - pseudo_GKK) / (n - 1)]), list(without)
    if _has_orthogonal(names):
        inner, names = _orthogonal_too(inner, names), [*names, ORTHOGONAL]
    squares = np.diagonal(inner, axis1=1, axis2=2)
    long = squares[0] > z * _jackknife_error(squares[1:]) + ROUNDING**2
    lengths = np.sqrt(np.maximum(squares, ROUNDING**2))
    cosine = inner / (lengths[:, :, None] * lengths[:, None, :])
    half = z * _jackknife_error(cosine[1:])
    value, low, high = np.clip([cosine[0], cosine[0] - half, cosine[0] + half], -1.0, 1.0)
    return {
        (names[i], names[j]): Interval(float(value[i, j]), float(low[i, j]), float(high[i, j]), n)
        for i, j in combinations(np.flatnonzero(long), 2)
    }


def _inner(directions: Array) -> Array:
    return directions @ np.swapaxes(directions, -1, -2)


def _orthogonal_too(inner: Array, names: list[str]) -> Array:
    """Return inner products [..., K + 1, K + 1], with those of the orthogonalized direction at the end."""
    # It is a combination of the other directions, so its inner products follow from theirs.
    false, true = names.index(FALSE_REFUSAL), names.index(TRUE_REFUSAL)
    basis = np.broadcast_to(np.eye(len(names) + 1, len(names)), (*inner.shape[:-2], len(names) + 1, len(names))).copy()
    basis[..., -1, false] = 1.0
    basis[..., -1, true] = -inner[..., false, true] / np.maximum(inner[..., true, true], ROUNDING**2)
    return basis @ inner @ np.swapaxes(basis, -1, -2)


def _jackknife_error(without_one: Array) -> Array:
    """Return the standard error from estimates that leave one group out, along the first axis."""
    return np.sqrt((len(without_one) - 1) * without_one.var(0))
