# pyright: strict
"""Records about directions in the residual stream, layer by layer; the directions are tensors beside them."""

from __future__ import annotations

from dataclasses import dataclass

from gtqlora.stats import Interval


@dataclass(frozen=True)
class Cosine:
    """Cosine of the angle between two named directions; None: too few groups, or one of them has no length."""

    first: str
    second: str
    value: Interval | None


@dataclass(frozen=True, kw_only=True)
class Components:
    """Principal components of the paired differences, made from the fit half, judged on the held-out half.

    Attributes:
        share_mean: share of the differences' squared length (their second moment about 0) along the difference of
            means; bootstrap interval over groups.
        shares: the same along each of the first components.
        cosine: between the difference of means and the first component.
        separation: AUROC along the first component.
    """

    share_mean: Interval
    shares: list[Interval]
    cosine: float
    separation: Interval


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """Held-out AUROC of a linear probe before, without the difference of means, and after LEACE; and what they cost.

    Both map states to themselves modulo the same vector, so what a linear probe can find after them is the same; what
    it does find is what the fit half could not pin down. They differ in what else they take away.

    Attributes:
        mean_removed_cost, leace_cost: share of the held-out states' variance that is taken away.
    """

    before: Interval
    mean_removed: Interval
    leace: Interval
    mean_removed_cost: float
    leace_cost: float


@dataclass(frozen=True, kw_only=True)
class LayerDirections:
    """One layer; statements are None with too few groups to judge on, or where the states do not differ.

    Attributes:
        layer: 0 is the embedding.
        norm: length of the refusal direction before it is normalized.
        norms: of the other named directions.
        separation: held-out AUROC along the difference of means, the mean over several splits.
        cosines: between all named directions.
    """

    layer: int
    norm: float
    norms: dict[str, float]
    separation: Interval | None
    components: Components | None
    erasure: Erasure | None
    cosines: list[Cosine]


@dataclass(frozen=True, kw_only=True)
class DirectionStudy:
    """What is known of the directions at every layer, and on how many pairs and groups of pairs that stands.

    Attributes:
        cosines, cosines_not_told: how many there are over all layers, and how many of them have no value as a direction
            was too short to tell from noise. Those that are told are of long directions, and so a little too large.
    """

    n_pairs: int
    n_groups: int
    cosines: int
    cosines_not_told: int
    layers: list[LayerDirections]
