"""One-sided tests that means are above zero, of values that come in groups.

Shape letters: N values, G groups, F random signs.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats as st

from gtqlora.stats.intervals import Groups, group_means

T_GROUPS = 25
"""From so many groups on, the mean is tested by Student's t; below, by turning signs."""

# All sign patterns of up to 12 groups are gone through, and this many random ones of more.
_EXACT_GROUPS, _PATTERNS = 12, 10_000


def mean_above_zero(values_N: NDArray[np.floating], groups: Groups) -> float:
    """Return the one-sided p-value that the mean over groups is above zero.

    From `T_GROUPS` groups on it is that of Student's t. Below, it is the share of patterns of signs that make the mean
    as high (Fisher, The Design of Experiments, 1935, section 21), which is exact for values that are symmetric about
    their mean, however heavy their tails are; random patterns count the one that was seen (Phipson & Smyth, Stat.
    Appl. Genet. Mol. Biol. 9:39, 2010).
    """
    means_G = group_means(values_N, groups)
    # nothing varies from zero, so nothing can be said
    if len(means_G) < 2 or not np.any(np.abs(means_G) > 1e-12):
        return 1.0
    if len(means_G) >= T_GROUPS and means_G.std() > 1e-12:
        return float(st.t.sf(means_G.mean() / (means_G.std(ddof=1) / np.sqrt(len(means_G))), df=len(means_G) - 1))
    signs_FG = _signs(len(means_G))
    # rounding must not make a pattern with the same sum count as lower
    as_high = signs_FG @ means_G >= means_G.sum() - 1e-9 * np.abs(means_G).sum()
    return float(as_high.mean())


@cache
def _signs(count: int) -> NDArray[np.floating]:
    """Return all patterns of signs, or random ones of which the first is the one that was seen."""
    if count <= _EXACT_GROUPS:
        return np.array(list(product((1.0, -1.0), repeat=count)))
    signs_FG = np.random.default_rng(0).choice((1.0, -1.0), size=(_PATTERNS, count))
    signs_FG[0] = 1.0
    return signs_FG
