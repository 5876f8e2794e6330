"""Intervals, paired tests, multiplicity control and the safety floor; numpy in, frozen dataclass out."""

from gtqlora.stats.intervals import (
    Groups,
    Interval,
    benjamini_hochberg,
    fewest_changed,
    group_means,
    mcnemar,
    one_sided,
    paired_difference,
    rate,
)
from gtqlora.stats.means import T_GROUPS, mean_above_zero
from gtqlora.stats.noninferiority import ADVISED_GROUPS, ADVISED_PROMPTS, Floor, fewest, floor
from gtqlora.stats.resampling import (
    bootstrap_mean,
    bootstrap_means,
    difference_of_means,
    edges,
    half_sample_means,
    mean_interval,
    ratio_interval,
    resampled,
)

__all__ = [
    "ADVISED_GROUPS",
    "ADVISED_PROMPTS",
    "T_GROUPS",
    "Floor",
    "Groups",
    "Interval",
    "benjamini_hochberg",
    "bootstrap_mean",
    "bootstrap_means",
    "difference_of_means",
    "edges",
    "fewest",
    "fewest_changed",
    "floor",
    "group_means",
    "half_sample_means",
    "mcnemar",
    "mean_above_zero",
    "mean_interval",
    "one_sided",
    "paired_difference",
    "rate",
    "ratio_interval",
    "resampled",
]
