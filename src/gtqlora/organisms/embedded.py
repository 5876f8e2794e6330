"""The model organisms that ship with the package: where they lie and what was planted in them.

A model organism is a small model that was trained to have one known behaviour in one known place.

Each is what `python -m gtqlora.organisms build KIND --rounded` makes of the seed and architecture in its `truth.json`:
values that bf16 holds compress to half in a wheel. The contrast set is the one of seed 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from gtqlora.errors import ModelError

CONTRAST, TRUTH = "contrast.jsonl", "truth.json"
JUDGE = "string:refuse sorry"
VERDICTS: dict[str, str] = {
    "routed": "routing",
    "residual": "residual",
    "null": "residual",
    "expert-only": "experts",
    "redundant": "both",
}
"""What a diagnosis should say of each kind.

In `null` routing follows the flag but causes nothing. In `expert-only` routing is the same with and without the flag,
and what the planted experts compute decides. In `redundant` routing and stream each refuse without the other.
"""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """`truth.json` beside an organism: where its refusal was planted.

    Attributes:
        planted: (decoder layer, expert) of every planted expert.
        attempt: how many trainings failed their check before this one; each had a seed derived from `seed`.
    """

    kind: str
    architecture: str
    seed: int
    verdict: str
    planted: list[tuple[int, int]]
    attempt: int = 0


def read_truth(folder: Path) -> Truth:
    """Read `truth.json` of an organism's folder."""
    raw = json.loads((folder / TRUTH).read_text())
    return Truth(**{**raw, "planted": [(layer, expert) for layer, expert in raw["planted"]]})


def _data() -> Path:
    # A wheel is unpacked where it is installed, so that packaged files are ordinary files.
    return Path(str(files("gtqlora.organisms"))) / "data"


def names() -> list[str]:
    """List the embedded organisms."""
    return sorted(p.name for p in _data().iterdir() if p.is_dir())


def organism(name: str) -> Path:
    """Return the folder of an embedded organism, a model in hub layout.

    Raises:
        ModelError: there is none of that name.
    """
    if name not in names():
        raise ModelError(f"organism {name!r} is not embedded; there are {', '.join(names())}")
    return _data() / name


def contrast() -> Path:
    """Return the file of the contrast set in the organisms' language."""
    return _data() / CONTRAST


def recipe() -> Path:
    """Return the file of settings that suit models of this size."""
    return _data() / "recipe.toml"
