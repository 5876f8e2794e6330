"""What a judge is, and how the judge of a name is made: from phrases, a model (`models`), or the user's own code.

A judge reads prompts with their answers, many at once, and gives each answer a label (`labels`): refusal, partial,
answer, evasion or undecided. One of your own is named `package.module:name`, and `name` is one of these:

- a function of one text, `text -> reply`; it is asked about one answer after another;
- a function of two arguments, `(prompts, answers) -> [reply, ...]`;
- a class, or a function without arguments, that makes either of them. It is called once in a stage, and is the place
  to load a classifier and to put it on a device of its own: gtqlora neither moves it nor runs it elsewhere.

A reply is True for a refusal, False for an answer, None for no opinion, a label's name, or a `Judgement`.

    class Classifier:
        model, revision = "org/refusal-classifier", "1f3c9d0"  # texts; they go into the judge's identity

        def __init__(self) -> None:
            self.network = load(self.model, self.revision).to("cuda:1")

        def __call__(self, prompts, answers):
            return ["refusal" if score > 0.5 else "answer" for score in self.network(prompts, answers)]

        def same(self, answers, others):  # may be left out; then two answers are the same if a reader sees the same
            return [score > 0.5 for score in self.network.alike(answers, others)]

A judge reads answers without the thoughts before them. It is never asked about an empty answer or one that ended
inside its thought, which are undecided, nor about more than `MOST_AT_ONCE` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from gtqlora.config import is_code
from gtqlora.config.judges import MODELS, kind_of
from gtqlora.errors import GtqloraError, JudgeError
from gtqlora.judging import trust
from gtqlora.judging.english import WINDOW, any_of, opening
from gtqlora.judging.folding import flat
from gtqlora.judging.labels import REFUSAL, UNDECIDED, Judgement, Label, judgement_of
from gtqlora.judging.messages import Message, Messages
from gtqlora.judging.names import FORMS, check_known, remedy
from gtqlora.judging.string_judge import EDITION, StringJudge
from gtqlora.judging.thoughts import final
from gtqlora.progress import track
from gtqlora.ranks import by_leader
from gtqlora.storage.contents import fingerprint, first_line

__all__ = [
    "MOST_AT_ONCE",
    "Comparing",
    "Judge",
    "Message",
    "Messages",
    "NamedJudge",
    "Remembering",
    "TextJudge",
    "judge_of",
    "labels",
    "refusals",
    "same",
]

MOST_AT_ONCE = 256
"""Answers that a judge gets in one call at most, so that a classifier's batch fits on its device."""
_MODEL_AT_ONCE = 32
"""Answers that a judge which is a model gets in one call: it batches them itself, and progress is shown in between."""

_QUICK = 64
"""Calls that phrases answer in a second or two."""


class Judge(Protocol):
    """Tells refusals from answers."""

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> Sequence[object]:
        """Reply to every answer to its prompt, in their order."""
        ...


@runtime_checkable
class Comparing(Protocol):
    """A judge that can also tell whether two answers come to the same, however they are worded."""

    def same(self, answers: Sequence[str], others: Sequence[str]) -> Sequence[bool]:
        """Tell of each answer whether it does what the other does."""
        ...


def labels(judge: Judge, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Label]:
    """Return what each answer to its prompt is."""
    return [judgement_of(reply).label for reply in judge(prompts, answers)]


def refusals(judge: Judge, prompts: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
    """Return whether each answer to its prompt refuses, in full."""
    return [label == REFUSAL for label in labels(judge, prompts, answers)]


def same(judge: Judge, answers: Sequence[str], others: Sequence[str]) -> list[bool]:
    """Return whether each answer does what the other does, as far as the judge can tell."""
    return list(judge.same(answers, others)) if isinstance(judge, Comparing) else _equal(answers, others)


def _equal(answers: Sequence[str], others: Sequence[str]) -> list[bool]:
    return [flat(answer) == flat(other) for answer, other in zip(answers, others, strict=True)]


@dataclass(frozen=True)
class TextJudge:
    """A judge that reads one answer after another, and no prompt."""

    function: Callable[[str], object]

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[object]:
        """Judge every answer by itself."""
        return [self.function(answer) for answer in answers]


@dataclass(frozen=True)
class Remembering:
    """A judge that is asked once about each answer, however often the same prompts are looked at."""

    judge: Judge
    _known: dict[tuple[int, str], tuple[Messages, object]] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[object]:
        """Judge every answer that is new."""
        # a prompt is known by its place in memory, which it keeps as long as it is held here
        keys = [(id(prompt), answer) for prompt, answer in zip(prompts, answers, strict=True)]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._known}
        replies = self.judge(list(new.values()), [answer for _, answer in new])
        self._known.update(zip(new, zip(new.values(), replies, strict=True), strict=True))
        return [self._known[key][1] for key in keys]


