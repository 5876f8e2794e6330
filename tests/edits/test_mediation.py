"""What an edit's ways are said to be, from what prompts do in each arm."""

from __future__ import annotations

import pytest

from gtqlora.contrasts import Row
from gtqlora.edits.arms import _lines
from gtqlora.edits.mediation import Arms, factorial, mediation
from gtqlora.judging.judge import judge_of
from gtqlora.judging.labels import Label
from gtqlora.results.mediation import FACTORIAL, ArmOutcome
from gtqlora.results.verdict import Outcome, Reply

N = 60


def row(number: int) -> Row:
    prompt = ({"role": "user", "content": f"prompt {number}"},)
    return Row(
        number=number, kind="lookalike", prompt=prompt, chosen="", rejected="", pair_id=str(number), split="heldout"
    )


def said(text: str, *, refused: bool = False, correct: bool | None = None) -> Reply:
    label: Label = "refusal" if refused else "answer"
    return Reply(text=text, tokens=1, ended=True, label=label, correct=correct, rejected_log_prob=None)


def arms(n: int = N, *, repaired: bool = True, **shares: tuple[float, float]) -> Arms:
    """N lookalike prompts; arm -> shares of them that refuse and that do as the edited model; the rest breaks."""
    after = said("fine") if repaired else said("no", refused=True)
    outcomes = [Outcome.of(row(number), said("no", refused=True), after) for number in range(n)]
    known = {"original": (1.0, 0.0), "edited": (0.0, 1.0) if repaired else (1.0, 0.0)}
    found = [
        ArmOutcome(number=i, kind="lookalike", arm=arm, text="", does=does(i / n, *share))
        for arm, share in {**known, **shares}.items()
        for i in range(n)
    ]
    return Arms.of(found, outcomes, 0.95)


def does(at: float, refuses: float, as_edited: float) -> str:
    return "refuses" if at < refuses else "as edited" if at < refuses + as_edited else "broken"


KEPT, GONE, HALF = (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)


@pytest.mark.parametrize(
    ("direct", "indirect", "role"),
    [
        (GONE, KEPT, "both"),
        (GONE, GONE, "necessary"),
        (KEPT, KEPT, "sufficient"),
        (KEPT, GONE, "neither"),
        (HALF, HALF, "partly"),
        (HALF, GONE, "partly"),
        # a quarter broken: it is not as edited, so with the original's routing the repair is gone
        ((0.75, 0.0), KEPT, "both"),
    ],
)
def test_what_the_routing_is_to_the_repair(
    direct: tuple[float, float], indirect: tuple[float, float], role: str
) -> None:
    found = mediation(arms(original_routing=direct, edited_routing=indirect, other_routing=KEPT))
    assert found.routing == role
    assert found.repaired == found.drawn == N and found.direct is not None and found.indirect is not None
    assert (found.direct.refuses.value, found.indirect.as_edited.value) == (direct[0], indirect[1])


def test_garbage_is_not_read_as_going_around_the_routing() -> None:
    """The audit's edit: a third of the refusals came back, the others were the bare word `refuse`."""
    found = mediation(arms(original_routing=(0.33, 0.0), edited_routing=KEPT, other_routing=KEPT))
    assert found.routing == "cannot tell" and "broken" in found.reason
    assert found.direct is not None and found.direct.as_edited.value == 0
    broken = mediation(arms(original_routing=KEPT, edited_routing=(0.2, 0.2), other_routing=KEPT))
    assert broken.routing == "cannot tell" and "the edited model's routing" in broken.reason


def test_routing_that_disturbs_whatever_it_carries_says_nothing() -> None:
    found = mediation(arms(original_routing=GONE, edited_routing=KEPT, other_routing=HALF))
    assert found.routing == "cannot tell" and "another prompt's routing" in found.reason
    without = mediation(arms(original_routing=GONE, edited_routing=KEPT))
    assert (without.routing, without.control) == ("both", None) and "without a control" in without.reason


def test_few_or_no_repaired_prompts_say_nothing() -> None:
    few = mediation(arms(29, original_routing=GONE, edited_routing=KEPT, other_routing=KEPT))
    assert few.routing == "cannot tell" and few.reason.startswith("29 repaired")
    none = mediation(arms(repaired=False, original_routing=GONE, edited_routing=GONE, other_routing=GONE))
    assert (none.repaired, none.direct, none.routing) == (0, None, "cannot tell")
    assert none.refusal_replayed is not None and none.refusal_replayed.value == 1
    left_out = mediation(Arms.of([], [], 0.95))
    assert (left_out.routing, left_out.refusal_replayed) == ("cannot tell", None) and "= 0" in left_out.reason


@pytest.mark.parametrize(
    ("gates", "lora", "idle", "sentence"),
    [
        (GONE, KEPT, True, "this edit is not gate-targeted: gates alone repair 0.0%"),
        (GONE, GONE, True, "gates alone repair 0.0%"),  # together they do
        (KEPT, GONE, False, "gates alone repair 100.0%"),
        ((0.4, 0.6), GONE, False, "gates alone repair 60.0%"),
        ((0.0, 0.0), KEPT, True, "this edit is not gate-targeted"),  # garbage is no repair
    ],
)
def test_gates_that_do_nothing_are_said_to(
    gates: tuple[float, float], lora: tuple[float, float], idle: bool, sentence: str
) -> None:
    found = factorial(arms(gates=gates, lora=lora))
    assert found is not None and found.gates_idle == idle and found.sentence.startswith(sentence)
    assert ("only together" in found.sentence) == (gates == lora == GONE)
    assert set(found.lookalike) == set(FACTORIAL)


def test_an_edit_without_parts_has_no_factorial() -> None:
    assert factorial(arms(original_routing=GONE, edited_routing=KEPT)) is None


def test_answers_that_come_to_the_same_are_as_edited() -> None:
    """As far as the judge can tell: one that compares answers knows more than equal words do."""
    outcomes = [Outcome.of(row(i), said("no", refused=True), said("In all it is 1,000.")) for i in range(3)]
    texts = [("Thus: 1000", False, None), ("Thus: 999", False, None), ("no", True, None)]
    found = {
        name: [line.does for line in _lines(judge_of(name), "gates", outcomes, texts)]
        for name in ("string", "gtqlora.judging.final_answer:FinalAnswer")
    }
    assert list(found.values()) == [["broken", "broken", "refuses"], ["as edited", "broken", "refuses"]]
