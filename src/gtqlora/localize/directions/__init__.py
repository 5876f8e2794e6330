"""Directions in the residual stream that go with refusal.

`named` makes them as differences of means, `separability` measures how well one tells flagged prompts from twins,
`erasure` what a probe still finds once it is erased, and `layers` puts all of it together for every layer.
"""

from gtqlora.localize.directions.layers import Directions, study
from gtqlora.localize.directions.named import MIN_GROUPS, named_directions

__all__ = ["MIN_GROUPS", "Directions", "named_directions", "study"]