@dataclass(frozen=True)
class NamedJudge:
    """A judge with its name: what it is asked and what it replies is checked.

    Attributes:
        identity: what it is; another one means that its verdicts are another judge's. See `trust.identity`.
    """

    name: str
    judge: Judge
    identity: str

    @property
    def is_code(self) -> bool:
        """Tell whether it is the user's own code, and neither phrases nor a model."""
        return is_code(self.name)

    @property
    def by_phrases(self) -> bool:
        """Tell whether it looks for phrases, so that it can be asked about pieces of text of any length."""
        return kind_of(self.name) == "string"

    @property
    def objects_only(self) -> bool:
        """Tell whether it finds answers that should not have been given, and has no opinion of any other."""
        return bool(getattr(_told(self.judge), "objects_only", False))

    @property
    def judges(self) -> tuple[NamedJudge, ...]:
        """Return the judges that are asked: itself, or both of a pair."""
        return (self,)

    def labels_by(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[tuple[Label, ...]]:
        """Return what each of the judges that are asked says of each answer."""
        return [(judgement.label,) for judgement in self(prompts, answers)]

    def joint(self, said: Sequence[Label]) -> Label:
        """Return what the judges that are asked say together of one answer."""
        (label,) = said
        return label

    @property
    def comparing(self) -> Comparing | None:
        """Return the judge where it has a `same` of its own."""
        told = _told(self.judge)
        return told if isinstance(told, Comparing) else None

    def same(self, answers: Sequence[str], others: Sequence[str]) -> list[bool]:
        """Tell whether answers come to the same: by the judge's own `same`, else if a reader sees the same words.

        Raises:
            JudgeError: the judge's `same` fails, or does not reply with True or False for every pair.
        """
        found = _equal(answers, others)
        unlike = [i for i, equal in enumerate(found) if not equal] if self.comparing else []
        for start in range(0, len(unlike), MOST_AT_ONCE):
            chosen = unlike[start : start + MOST_AT_ONCE]
            replies = self._compare([answers[i] for i in chosen], [others[i] for i in chosen])
            for i, reply in zip(chosen, replies, strict=True):
                found[i] = bool(reply)
        return found

    def _compare(self, answers: list[str], others: list[str]) -> Sequence[bool]:
        return by_leader(lambda: [bool(reply) for reply in self._compared(answers, others)])

    def _compared(self, answers: list[str], others: list[str]) -> Sequence[bool]:
        assert self.comparing is not None
        try:
            replies = list(self.comparing.same(answers, others))
        except GtqloraError:
            raise
        except Exception as error:  # it is the user's code, which may raise anything
            what = f"{type(error).__name__}: {first_line(error)}"
            raise JudgeError(self.name, f"its `same` failed: {what}") from error
        if len(replies) != len(answers) or any(type(reply).__name__ not in ("bool", "bool_") for reply in replies):
            raise JudgeError(self.name, "its `same` must return True or False for each of the answers")
        return replies

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[Judgement]:
        """Judge every answer without its thoughts, `MOST_AT_ONCE` at a time; what is empty then is undecided.

        Raises:
            JudgeError: the judge fails, or does not reply for every answer.
        """
        found, finals = [Judgement(UNDECIDED)] * len(answers), [final(answer) or "" for answer in answers]
        said = [i for i, answer in enumerate(finals) if answer.strip()]
        for chosen in self._parts(said):
            replies = self._ask([prompts[i] for i in chosen], [finals[i] for i in chosen])
            for i, judgement in zip(chosen, replies, strict=True):
                found[i] = judgement
        return found

    def _parts(self, asked: list[int]) -> Iterable[list[int]]:
        """Return what is asked about in each call, shown as progress unless it takes no time."""
        is_model = kind_of(self.name) in MODELS
        most = _MODEL_AT_ONCE if is_model else MOST_AT_ONCE
        parts = [asked[start : start + most] for start in range(0, len(asked), most)]
        quick = len(parts) < (_QUICK if self.by_phrases else 2) and not is_model
        return parts if quick or not parts else track(parts, f"asking {self.name}", len(parts))

    def _ask(self, prompts: list[Messages], answers: list[str]) -> list[Judgement]:
        if self.by_phrases:
            return self._replies(prompts, answers)
        # a server is asked once, and a model that judges need not say the same on every rank
        said: list[tuple[Label, float | None]] = by_leader(
            lambda: [(reply.label, reply.score) for reply in self._replies(prompts, answers)]
        )
        return [Judgement(label, score) for label, score in said]

    def _replies(self, prompts: list[Messages], answers: list[str]) -> list[Judgement]:
        try:
            replies = self.judge(prompts, answers)
        except GtqloraError:
            raise
        except Exception as error:  # it is the user's code, which may raise anything
            raise JudgeError(self.name, f"it failed: {type(error).__name__}: {first_line(error)}") from error
        if isinstance(replies, str) or not isinstance(replies, Sequence):
            raise JudgeError(self.name, f"it returned {type(replies).__name__}; it must return a list")
        if len(replies) != len(answers):
            raise JudgeError(self.name, f"it returned {len(replies)} replies to {len(answers)} answers")
        try:
            return [judgement_of(reply) for reply in replies]
        except TypeError as error:
            raise JudgeError(self.name, str(error)) from error


def judge_of(name: str) -> NamedJudge:
    """Build the judge of that name; call it once in a stage, as a judge of code may load a classifier.

    Raises:
        JudgeError: the name has none of the forms, holds no phrase, or its code cannot be imported or built.
        ModelError: the model that it names cannot be had.
    """
    check_known(name)
    if name == "string":
        return NamedJudge(name, StringJudge(), f"{name} edition {EDITION}")
    if name.startswith("string:"):
        return NamedJudge(name, _phrase_judge(name), name)
    if (kind := kind_of(name)) in MODELS:
        judge = _model(kind, name)
        return NamedJudge(name, judge, f"{name} {judge.digest}")
    judge = _built(name, _imported(name))
    return NamedJudge(name, judge, trust.identity(name) + _weights(judge))


def _phrase_judge(name: str) -> TextJudge:
    phrases = [phrase for phrase in name.removeprefix("string:").split("|") if flat(phrase)]
    if not phrases:
        raise JudgeError(name, f"no phrase after the colon; use {FORMS}")
    too_long = next((phrase for phrase in phrases if len(flat(phrase)) > WINDOW), None)
    if too_long:
        raise JudgeError(
            f"{name[:30]}...",
            f"the phrase {too_long[:30]!r}... is longer than the {WINDOW} characters it is sought in",
        )
    pattern = any_of(phrases)
    return TextJudge(lambda text: bool(pattern.search(opening(text))))


# --- models


class ModelJudge(Judge, Protocol):
    """A judge that is a model; `digest` says which weights, or which instructions, judge."""

    @property
    def digest(self) -> str:
        """Return what makes it another judge under the same name."""
        ...


def _model(kind: str, name: str) -> ModelJudge:
    # Imported now: models take seconds to import, and phrases need none.
    if kind == "classifier":
        from gtqlora.judging.models.classifier import classifier as maker
    elif kind == "chat":
        from gtqlora.judging.models.chat import chat as maker
    elif kind == "wildguard":
        from gtqlora.judging.models.guards import wildguard as maker
    else:
        from gtqlora.judging.models.guards import llama_guard as maker
    return maker(name)


# --- the user's own code


def _imported(name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise JudgeError(name, f"cannot import ({error}); is it on PYTHONPATH? Or {remedy(name)}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise JudgeError(name, f"{module_name} has no callable {attribute!r}")
    return found


def _built(name: str, found: Callable[..., object]) -> Judge:
    """Make a judge of what a name means; what makes one is called."""
    if inspect.isclass(found) or _takes(found) == 0:
        try:
            made = found()
        except Exception as error:  # it is the user's code, which may raise anything
            what = f"{type(error).__name__}: {first_line(error)}"
            raise JudgeError(name, f"cannot be built ({what}); it is called without arguments") from error
        if not callable(made):
            raise JudgeError(name, f"it makes a {type(made).__name__}, which cannot be called; use {FORMS}")
        found = made
    wanted = _takes(found)
    if wanted not in (1, 2):
        raise JudgeError(name, f"takes {wanted} arguments, not a text, or prompts and answers")
    return found if wanted == 2 else TextJudge(found)  # type: ignore[return-value]


def _takes(function: Callable[..., object]) -> int:
    """Return how many arguments a function has to get; one that can do without, or does not tell, gets 1 if it may."""
    told = getattr(function, "forward", function)  # a torch module says there, not in `__call__`, what it takes
    try:
        parameters = inspect.signature(told).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    needed = sum(p.default is p.empty and p.kind != p.VAR_POSITIONAL for p in positional)
    return max(needed, min(1, len(positional)))


def _told(judge: Judge) -> object:
    """Return the user's own object behind a judge."""
    return judge.function if isinstance(judge, TextJudge) else judge


def _weights(judge: Judge) -> str:
    """Return what a judge of code says of its weights: its `model` (a folder by its contents) and its `revision`."""
    told = _told(judge)
    model, revision = getattr(told, "model", None), getattr(told, "revision", None)
    found = []
    if isinstance(model, str):
        # os.path: a name that no file can have, such as a long one, is no error there
        found.append(f" model:{fingerprint(model) if os.path.exists(model) else model}")
    if isinstance(revision, str):
        found.append(f" revision:{revision}")
    return "".join(found)
