"""The one loop: a runner's answers and logits are those of the model by hand, batch by batch, under any change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gtqlora import contrasts
from gtqlora.capture import Mask, Recorder, Subject, by_length, left_padded, open_subject, router_hooks
from gtqlora.contrasts import Contrast, Row
from gtqlora.decoding import Change, SourceRun, decode
from gtqlora.edits.arms import routed_as
from gtqlora.judging.judge import Messages, judge_of
from gtqlora.organisms import embedded
from gtqlora.scoring import Runner, log_probs
from tests import helpers

BATCH, NEW = 5, 4


class Counting:
    """The judge of the organisms, which remembers how it was asked."""

    def __init__(self) -> None:
        self.judge, self.asked = judge_of(embedded.JUDGE), list[tuple[list[Messages], list[str]]]()

    def __call__(self, prompts: Sequence[Messages], answers: Sequence[str]) -> Sequence[object]:
        self.asked.append((list(prompts), list(answers)))
        return self.judge(prompts, answers)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(str(embedded.organism("routed")))


@pytest.fixture(scope="module")
def rows() -> tuple[Row, ...]:
    found: Contrast = contrasts.load(embedded.contrast(), judge_of(embedded.JUDGE)).split("validation")
    return (*found.of_kind("harmful")[:4], *found.of_kind("lookalike")[:4], *found.of_kind("benign")[:4])


@pytest.fixture
def runner(subject: Subject) -> Runner:
    return Runner(model=subject, judge=Counting(), batch_size=BATCH, max_new_tokens=NEW)


def by_hand(subject: Subject, texts: Sequence[Sequence[int]], keep: int) -> Tensor:
    """Logits_BSV straight from the model."""
    ids_BS, mask_BS = left_padded(texts, subject.pad_id, subject.device)
    positions_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return subject.model(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False, logits_to_keep=keep
        ).logits.float()


# --- answers


def test_answers_are_those_of_each_batch_in_the_order_of_the_rows(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts = runner.encoded(rows)
    found = runner.answers(rows, label="test")
    for chosen in by_length(prompts, BATCH):
        decoded = decode(runner.model, [prompts[i] for i in chosen], max_new_tokens=NEW)
        assert [found[i].text for i in chosen] == decoded.texts
        assert [found[i].tokens for i in chosen] == decoded.tokens
        assert [found[i].ended for i in chosen] == decoded.ended
    assert [answer.refused for answer in found] == [row.kind != "benign" for row in rows]
    assert [answer.correct for answer in found] == [
        None if row.answer is None else answer.text == row.answer for row, answer in zip(rows, found, strict=True)
    ]
    assert all(answer.log_odds is None for answer in found)


def test_the_judge_gets_each_batch_once_with_its_prompts(runner: Runner, rows: tuple[Row, ...]) -> None:
    found, judge = runner.answers(rows, label=None), runner.judge
    assert isinstance(judge, Counting)
    assert [len(answers) for _, answers in judge.asked] == [5, 5, 2]
    said = {
        str(prompt): answer for prompts, answers in judge.asked for prompt, answer in zip(prompts, answers, strict=True)
    }
    assert said == {str(row.prompt): answer.text for row, answer in zip(rows, found, strict=True)}


def test_prompts_in_tokens_stand_for_the_rows_own(runner: Runner, rows: tuple[Row, ...]) -> None:
    harmful, benign = rows[:4], rows[-4:]
    found = runner.answers(harmful, label=None, prompts=runner.encoded(benign))
    assert [answer.text for answer in found] == [answer.text for answer in runner.answers(benign, label=None)]


def test_a_change_is_asked_for_batch_by_batch(runner: Runner, rows: tuple[Row, ...]) -> None:
    """Every expert but those a token needs is masked in the second half of the rows only: others answer as before."""
    subject, plain = runner.model, runner.answers(rows, label=None)
    spec, seen = subject.anatomy.spec, list[list[int]]()
    mask = Mask(
        subject.anatomy, {i: tuple(range(spec.n_experts - spec.top_k)) for i in range(len(subject.anatomy.moe))}
    )

    def change(chosen: list[int]) -> Change:
        seen.append(chosen)
        return Change(handlers=(mask,)) if min(chosen) > 5 else Change()

    found = runner.answers(rows, change, label=None)
    assert seen == by_length(runner.encoded(rows), BATCH)
    with router_hooks(subject.model, subject.anatomy, mask):
        masked = runner.answers(rows, label=None)
    for chosen in seen:
        expected = masked if min(chosen) > 5 else plain
        assert [found[i].text for i in chosen] == [expected[i].text for i in chosen]


def test_the_routing_of_another_state_is_replayed(runner: Runner, rows: tuple[Row, ...]) -> None:
    states: list[str] = []

    @contextmanager
    def other():
        states.append("in")
        yield
        states.append("out")

    plain = runner.answers(rows, label=None)
    assert runner.answers(rows, routed_as(other), label=None) == plain  # it is the same model
    assert states[:2] == ["in", "out"] and len(states) >= 2 * 3


def test_the_routing_of_another_prompt_is_replayed(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts = runner.encoded(rows)
    plain = runner.answers(rows, label=None)
    assert runner.answers(rows, routed_as(nullcontext, prompts), label=None) == plain  # its own prompt's
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    other = {i: next((j for j in by_length if j != i and len(prompts[j]) == len(prompts[i])), i) for i in by_length}
    swapped = routed_as(nullcontext, [prompts[other[i]] for i in range(len(rows))])
    assert [a.text for a in runner.answers(rows, swapped, label=None)] != [a.text for a in plain]


def test_a_readout_s_odds_are_those_of_the_first_token(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts, readout = runner.encoded(rows), [7, 9]
    found, judge = runner.answers(rows, label=None, readout=readout), runner.judge
    assert isinstance(judge, Counting)
    judge.asked.clear()
    assert runner.first_odds(prompts, Change(), readout) == [answer.log_odds for answer in found]
    assert judge.asked == []


# --- logits


def test_last_logits_are_the_model_s_own(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts, seen = runner.encoded(rows), []
    for batch in runner.logits(prompts, last=3):
        expected_BSV = by_hand(runner.model, [prompts[i] for i in batch.chosen], 3)
        assert torch.equal(batch.values_BSV, expected_BSV)
        assert [len(row) for row in batch.rows(batch.values_BSV)] == [3] * len(batch.chosen)
        seen.append(batch.chosen)
    assert seen == by_length(prompts, BATCH)


def test_logits_of_completions_predict_their_tokens(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts = runner.encoded(rows)
    completions = [[7, 8, 9][: 1 + i % 3] for i in range(len(rows))]
    seen: list[int] = []
    for batch in runner.logits(prompts, completions=completions):
        texts = [[*prompts[i], *completions[i]] for i in batch.chosen]
        expected_BSV = by_hand(runner.model, texts, max(len(completions[i]) for i in batch.chosen) + 1)
        for at, (i, row_SV) in enumerate(zip(batch.chosen, batch.rows(batch.values_BSV), strict=True)):
            assert torch.equal(row_SV, expected_BSV[at, -len(completions[i]) - 1 : -1])
        seen += batch.chosen
    assert seen == list(range(len(rows)))


def test_two_states_can_be_compared_batch_by_batch(runner: Runner, rows: tuple[Row, ...]) -> None:
    """A state holds while its batch runs, and not between batches."""
    inside: list[bool] = []

    @contextmanager
    def other():
        inside.append(True)
        yield
        inside.pop()

    prompts, recorder = runner.encoded(rows), Recorder()
    before = runner.logits(prompts, Change(switch=other, handlers=(recorder,)))
    for old, new in zip(before, runner.logits(prompts), strict=True):
        assert inside == [] and torch.equal(old.values_BSV, new.values_BSV)
        assert all(len(d.indices_TK) == old.mask_BS.numel() for d in recorder.decisions.values())


def test_a_source_run_goes_first_and_may_have_its_own_prompts(runner: Runner, rows: tuple[Row, ...]) -> None:
    prompts, mine, theirs = runner.encoded(rows), Recorder(), Recorder()
    alike = [i for i in range(len(rows)) if len(prompts[i]) == len(prompts[0])]
    assert len(alike) > 2
    first, other = [prompts[alike[0]]], [prompts[alike[1]]]
    source = SourceRun(handlers=(theirs,), prompts=other)
    (_,) = runner.logits(first, Change(source_runs=(source,), handlers=(mine,)))
    expected = Recorder()
    (_,) = runner.logits(other, Change(handlers=(expected,)))
    for position, decision in expected.decisions.items():
        assert torch.equal(theirs.decisions[position].logits_TE, decision.logits_TE)
        assert not torch.equal(mine.decisions[position].logits_TE, decision.logits_TE)
    with pytest.raises(ValueError, match="same token counts"):
        list(runner.logits(first, Change(source_runs=(replace(source, prompts=[[*other[0], 7]]),))))


def test_log_probs_are_of_the_words_alone(runner: Runner, rows: tuple[Row, ...]) -> None:
    """What the template puts behind a completion is no part of it."""
    found = log_probs(runner, rows, [row.rejected for row in rows], label="test")
    subject, row = runner.model, rows[0]
    prompt, completion = contrasts.encode_row(subject.tokenizer, replace(row, chosen=row.rejected))
    words = subject.tokenizer.encode(row.rejected, add_special_tokens=False)
    assert completion[: len(words)] == words and len(completion) > len(words)
    log_SV = by_hand(subject, [[*prompt, *words]], len(words) + 1)[0].log_softmax(-1)
    expected = sum(float(log_SV[i, token]) for i, token in enumerate(words))
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_a_toy_model_whose_logits_are_not_numbers_is_named(toy: helpers.Toy, rows: tuple[Row, ...]) -> None:
    from gtqlora.errors import ModelError

    subject = open_subject(str(toy.model("qwen3_moe")))
    subject.model.lm_head.weight.data.fill_(float("nan"))
    runner = Runner(model=subject, judge=judge_of("string"), batch_size=BATCH, max_new_tokens=NEW)
    with pytest.raises(ModelError, match="NaN or infinity"):
        runner.answers(rows, label=None)


@pytest.mark.parametrize("ask", ["answers", "first_odds", "logits"])
def test_prompts_that_do_not_fit_the_memory_are_an_error_of_one_line(
    runner: Runner, rows: tuple[Row, ...], ask: str
) -> None:
    """The memory runs out in one layer, as it does on a GPU."""
    from gtqlora.errors import ModelError

    prompts = runner.encoded(rows)
    asked = {
        "answers": lambda: runner.answers(rows, label=None),
        "first_odds": lambda: runner.first_odds(prompts, Change(), [7]),
        "logits": lambda: list(runner.logits(prompts)),
    }

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    layer = runner.model.model.get_submodule(runner.model.anatomy.layers[0])
    handle = layer.register_forward_pre_hook(full)
    try:
        with pytest.raises(ModelError, match="out of memory with 5 prompts at once; lower --batch-size"):
            asked[ask]()
    finally:
        handle.remove()
