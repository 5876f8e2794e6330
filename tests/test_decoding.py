"""Rows of a cache of fixed shape say what a cache that grows says, whichever rows run beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtqlora import decoding
from gtqlora.capture import (
    CallRecorder,
    Decision,
    Interchange,
    Mask,
    Recorder,
    Replay,
    Subject,
    direction_removed,
    left_padded,
    log_odds,
    open_subject,
    positions,
)
from gtqlora.config import ModelConfig
from gtqlora.decoding import AS_IS, Change, Decoded, SourceRun, completing, decode, decode_by_row
from gtqlora.decoding import engine as engine_module
from gtqlora.decoding.caches import ColumnCache, bytes_of_row, growing, has_columns, tensors_of
from gtqlora.decoding.completing import by_columns
from gtqlora.decoding.engine import LOOK, Engine, Said
from gtqlora.errors import ModelError
from tests.models import FAMILIES, VOCABULARY, save_tiny, tiny_model

NEW, ROWS = 11, 3
LENGTHS = (5, 2, 9, 7, 3, 12, 6, 4)
EVERY = ("deepseek_v3", "qwen3_moe", "qwen3_next")
"""Families on which all is tried; on others what may differ, and the change that takes a second run."""


def some_prompts(begin: Sequence[int] = ()) -> list[list[int]]:
    """Prompts of several lengths."""
    draw = torch.Generator().manual_seed(5)
    words = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=draw).tolist()
    return [[*begin, *row[:length]] for row, length in zip(words, LENGTHS, strict=True)]


def opened(path: Path, family: str) -> Subject:
    """A tiny model some of whose answers end early: what it says third to one of the prompts is a stop."""
    found = open_subject(str(save_tiny(path, family)))
    tokens = decode(found, some_prompts(), max_new_tokens=NEW).tokens
    found.model.generation_config.eos_token_id = [1, tokens[0][2]]
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return opened(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return opened(tmp_path_factory.mktemp("one"), "qwen3_moe")


@pytest.fixture
def prompts() -> list[list[int]]:
    return some_prompts()


def by_row(subject: Subject, prompts: Sequence[Sequence[int]], change: Change = AS_IS, **more: Any) -> Decoded:
    return decode_by_row(subject, prompts, change, rows=ROWS, max_new_tokens=NEW, capture=False, **more)


def an_engine(
    subject: Subject,
    rows: int,
    change: Change = AS_IS,
    *,
    columns: int = 64,
    by_row: bool = False,
    capture: bool = False,
) -> Engine:
    return Engine(
        subject,
        change,
        rows=rows,
        columns=columns,
        max_new_tokens=NEW,
        by_row=by_row,
        capture=capture,
        on_first=lambda _prompts, _logits: None,
    )


@torch.no_grad()
def said_in(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Said]:
    return sorted(engine.run(prompts, range(len(prompts))), key=lambda said: said.prompt)


def together(subject: Subject, prompts: Sequence[Sequence[int]], change: Change = AS_IS) -> list[Said]:
    """A batch in the cache of fixed shape, in the prompts' order."""
    return said_in(an_engine(subject, len(prompts), change), prompts)


def tokens_of(said: Sequence[Said]) -> list[list[int]]:
    return [each.tokens for each in said]


# --- the same words


def test_rows_say_what_a_batch_says(subject: Subject, prompts: list[list[int]]) -> None:
    expected = decode(subject, prompts, max_new_tokens=NEW)
    lengths = {len(tokens) for tokens in expected.tokens}
    assert len(lengths) > 1 and NEW in lengths and True in expected.ended and False in expected.ended
    assert by_row(subject, prompts) == expected
    said = together(subject, prompts)
    assert tokens_of(said) == expected.tokens and [each.ended for each in said] == expected.ended


@pytest.mark.parametrize("subject", EVERY, indirect=True)
def test_past_the_last_column_a_row_goes_on_at_the_first(subject: Subject, prompts: list[list[int]]) -> None:
    """The narrowest cache there may be, and more steps in all than it has columns."""
    said = said_in(an_engine(subject, 2, columns=max(LENGTHS) + NEW + LOOK, by_row=True), prompts)
    assert tokens_of(said) == decode(subject, prompts, max_new_tokens=NEW).tokens


