"""What every rank of a few checks, all in one launch: `run` writes down what each check said on this rank."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer import utils

from gtqlora.capture import subject as subjects
from gtqlora.config import ModelConfig, TrainConfig
from gtqlora.edits.checkpointing import GuardStop
from gtqlora.edits.edited import WeightsReplaced
from gtqlora.edits.head import completions_only
from gtqlora.errors import ContrastError, GtqloraError, JudgeError, RankError, RunError, TrainingError
from gtqlora.experts import FrozenExperts, format_of, quantizer, vocabulary
from gtqlora.experts.exchange import Exchange, exchange_of
from gtqlora.experts.sharding import is_sharded
from gtqlora.experts.vocabulary import Tiled, words_of
from gtqlora.ranks import (
    agree,
    all_of,
    average,
    by_leader,
    joined,
    leader_first,
    least,
    most,
    ranks,
    share,
    summed,
)
from tests import helpers
from tests.helpers import frozen_experts

SAID = "{}-{}.jsonl"
"""What a rank found of a module's checks: a line each."""


def run(module: str, folder: str) -> None:
    """Run a module's checks on this rank."""
    checks = {name: check for name, check in vars(sys.modules[module]).items() if name.startswith("check_")}
    with joined() as me, (Path(folder) / SAID.format(module, me.rank)).open("w") as said:
        for name, check in checks.items():
            try:
                check(Path(folder))
                wrong = None
            except Exception:
                wrong = traceback.format_exc()
            said.write(json.dumps([name, wrong]) + "\n")
            said.flush()


def raised(work: Callable[[], object]) -> GtqloraError:
    try:
        work()
    except GtqloraError as error:
        return error
    raise AssertionError("nothing was raised")


# --- what ranks tell one another


def check_all_have_the_values_of_all(_: Path) -> None:
    me = ranks().rank
    assert all_of({"rank": me, "text": "é" * me}) == [{"rank": i, "text": "é" * i} for i in range(4)]
    assert (most(me), least(me)) == (3, 0)
    assert summed(torch.tensor([1.0, me])).tolist() == [4.0, 6.0]
    assert all_of(list(share(6, ranks().place, ranks().here))) == [[0], [1, 2], [3], [4, 5]]


def check_means_take_the_place_of_tensors(_: Path) -> None:
    me = ranks().rank
    tensors = [torch.full((3, 2), float(me)), torch.tensor([4.0 * me]), torch.zeros(0)]
    average(tensors)
    assert tensors[0].eq(1.5).all() and tensors[1].item() == 6.0


def check_the_leader_works_for_all(_: Path) -> None:
    done = list[int]()
    assert by_leader(lambda: done.append(1) or {"found": [1, 2]}) == {"found": [1, 2]}
    assert len(done) == (ranks().rank == 0)


def check_what_the_leader_raises_all_raise(_: Path) -> None:
    def fail(error: GtqloraError) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    judge = raised(lambda: by_leader(fail(JudgeError("a.b:C", "it failed", key="second_judge"))))
    assert type(judge) is JudgeError and str(judge) == "second_judge = 'a.b:C': it failed"
    assert (judge.judge, judge.problem, judge.key) == ("a.b:C", "it failed", "second_judge")
    found = raised(lambda: by_leader(fail(ContrastError("row 7: no prompt"))))
    assert type(found) is ContrastError and str(found) == "row 7: no prompt"
    stopped = raised(lambda: by_leader(fail(GuardStop("routing collapsed"))))  # no class of `errors`: the nearest one
    assert isinstance(stopped, TrainingError) and stopped.exit_code == 3 and str(stopped) == "routing collapsed"
    assert all_of(1) == [1] * 4  # and nobody is out of step


def check_the_leader_goes_first(folder: Path) -> None:
    file = folder / "cache"
    with leader_first():
        assert file.exists() == (ranks().rank != 0)
        file.touch()

    def fail() -> None:
        with leader_first():
            if ranks().leads:
                raise RunError("no room")

    assert str(raised(fail)) == "no room"


def check_what_parts_ranks_is_named(_: Path) -> None:
    agree({"seed": 1, "list": [1, 2]})
    odd = raised(lambda: agree({"data": "same", "seed": 1 if ranks().rank != 2 else 9}))
    assert type(odd) is RankError
    assert str(odd).startswith("rank 2 has seed = 9, and rank 0 has 1; start all ranks with the same")


