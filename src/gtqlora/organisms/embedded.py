"""The model organisms that ship with the package: where they lie and what was planted in them.

A model organism is a small model that was trained to have one known behaviour in one known place.

Each is what `python -m gtqlora.organisms build KIND --rounded` makes of the seed and architecture in its `truth.json`:
values that bf16 holds compress to half in a wheel. The contrast set is the one of seed 0.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from gtqlora.errors import ModelError
from gtqlora.organisms.truth import read_truth as read_truth

CONTRAST = "contrast.jsonl"
JUDGE = "string:refuse sorry"


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
