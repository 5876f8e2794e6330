"""Two judges at once: both have to say the same, else an answer is undecided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gtqlora.errors import JudgeError
from gtqlora.judging.judge import NamedJudge, judge_of
from gtqlora.judging.labels import UNDECIDED, Judgement, Label
from gtqlora.judging.messages import Messages


@dataclass(frozen=True)
class JudgePair(NamedJudge):
    """Two judges that are asked about the same answers; whether answers come to the same is the first one's to tell."""

    first: NamedJudge
    second: NamedJudge

    @property
    def judges(self) -> tuple[NamedJudge, ...]:
        """Return both."""
        return self.first, self.second

    @property
    def is_code(self) -> bool:
        """Tell whether one of them is the user's own code."""
        return self.first.is_code or self.second.is_code

    @property
    def by_phrases(self) -> bool:
        """Tell whether both look for phrases."""
        return self.first.by_phrases and self.second.by_phrases

    def labels_by(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[tuple[Label, ...]]:
        """Return what each of the two says of each answer."""
        first = self.first(prompts, answers)
        with _second():
            second = self.second(prompts, answers)
        return [(one.label, other.label) for one, other in zip(first, second, strict=True)]

    def joint(self, said: Sequence[Label]) -> Label:
        """Return what both say of one answer, and undecided where they differ.

        One that only objects has no part in it where it does not.
        """
        # An answer without words or inside its thought is undecided to both, so that a guard's silence lifts nothing.
        told = zip(self.judges, said, strict=True)
        opinions: set[Label] = {label for judge, label in told if label != UNDECIDED or not judge.objects_only}
        return next(iter(opinions)) if len(opinions) == 1 else UNDECIDED

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Judgement]:
        """Return what both say of every answer.

        Raises:
            JudgeError: a judge fails, or does not reply for every answer.
        """
        return [Judgement(self.joint(said)) for said in self.labels_by(prompts, answers)]


@contextmanager
def _second() -> Iterator[None]:
    """Report what is wrong with a judge as that of the setting `second_judge`.

    Raises:
        JudgeError: there was something.
    """
    try:
        yield
    except JudgeError as error:
        raise JudgeError(error.judge, error.problem, key="second_judge") from error


def judges_of(first: str, second: str | None = None) -> NamedJudge:
    """Build the judge of a name, or of two names one that asks both.

    Raises:
        JudgeError: as `judge_of`.
    """
    one = judge_of(first)
    if second is None:
        return one
    with _second():
        other = judge_of(second)
    return JudgePair(f"{first} + {second}", one.judge, f"{one.identity} + {other.identity}", one, other)
