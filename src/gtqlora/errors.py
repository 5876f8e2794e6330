"""The errors that a user can mend. Each message is one line that names the file, row or key, and the fix."""

from __future__ import annotations


class GtqloraError(Exception):
    """The base of all errors that the command line prints without a traceback; `exit_code` is what it exits with."""

    exit_code = 2


class ConfigError(GtqloraError):
    """A setting is unknown, malformed or out of range."""


class JudgeError(ConfigError):
    """A judge cannot be had, or fails.

    Attributes:
        judge: its name.
        problem: what is wrong and what mends it, without a key and a name.
        key: the setting that names it.
    """

    def __init__(self, judge: str, problem: str, *, key: str = "judge") -> None:
        """Put key and name before the problem."""
        super().__init__(f"{key} = {judge!r}: {problem}")
        self.judge, self.problem, self.key = judge, problem, key


class ModelError(GtqloraError):
    """A model folder is missing, corrupt, dense, of an unknown family, or holds bad weights."""


class ContrastError(GtqloraError):
    """A contrast set breaks its schema or the one-way rule."""


class TemplateRefusal(ContrastError):
    """A chat template refuses messages; `said` is why, in its own words."""

    def __init__(self, said: str) -> None:
        super().__init__(f"the chat template refuses these messages ({said})")
        self.said = said


class RunError(GtqloraError):
    """A run directory cannot be used: unwritable, locked, or an artefact is missing."""


class RankError(GtqloraError):
    """Several processes that run one command do not agree, or one of them has gone."""


class TrainingError(GtqloraError):
    """Training went wrong: a loss that is not finite, collapsed routing, or a violated invariant."""

    exit_code = 3


class FloorError(GtqloraError):
    """The safety floor was not certified, so no weights leave."""

    exit_code = 4