# --- experts that ranks hold together


def _experts(name: str, count: int, first: int = 0, held: int | None = None) -> FrozenExperts:
    """Experts whose weights hang on their number alone."""
    made = FrozenExperts(
        format=format_of(name),
        n_experts=count,
        hidden_size=64,
        intermediate_size=32,
        act_fn=nn.SiLU(),
        first=first,
        count=held,
    )
    for expert in range(made.first, made.first + made.count):
        for place, projection in enumerate(("gate", "up", "down")):
            generator = torch.Generator().manual_seed(10 * expert + place)
            made.quantize_into(expert, projection, 0.2 * torch.randn(made.sizes(projection), generator=generator))
    return made


def _ran(experts: FrozenExperts, given: tuple[Tensor, Tensor, Tensor, Tensor], mine: slice) -> list[Tensor]:
    hidden_TD, index_TK, weights_TK, grad_TD = (tensor[mine] for tensor in given)
    hidden_TD, weights_TK = hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    out_TD = experts(hidden_TD, index_TK, weights_TK)
    out_TD.backward(grad_TD)
    assert hidden_TD.grad is not None and weights_TK.grad is not None
    return [out_TD.detach(), hidden_TD.grad, weights_TK.grad]


def check_experts_of_all_ranks_are_those_of_one(_: Path) -> None:
    """Six experts over four ranks, two for each token: sums of two numbers are exact in either order."""
    me = ranks()
    for name in ("nf4", "int4-g32"):
        generator = torch.Generator().manual_seed(3)
        hidden_TD, grad_TD = torch.randn(2, 32, 64, generator=generator)
        index_TK = torch.rand(32, 6, generator=generator).topk(2).indices
        given = (hidden_TD, index_TK, torch.rand(32, 2, generator=generator), grad_TD)
        whole = _ran(_experts(name, 6), given, slice(None))
        first, end = me.place * 6 // 4, (me.place + 1) * 6 // 4
        split = _experts(name, 6, first, end - first)
        split.exchange = Exchange(me.machine)
        assert split.exchange.count == 4
        own = slice(8 * me.place, 8 * me.place + 8)
        for mine, found in ((slice(None), _ran(split, given, slice(None))), (own, _with_own(split, given, own))):
            assert torch.equal(found[0], whole[0][mine]), name
            for ours, theirs in zip(found[1:], whole[1:], strict=True):
                torch.testing.assert_close(ours, theirs[mine], rtol=1e-5, atol=1e-6)


def _with_own(experts: FrozenExperts, given: tuple[Tensor, Tensor, Tensor, Tensor], mine: slice) -> list[Tensor]:
    assert experts.exchange is not None
    with experts.exchange.own():
        found = _ran(experts, given, mine)
    assert experts.exchange.tokens == "same"
    return found


def check_each_rank_holds_its_share_of_the_experts(folder: Path) -> None:
    model = json.loads((folder / "models.json").read_text())["float32"]
    held = frozen_experts(subjects.open_subject(ModelConfig(model=model, expert_format="nf4")).model)
    bytes_held = all_of(sum(buffer.nbytes for module in held.values() for buffer in module.buffers()))
    counts = all_of([module.count for module in held.values()])
    assert [sum(count) for count in zip(*counts, strict=True)] == [8] * len(held)
    assert len(set(bytes_held)) == 1  # eight experts over four ranks


# --- training


def check_trainings(folder: Path) -> None:
    """Train every variant; the process that tests compares it with its own."""
    for name, settings in json.loads((folder / "variants.json").read_text()).items():
        config = TrainConfig(**settings)
        found = helpers.trained(config, folder / "ranks" / name)
        assert all_of([found.steps, found.stopped]) == [[found.steps, found.stopped]] * 4, name


def check_split_dense_weights_train_as_whole_ones(folder: Path) -> None:
    config = TrainConfig(**json.loads((folder / "variants.json").read_text())["nf4"])
    config = replace(config, gradient_checkpointing=True, activation_memory=1.0)
    worth_it, subjects.is_worth_it = subjects.is_worth_it, lambda _model, _anatomy: True
    said, handler = list[str](), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("gtqlora").addHandler(handler)
    try:
        assert is_sharded(subjects.open_subject(config).model)
        helpers.trained(config, folder / "ranks" / "sharded")
    finally:
        subjects.is_worth_it = worth_it
        logging.getLogger("gtqlora").removeHandler(handler)
    assert any("activation_memory is not used" in line for line in said)


