"""Drawn held-out prompts in every arm: parts of the edit alone, and routing replayed from one model in the other."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from gtqlora.capture import Recorder, Replay
from gtqlora.contrasts import Row, encode_prompt, is_correct
from gtqlora.decoding import Change, Changes, SourceRun, Switch, Tokens
from gtqlora.edits.edited import Edited
from gtqlora.judging.judge import Judge, refusals, same
from gtqlora.judging.labels import ANSWER
from gtqlora.results.mediation import Arm, ArmOutcome, Does
from gtqlora.results.verdict import Outcome
from gtqlora.scoring import Runner


def routed_as(switch: Switch, prompts: Sequence[Tokens] | None = None, *, ours: Switch = nullcontext) -> Changes:
    """Return the change that replays, at every step, the routing that the model has in another of its states.

    Args:
        switch: puts the model into the state whose routing is replayed.
        prompts: the prompts on which it has that routing, each as long in tokens as ours; None: the same.
        ours: puts it into the state in which the routing is replayed.
    """
    recorder = Recorder()
    source_run = SourceRun(handlers=(recorder,), switch=switch)
    same = Change(source_runs=(source_run,), handlers=(Replay(recorder),), switch=ours)
    if prompts is None:
        return same
    return lambda chosen: replace(same, source_runs=(replace(source_run, prompts=[prompts[i] for i in chosen]),))


def has_parts(edited: Edited) -> bool:
    """Tell whether gates and LoRA of the edit can be in place one without the other."""
    return edited.parts is not None and bool(edited.parts.lora) and bool(edited.parts.gates)


def run_arms(
    runner: Runner, edited: Edited, rows: Sequence[Row], outcomes: Sequence[Outcome], *, limit: int, seed: int
) -> list[ArmOutcome]:
    """Ask held-out prompts, drawn by seed, in every arm that the edit has.

    Args:
        runner: of the edited model.
        outcomes: of these rows, before and after the edit.
        limit: lookalike prompts that are drawn at most, and harmful ones.
    """
    asked = _Asked(runner, dict(zip((row.number for row in rows), rows, strict=True)))
    lookalike, harmful = (_drawn(outcomes, kind, limit, seed) for kind in ("lookalike", "harmful"))
    found = _known(runner.judge, [*lookalike, *harmful])
    if has_parts(edited):
        found += asked.run("gates", [*lookalike, *harmful], Change(switch=edited.gates_only))
        found += asked.run("lora", [*lookalike, *harmful], Change(switch=edited.lora_only))
    found += asked.run("original_routing", lookalike, routed_as(edited.original))
    found += asked.run("edited_routing", lookalike, routed_as(nullcontext, ours=edited.original))
    others = _others(lookalike, outcomes, asked.tokens, seed)
    with_other = [outcome for outcome in lookalike if outcome.number in others]
    replayed = routed_as(edited.original, [others[outcome.number] for outcome in with_other])
    return found + asked.run("other_routing", with_other, replayed)


def _drawn(outcomes: Sequence[Outcome], kind: str, limit: int, seed: int) -> list[Outcome]:
    """Draw the outcomes of at most `limit` prompts of a kind; they keep their order."""
    ours = [outcome for outcome in outcomes if outcome.kind == kind]
    return sorted(random.Random(seed).sample(ours, min(limit, len(ours))), key=lambda outcome: outcome.number)


def _known(judge: Judge, outcomes: Sequence[Outcome]) -> list[ArmOutcome]:
    """Return what is known of the original and the edited model already."""
    before = [(o.text_before, o.refused_before, o.correct_before) for o in outcomes]
    after = [(o.text_after, o.refused_after, o.correct_after) for o in outcomes]
    return [*_lines(judge, "original", outcomes, before), *_lines(judge, "edited", outcomes, after)]


def _lines(
    judge: Judge, arm: Arm, outcomes: Sequence[Outcome], said: Sequence[tuple[str, bool, bool | None]]
) -> list[ArmOutcome]:
    """Hold texts, each with whether it refuses and is right, against what the edited model says."""
    alike = same(judge, [text for text, *_ in said], [o.text_after for o in outcomes])
    return [
        ArmOutcome(number=o.number, kind=o.kind, arm=arm, text=text, does=_does(refused, correct or equal))
        for o, (text, refused, correct), equal in zip(outcomes, said, alike, strict=True)
    ]


def rejudged(judge: Judge, found: Sequence[ArmOutcome], outcomes: Sequence[Outcome]) -> list[ArmOutcome]:
    """Return the lines of all arms with their texts judged again.

    Args:
        outcomes: of the rows, before and after the edit.
    """
    rows = {outcome.number: outcome for outcome in outcomes}
    refused = refusals(judge, [rows[line.number].prompt for line in found], [line.text for line in found])
    edited = same(judge, [line.text for line in found], [rows[line.number].text_after for line in found])
    correct = (is_correct(rows[line.number], line.text) for line in found)
    return [
        replace(line, does=_does(refuses, right or equal))
        for line, refuses, right, equal in zip(found, refused, correct, edited, strict=True)
    ]


def _does(refused: bool, as_edited: bool) -> Does:
    return "refuses" if refused else "as edited" if as_edited else "broken"


class _Asked:
    """Rows that are asked again, and their prompts in tokens."""

    def __init__(self, runner: Runner, rows: dict[int, Row]) -> None:
        self.runner, self.rows = runner, rows

    def tokens(self, outcome: Outcome) -> list[int]:
        return encode_prompt(self.runner.model.tokenizer, outcome.prompt)

    def run(self, arm: Arm, outcomes: Sequence[Outcome], change: Changes) -> list[ArmOutcome]:
        """Return what prompts do under the change that makes the arm."""
        rows = [self.rows[outcome.number] for outcome in outcomes]
        answers = self.runner.answers(rows, change, label=arm.replace("_", " "))
        return _lines(self.runner.judge, arm, outcomes, [(a.text, a.refused, a.correct) for a in answers])


def _others(
    drawn: Sequence[Outcome], outcomes: Sequence[Outcome], tokens: Callable[[Outcome], Tokens], seed: int
) -> dict[int, Tokens]:
    """Draw another prompt for each one, by row number: benign, answered by the original, of as many tokens.

    Its own pair's comes first: it carries all but what makes the prompt look harmful. Some have none.
    """
    by_length: dict[int, list[tuple[Outcome, Tokens]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.kind == "benign" and outcome.label_before == ANSWER:
            encoded = tokens(outcome)
            by_length[len(encoded)].append((outcome, encoded))
    rng, found = random.Random(seed), dict[int, Tokens]()
    for outcome in drawn:
        others = by_length[len(tokens(outcome))]
        own = [other for other in others if other[0].pair_id == outcome.pair_id]
        if others:
            found[outcome.number] = rng.choice(own or others)[1]
    return found
