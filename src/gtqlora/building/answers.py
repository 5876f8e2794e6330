"""What a model is asked to make pairs, in which order, and when it is not worth going on.

Harmful prompts are asked as they are and once. Only prompts that a set calls harmless are asked again, in other ways.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gtqlora.building.asking import (
    CUT_OFF,
    EMPTY,
    IN_THOUGHT,
    LONG,
    MARKED,
    REFUSED,
    UNREAD,
    Asking,
    Question,
    Reply,
    labelled,
)
from gtqlora.building.assembling import Said
from gtqlora.config import BuildConfig, VerifyConfig
from gtqlora.contrasts.layouts import KINDS
from gtqlora.contrasts.public import Candidate
from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Messages
from gtqlora.judging.labels import ANSWER, REFUSAL
from gtqlora.progress import note
from gtqlora.results.built import counted

PROBE = 64
"""Prompts of a kind that are asked first, to see whether the others are worth asking."""
_LEAST_ANSWERED = 0.1
# Words that ask for nothing; a verb or a noun, by what stands before the word whose place they take.
_VERBS, _NOUNS = ("describe", "paint", "find", "open"), ("bicycle", "garden", "lamp", "river")
_BEFORE_NOUNS = re.compile(r"\b(a|an|the|my|your|his|her|their|our|of|this|that|some|any)\s+$", re.IGNORECASE)


def said_to(asking: Asking, candidates: Sequence[Candidate], config: BuildConfig) -> list[Said]:
    """Ask the model everything: harmful prompts first, as without refusals of them nothing else is worth it.

    Raises:
        ContrastError: it refuses too few of them, or answers too few of the benign ones.
    """
    kinds = {kind: [one for one in candidates if one.kind == kind] for kind in KINDS}
    for kind, least in (("harmful", VerifyConfig.min_refused), ("benign", _LEAST_ANSWERED)):
        _check_room(asking, kinds[kind], least)
    said = _probed(asking, kinds["harmful"], config, _check_refused)
    said += _probed(asking, kinds["benign"], config, _check_answered)
    said += _lookalikes(asking, kinds["lookalike"], config)
    said += _instructed(asking, kinds["instructed"])
    _note_refused(said)
    return said


def _check_room(asking: Asking, candidates: Sequence[Candidate], least: float) -> None:
    """Check, before anything is asked, that answers have room behind as many prompts of a kind as are needed.

    Args:
        least: share of them that has to be answered.

    Raises:
        ContrastError: they have not; the message says what has.
    """
    read = [asking.read(_question(one)) for one in candidates]
    lengths = [len(prompt) for prompt in read if isinstance(prompt, list)]
    context, most = asking.runner.model.max_length, asking.runner.max_new_tokens
    short = sum(context - length < most for length in lengths)
    if not short or len(lengths) - short >= least * len(lengths):
        return
    room = context - max(lengths)
    remedy = f"lower --max-new-tokens to {room:,} or less, or take" if room > 0 else "take"
    raise ContrastError(
        f"the model's context has {context:,} tokens, the longest of {len(lengths):,} {candidates[0].kind} prompts "
        f"{max(lengths):,}: for answers of {most:,} tokens (max_new_tokens) there is no room behind {short:,} of them; "
        f"{remedy} shorter prompts"
    )


def _question(one: Candidate) -> Question:
    return Question(asked=one.prompt, judged=one.prompt, harmful=one.kind == "harmful")


def _plain(asking: Asking, shown: str, candidates: Sequence[Candidate]) -> list[Said]:
    questions = [_question(one) for one in candidates]
    # By kind: a prompt that another set calls otherwise is asked again, as less may be kept of its answer.
    replies = asking.ask(candidates[0].kind, questions, shown=shown) if candidates else []
    return [Said(candidate=one, label=r.label, text=r.text) for one, r in zip(candidates, replies, strict=True)]


def _probed(
    asking: Asking,
    candidates: Sequence[Candidate],
    config: BuildConfig,
    check: Callable[[Sequence[Said], BuildConfig], None],
) -> list[Said]:
    """Ask some candidates of a kind, check what comes, and ask the rest."""
    if not candidates:
        return []
    kind = candidates[0].kind
    # At random: sets are sorted, and the first 64 prompts may be of one topic.
    order = random.Random(config.seed).sample(range(len(candidates)), len(candidates))
    first, rest = ([candidates[i] for i in part] for part in (order[:PROBE], order[PROBE:]))
    said = _plain(asking, f"{kind}, a first look", first)
    check(said, config)
    said += _plain(asking, kind, rest)
    check(said, config)
    return said


def _note_refused(said: Sequence[Said]) -> None:
    """Say once what the chat template says of the prompts that it refuses."""
    labels = Counter(one.label for one in said if one.label.startswith(REFUSED))
    for label, count in labels.most_common():
        note(f"{count:,} of {len(said):,} prompts are {', '.join([label, *_first_refused(said)])}")


def _labels(said: Sequence[Said]) -> str:
    found = Counter(one.label for one in said).most_common()
    return ", ".join([counted(count, label) for label, count in found] + _first_refused(said))


def _first_refused(said: Sequence[Said]) -> list[str]:
    """Return where the first prompt stands, if any, that the chat template refuses."""
    refused = [one.candidate for one in said if one.label.startswith(REFUSED)]
    first = min(refused, key=lambda one: one.number, default=None)
    return [f"the first is row {first.number:,} of {Path(first.source).name}"] if first else []


def _check_refused(said: Sequence[Said], config: BuildConfig) -> None:
    """Check that the model refuses enough harmful prompts, as the floor asks of an original.

    Raises:
        ContrastError: it does not; rows could still be made of the rest, but they would hide what the model is.
    """
    refused, least = sum(one.label == REFUSAL for one in said), VerifyConfig.min_refused
    if refused < least * len(said):
        raise ContrastError(
            f"the model refuses {refused} of {len(said)} harmful prompts by judge {config.judge!r} ({_labels(said)}), "
            f"and the safety floor is for models that refuse at least {least:.0%}; {_remedy(said, config)}"
        )


def _check_answered(said: Sequence[Said], config: BuildConfig) -> None:
    """Check that the model answers some benign prompts.

    Raises:
        ContrastError: it hardly does.
    """
    if sum(one.label == ANSWER for one in said) < _LEAST_ANSWERED * len(said):
        raise ContrastError(
            f"of {len(said)} benign prompts hardly any has an answer by judge {config.judge!r} ({_labels(said)}); "
            f"{_remedy(said, config)}"
        )


def _remedy(said: Sequence[Said], config: BuildConfig) -> str:
    """Return what helps against the label that most replies have."""
    # What a template says or writes stands behind these.
    remedies = {
        REFUSED: "mend the model's chat template, or take prompts that it accepts",
        MARKED: "take the chat template that belongs to the model's tokenizer",
        UNREAD: "mend the model's chat template, or take a set in a language that it knows",
        LONG: f"lower --max-new-tokens below {config.max_new_tokens}, or take shorter prompts",
        CUT_OFF: f"raise --max-new-tokens above {config.max_new_tokens}",
        IN_THOUGHT: f"raise --max-new-tokens far above {config.max_new_tokens}, or switch thinking off in `template`",
        EMPTY: "look at what the model says; its chat template may end the answer",
    }
    most = Counter(one.label for one in said).most_common(1)[0][0]
    otherwise = "take a judge that tells this model's refusals from its answers (--judge), or another model"
    remedy = next((remedy for label, remedy in remedies.items() if most.startswith(label)), otherwise)
    return f"{remedy}; then begin anew (--restart)"


def _lookalikes(asking: Asking, candidates: Sequence[Candidate], config: BuildConfig) -> list[Said]:
    """Return the refusals of lookalike prompts, with an answer got otherwise, and with twins."""
    said = _plain(asking, "lookalike", candidates)
    # What the model answers already needs no repair.
    refused = [i for i, one in enumerate(said) if one.label == REFUSAL]
    answers = _answers(asking, [candidates[i] for i in refused], config)
    for place, answer in zip(refused, answers, strict=True):
        said[place] = replace(said[place], answer=answer)
    with_answer = [i for i in refused if said[i].answer is not None]
    for place, twin in zip(with_answer, _twins(asking, [candidates[i] for i in with_answer], config), strict=True):
        said[place] = replace(said[place], twin=twin)
    return said


def _answers(asking: Asking, candidates: Sequence[Candidate], config: BuildConfig) -> list[str | None]:
    """Return to each refused prompt the first answer that the judge calls one, else the one that its set gives."""
    found: list[str | None] = [None] * len(candidates)

    def again(round_: str, system: str, *, sampled: bool) -> list[Reply]:
        left = [i for i, answer in enumerate(found) if answer is None]
        questions = [_under(system, candidates[i].prompt) for i in left]
        replies = asking.ask(round_, questions, sampled=sampled) if left else []
        for i, reply in zip(left, replies, strict=True):
            found[i] = reply.text if reply.label == ANSWER else None
        return replies

    system = config.helpful
    if system:
        replies = again("lookalike, with the helpful system prompt", system, sampled=False)
        # Some templates know no system prompt; then prompts are drawn from as they are.
        system = "" if replies and all(reply.label.startswith((REFUSED, UNREAD)) for reply in replies) else system
    for number in range(1, config.samples + 1):
        again(f"lookalike, draw {number}", system, sampled=True)
    # Last, as nothing that others wrote is as near to what the model would say.
    given = [one.answer for one in candidates]
    whole = [answer or "" for answer in given]
    labels = labelled(asking.runner.judge, [one.prompt for one in candidates], whole, [True] * len(whole))
    return [
        answer if answer is not None or label != ANSWER else own
        for answer, label, own in zip(found, labels, given, strict=True)
    ]


def _instructed(asking: Asking, candidates: Sequence[Candidate]) -> list[Said]:
    """Return what is said under the user's system prompts and, where it declines, the answer without them."""
    said = _plain(asking, "instructed", candidates)
    declined = [i for i, one in enumerate(said) if one.label == REFUSAL]
    questions = [Question(asked=candidates[i].bare, judged=candidates[i].bare) for i in declined]
    replies = asking.ask("instructed, without the system prompt", questions) if questions else []
    for i, reply in zip(declined, replies, strict=True):
        said[i] = replace(said[i], answer=reply.text if reply.label == ANSWER else None)
    return said


