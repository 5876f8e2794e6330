"""Everything a user can mend is a `GtqloraError`: one line that names the file, row or key, and the fix."""

from __future__ import annotations


class GtqloraError(Exception):
    """Base of every error the command line prints without a traceback."""

    exit_code = 2


class ConfigError(GtqloraError):
    """A setting is unknown, malformed or out of range."""


class ModelError(GtqloraError):
    """A model folder is missing, corrupt, dense, of an unknown family, or holds bad weights."""


class ContrastError(GtqloraError):
    """A contrast set breaks its schema or the one-way rule."""


class RunError(GtqloraError):
    """A run directory cannot be used: unwritable, locked, or an artefact is missing."""


class TrainingError(GtqloraError):
    """Training went wrong: NaN, routing collapse, or a violated invariant."""

    exit_code = 3


class FloorError(GtqloraError):
    """The safety floor was not certified, so no weights leave."""

    exit_code = 4
