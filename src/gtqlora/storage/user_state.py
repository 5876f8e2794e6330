"""Where gtqlora remembers things for a user between commands: outside of runs and models, which may be a stranger's."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """Return `$XDG_STATE_HOME/gtqlora`, by default `~/.local/state/gtqlora`; None where there is no home directory."""
    # The XDG specification has relative values ignored.
    given = os.environ.get("XDG_STATE_HOME")
    if given and Path(given).is_absolute():
        return Path(given) / "gtqlora"
    try:
        return Path.home() / ".local" / "state" / "gtqlora"
    except RuntimeError:
        return None
