"""What gtqlora remembers for a user between commands, outside of runs and models, which may be strangers'."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """`$XDG_STATE_HOME/gtqlora`, by default under the home directory; None where there is no home."""
    given = os.environ.get("XDG_STATE_HOME")
    if given and Path(given).is_absolute():
        return Path(given) / "gtqlora"
    try:
        return Path.home() / ".local" / "state" / "gtqlora"
    except RuntimeError:
        return None