def check_split_weights_take_other_values_and_their_own_again(folder: Path) -> None:
    config = ModelConfig(model=json.loads((folder / "models.json").read_text())["float32"], expert_format="nf4")
    whole = subjects.open_subject(config)
    worth_it, quantizer.is_worth_it = quantizer.is_worth_it, lambda _model, _family: True
    try:
        split = subjects.open_subject(config)  # its experts came when its dense weights were split
    finally:
        quantizer.is_worth_it = worth_it
    assert is_sharded(split.model) and not is_sharded(whole.model)
    changes = [WeightsReplaced(_other_weights(subject)) for subject in (whole, split)]
    before = [_logits(subject) for subject in (whole, split)]
    with changes[0], changes[1]:
        after = [_logits(subject) for subject in (whole, split)]
    assert torch.equal(*before) and torch.equal(*after) and not torch.equal(before[0], after[0])
    assert all(torch.equal(_logits(subject), was) for subject, was in zip((whole, split), before, strict=True))


def check_words_that_are_split_are_those_of_a_whole_head(folder: Path) -> None:
    """In tiles that ranks do not divide, the last one smaller; head and embedding apart, and one matrix."""
    for name in ("float32", "tied"):
        config = ModelConfig(model=json.loads((folder / "models.json").read_text())[name])
        whole, split = subjects.open_subject(config), _split(config, tile=10)
        words = words_of(split.model.get_output_embeddings().weight)
        assert words is not None and words.n_tiles > 2 and words.count % words.tile
        assert sum(all_of(len(words.weight) - 1)) >= words.count > len(words.weight)
        assert torch.equal(_logits(whole), _logits(split))
        exchange = exchange_of(split.model)
        assert exchange is not None
        with exchange.own():
            assert torch.equal(_logits(whole), _logits(split))
        for every, again in zip(_said_by_head(whole), _said_by_head(split), strict=True):
            assert torch.equal(every, again), name
        with pytest.raises(NotImplementedError, match="words are split"):
            Tiled.of(words).sum()


def _split(config: ModelConfig, tile: int) -> subjects.Subject:
    """Open a model whose dense weights are split, its words in tiles of so many."""
    kept = subjects.is_worth_it, vocabulary.TILE
    subjects.is_worth_it, vocabulary.TILE = lambda _model, _family: True, tile
    try:
        return subjects.open_subject(config)
    finally:
        subjects.is_worth_it, vocabulary.TILE = kept


def _said_by_head(subject: subjects.Subject) -> list[Tensor]:
    """What TRL's head says of tokens that are other ones on each rank, and more of them; with gradients of states."""
    trl: Any = utils
    ids = torch.arange(4, 13 + ranks().rank).repeat(2, 1)
    tile, trl._CHUNKED_LOGPROB_CHUNK_SIZE = trl._CHUNKED_LOGPROB_CHUNK_SIZE, 10
    hidden = torch.randn(*ids.shape, subject.anatomy.hidden_size, generator=torch.Generator().manual_seed(ranks().rank))
    hidden.requires_grad_()
    stack, kept = subject.model.base_model, subject.model.base_model.forward
    stack.forward = lambda **_: BaseModelOutputWithPast(last_hidden_state=hidden)
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    try:
        utils.add_fused_lm_head(subject.model, outputs=names)
        with completions_only():
            found = subject.model(input_ids=ids, labels=ids, fused_lm_head=True)
        found.log_probs.sum().backward()
    finally:
        trl._CHUNKED_LOGPROB_CHUNK_SIZE, stack.forward = tile, kept
    assert hidden.grad is not None
    return [hidden.grad, *(getattr(found, name) for name in names)]


def _other_weights(subject: subjects.Subject) -> list[tuple[nn.Parameter, Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    weights = [subject.model.get_submodule(path).weight for path in subject.anatomy.lora_targets]
    return [(weight, 0.1 * torch.randn(weight.shape, generator=drawn)) for weight in weights]


@torch.no_grad()
def _logits(subject: subjects.Subject) -> Tensor:
    return subject.model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