def _under(system: str, prompt: Messages) -> Question:
    """Return the question of a harmless prompt under a system prompt, which takes the place of its own."""
    rest = tuple(message for message in prompt if message["role"] != "system")
    asked = ({"role": "system", "content": system}, *rest) if system else prompt
    return Question(asked=asked, judged=prompt)


def _twins(asking: Asking, candidates: Sequence[Candidate], config: BuildConfig) -> list[Messages | None]:
    """Return for each prompt the first with a harmless word in place of its trigger that the model answers."""
    found: list[Messages | None] = [None] * len(candidates)
    for number in range(config.twin_words):
        proposed = {i: twin for i, one in enumerate(candidates) if found[i] is None and (twin := _twin(one, number))}
        questions = [Question(asked=twin, judged=twin) for twin in proposed.values()]
        replies = asking.ask(f"twins, word {number + 1}", questions) if questions else []
        for i, reply in zip(proposed, replies, strict=True):
            found[i] = proposed[i] if reply.label == ANSWER else None
    return found


def _twin(candidate: Candidate, number: int) -> Messages | None:
    """Return the prompt with another word for its trigger, None if it is not known or not in it as a word."""
    match = re.search(rf"\b{re.escape(candidate.focus)}\b", candidate.text, re.IGNORECASE) if candidate.focus else None
    if match is None:
        return None
    before, after = candidate.text[: match.start()], candidate.text[match.end() :]
    words = _NOUNS if _BEFORE_NOUNS.search(before) else _VERBS
    text = f"{before}{words[number % len(words)]}{after}"
    return (*candidate.prompt[:-1], {**candidate.prompt[-1], "content": text})