def test_many_tokens_are_read_in_parts_and_no_row_waits_for_them(
    one: Subject, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_TOKENS_AT_ONCE", 2 * max(LENGTHS))
    shapes = list[tuple[int, ...]]()
    inner = one.model.forward

    def watched(*given: Any, **more: Any) -> Any:
        shapes.append(tuple(more["input_ids"].shape))
        return inner(*given, **more)

    expected = decode(one, prompts, max_new_tokens=NEW).tokens
    monkeypatch.setattr(one.model, "forward", watched)
    assert tokens_of(said_in(an_engine(one, len(prompts), by_row=True), prompts)) == expected
    assert [shape[0] for shape in shapes[:5]] == [2, 2, 2, 2, len(prompts)]


def test_what_all_prompts_begin_with_is_read_once(one: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts(begin=[2 + i % 7 for i in range(45)])
    widths = list[tuple[int, int]]()
    inner = one.model.forward

    def watched(*given: Any, **more: Any) -> Any:
        widths.append(tuple(more["input_ids"].shape))
        return inner(*given, **more)

    expected = decode(one, prompts, max_new_tokens=NEW)
    monkeypatch.setattr(one.model, "forward", watched)
    assert by_row(one, prompts).tokens == expected.tokens
    assert widths[0] == (1, 45) and max(width for rows, width in widths if rows > 1) <= max(LENGTHS)
    recorder = Recorder()
    change = Change(source_runs=(SourceRun(handlers=(recorder,)),), handlers=(Replay(recorder),))
    assert by_row(one, prompts, change).tokens == expected.tokens


def test_a_state_that_padding_moves_is_not_shared(tmp_path: Path) -> None:
    subject, prompts = opened(tmp_path, "qwen3_next"), some_prompts(begin=[2 + i % 7 for i in range(45)])
    assert by_row(subject, prompts).tokens == decode(subject, prompts, max_new_tokens=NEW).tokens


# --- under a change


def masks(subject: Subject) -> Change:
    return Change(handlers=(Mask(subject.anatomy, {0: (1, 3), 1: (0, 2, 5)}),))


def replays(subject: Subject) -> Change:
    """The routing of a run without some experts, where all are there."""
    recorder, mask = Recorder(), Mask(subject.anatomy, {0: (1, 3), 1: (0, 2, 5)})
    return Change(source_runs=(SourceRun(handlers=(mask, recorder)),), handlers=(Replay(recorder),))


def interchanges(subject: Subject) -> Change:
    """The same, and the experts' inputs of a third run."""
    routed, inputs = CallRecorder(), CallRecorder()
    mask = Mask(subject.anatomy, {0: (1, 3), 1: (0, 2, 5)})
    sources = (SourceRun(handlers=(mask,), expert_handlers=(routed,)), SourceRun(expert_handlers=(inputs,)))
    return Change(source_runs=sources, expert_handlers=(Interchange(routing=routed, inputs=inputs),))


def removes(subject: Subject) -> Change:
    """Another state of the model: without a direction."""
    direction_D = torch.randn(subject.model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    removed = direction_removed(subject.model, subject.anatomy, direction_D)
    return Change(switch=lambda: removed)


CHANGES = (masks, replays, interchanges, removes)


@pytest.mark.parametrize(
    ("subject", "make"),
    [(family, make) for family in FAMILIES for make in CHANGES if family in EVERY or make is replays],
    indirect=["subject"],
)
def test_changes_act_in_rows_as_in_a_batch(
    subject: Subject, prompts: list[list[int]], make: Callable[[Subject], Change]
) -> None:
    expected = decode(subject, prompts, make(subject), max_new_tokens=NEW)
    assert expected.tokens != decode(subject, prompts, max_new_tokens=NEW).tokens
    assert by_row(subject, prompts, make(subject)).tokens == expected.tokens
    assert tokens_of(together(subject, prompts, make(subject))) == expected.tokens


def test_a_source_run_with_prompts_of_its_own(one: Subject, prompts: list[list[int]]) -> None:
    twins = [[*prompt[:-1], prompt[0]] for prompt in prompts]

    def change() -> Change:
        recorder = CallRecorder()
        source = SourceRun(expert_handlers=(recorder,), prompts=twins)
        return Change(source_runs=(source,), expert_handlers=(Interchange(routing=recorder, inputs=None),))

    assert not change().by_row
    expected = decode(one, prompts, change(), max_new_tokens=NEW).tokens
    assert expected != decode(one, prompts, max_new_tokens=NEW).tokens
    assert tokens_of(together(one, prompts, change())) == expected


def test_draws_are_the_same_numbers(one: Subject, prompts: list[list[int]]) -> None:
    def change() -> Change:
        dice = [torch.Generator().manual_seed(i) for i in range(len(prompts))]

        def draw(logits_BV: Tensor) -> Tensor:
            chances = logits_BV.softmax(-1)
            return torch.cat([torch.multinomial(p, 1, generator=die) for p, die in zip(chances, dice, strict=True)])

        return Change(draw=draw)

    assert not change().by_row
    expected = decode(one, prompts, change(), max_new_tokens=NEW)
    assert expected.tokens != decode(one, prompts, max_new_tokens=NEW).tokens
    assert tokens_of(together(one, prompts, change())) == expected.tokens


# --- what else comes of it


def test_a_readout_s_odds_come_in_the_prompts_order(one: Subject, prompts: list[list[int]]) -> None:
    readout = [7, 9]
    ids_BS, mask_BS = left_padded(prompts, one.pad_id, one.device)
    with torch.no_grad():
        logits_BV = one.model(input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions(mask_BS)).logits[:, -1]
    expected = log_odds(logits_BV, torch.tensor(readout)).tolist()
    for found in (by_row(one, prompts, readout=readout), decode(one, prompts, max_new_tokens=1, readout=readout)):
        assert found.odds == pytest.approx(expected, abs=1e-4)
    assert by_row(one, prompts).odds == []


def test_progress_counts_prompts_that_ended(one: Subject, prompts: list[list[int]]) -> None:
    from gtqlora.progress import shown_by

    seen: list[tuple[str, int, int]] = []
    with shown_by(lambda *told: seen.append(told)):
        by_row(one, prompts, label="ask")
    assert seen == [("ask", done, len(prompts)) for done in range(len(prompts) + 1)]


def test_a_switch_is_on_at_steps_only(one: Subject, prompts: list[list[int]]) -> None:
    inside: list[bool] = []

    @contextmanager
    def other() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    before = one.model.config._attn_implementation
    change = Change(source_runs=(SourceRun(switch=other),), switch=nullcontext)
    assert by_row(one, prompts, change).tokens == decode(one, prompts, max_new_tokens=NEW).tokens
    assert inside == [] and one.model.config._attn_implementation == before


@pytest.mark.parametrize("when", [0, 4])
def test_logits_that_are_no_numbers_are_named(
    one: Subject, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """In what a prompt is read with, and in a later step."""
    calls, inner = list[int](), one.model.forward

    def spoilt(*given: Any, **more: Any) -> Any:
        output = inner(*given, **more)
        calls.append(1)
        if len(calls) > when:
            output.logits = output.logits * float("nan")
        return output

    monkeypatch.setattr(one.model, "forward", spoilt)
    with pytest.raises(ModelError, match="NaN or infinity"):
        by_row(one, prompts)


@torch.no_grad()
def test_the_bytes_of_a_row_are_those_of_its_cache(subject: Subject) -> None:
    cache = growing(subject)
    subject.model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    column_1 = torch.zeros(1, dtype=torch.long)
    few, more = (
        sum(tensor.nbytes for layer in ColumnCache(cache, rows, 40, column_1).layers for tensor in tensors_of(layer))
        for rows in (2, 5)
    )
    assert more - few == 3 * bytes_of_row(cache, 40)


def test_long_prompts_have_columns_of_their_own() -> None:
    lengths = [10, 500, 30, 40, 260]
    found = by_columns([[0] * length for length in lengths], 20)
    assert found == {128: [0, 2, 3], 576: [4, 1]}
    assert list(found) == sorted(found)


def test_a_window_that_is_shorter_than_the_columns_needs_a_cache_that_grows(
    tmp_path: Path, prompts: list[list[int]]
) -> None:
    model = tiny_model("mixtral", sliding_window=48)
    subject = open_subject(str(save_tiny(tmp_path, "mixtral", model=model)))
    assert not has_columns(subject, 64) and not has_columns(subject, 48) and has_columns(subject, 47)
    said = said_in(an_engine(subject, len(LENGTHS), columns=47), prompts)
    assert tokens_of(said) == decode(subject, prompts, max_new_tokens=NEW).tokens


def test_on_a_processor_batches_stay_as_they_are(one: Subject, prompts: list[list[int]]) -> None:
    assert not decoding.goes_by_row(one, prompts, AS_IS, NEW)


# --- captured


def on_gpu(path: Path, family: str, dtype: Any) -> Subject:
    """A tiny model on the GPU, with the same experts in 4 bits where the way through its own waits for the GPU."""
    experts = "bf16" if dtype == "bfloat16" else "int4-g32"
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64}
    save_tiny(path, family, model=tiny_model(family, dtype=getattr(torch, dtype), **sizes))
    return open_subject(ModelConfig(model=str(path), device="cuda", dtype=dtype, expert_format=experts))


def as_it_is(_subject: Subject) -> Change:
    return AS_IS


@pytest.mark.gpu
@pytest.mark.parametrize("make", [as_it_is, *CHANGES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EVERY)
def test_a_captured_step_is_the_same_step(
    tmp_path: Path, prompts: list[list[int]], family: str, dtype: str, make: Callable[[Subject], Change]
) -> None:
    subject = on_gpu(tmp_path, family, dtype)
    captured = an_engine(subject, ROWS, make(subject), by_row=True, capture=True)
    eager = an_engine(subject, ROWS, make(subject), by_row=True)
    assert tokens_of(said_in(captured, prompts)) == tokens_of(said_in(eager, prompts))
    assert captured.captured and not eager.captured
    if dtype == "float32":
        grown_ = completing.grown(subject, prompts, make(subject), NEW, completing.Odds([]))
        assert tokens_of(said_in(captured, prompts)) == tokens_of(grown_)


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_captured(
    tmp_path: Path, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    subject, seen = on_gpu(tmp_path, "qwen3_moe", "bfloat16"), list[float]()

    def waits(_position: int, _module: nn.Module, decision: Decision) -> None:
        seen.append(float(decision.logits_TE.max()))

    engine = an_engine(subject, len(prompts), Change(handlers=(waits,)), capture=True)
    expected = said_in(an_engine(subject, len(prompts), capture=True), prompts)
    assert tokens_of(said_in(engine, prompts)) == tokens_of(expected)
    assert not engine.captured and "waits for the GPU at every step" in caplog.text


@pytest.mark.gpu
def test_what_waits_for_the_gpu_once_is_captured_from_then_on(
    tmp_path: Path, prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """As a kernel does that is loaded when it first runs: else a process's first decoding was never captured."""
    subject, seen = on_gpu(tmp_path, "qwen3_moe", "bfloat16"), list[float]()

    def waits(_position: int, _module: nn.Module, decision: Decision) -> None:
        if decision.logits_TE.shape[0] == len(prompts) and not seen:  # a step, and not the reading of prompts
            seen.append(float(decision.logits_TE.max()))

    engine = an_engine(subject, len(prompts), Change(handlers=(waits,)), capture=True)
    expected = said_in(an_engine(subject, len(prompts), capture=True), prompts)
    assert tokens_of(said_in(engine, prompts)) == tokens_of(expected)
    assert seen and engine.captured and "waits for the GPU" not in caplog.text


@pytest.mark.gpu
def test_a_runner_goes_by_row_on_a_gpu(tmp_path: Path, prompts: list[list[int]]) -> None:
    subject = on_gpu(tmp_path, "qwen3_moe", "float32")
    assert decoding.goes_by_row(subject, prompts, AS_IS, NEW)
    assert not decoding.goes_by_row(subject, prompts, lambda _chosen: AS_IS, NEW)
    assert not decoding.goes_by_row(subject, prompts, AS_IS, 1)
    rows = decode_by_row(subject, prompts, AS_IS, rows=ROWS, max_new_tokens=NEW)
    assert rows.tokens == decode(subject, prompts, max_new_tokens=NEW).tokens
