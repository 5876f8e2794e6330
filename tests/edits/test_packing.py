"""A packed batch beside the padded one it stands for: the same log-probabilities, gradients and routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gtqlora.capture import Recorder, router_hooks
from gtqlora.edits.collating import KindCollator, most_tokens
from gtqlora.edits.packing import PackedStack, pack, real_tokens, seen_at
from gtqlora.edits.reference import Batch
from gtqlora.families import FAMILIES, bind
from tests import models

LENGTHS = [(5, 3, 2), (1, 1, 6), (7, 2, 2), (3, 4, 1)]
PACKABLE = [name for name, family in FAMILIES.items() if family.only_attends]


def rows_of(lengths: list[tuple[int, int, int]], vocabulary: int = 60) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{name: ids(n) for name, n in zip(names, each, strict=True)} | {"kind": "benign"} for each in lengths]


def batches(**settings: Any) -> tuple[Batch, Batch]:
    """The same rows packed, and as they are."""
    rows = rows_of(LENGTHS)
    packed, padded = (
        KindCollator(pad_token_id=0, packed=True, **settings)(rows),
        KindCollator(pad_token_id=0, **settings)(rows),
    )
    return packed, padded


def run(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Recorder]:
    """Logits at real places, gradients of all parameters, and what routers decided at them."""
    recorder, real = Recorder(), batch["attention_mask"].bool()
    names = [name for name in batch if name not in ("kind", "completion_mask")]
    model.zero_grad()
    with router_hooks(model, bind(model, FAMILIES[model.gtqlora_family]), recorder):
        logits = model(**{name: batch[name] for name in names}, use_cache=False).logits[real]
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view(logits.shape)
    (logits.float() * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    places_T = seen_at(batch, torch.arange(len(real), device=real.device))[real.flatten()]
    return logits.detach(), grads, recorder.at(places_T)


def model_of(family: str, **changes: Any) -> Any:
    model: Any = models.tiny_model(family, **changes)
    model.gtqlora_family = family
    return model


def compare(model: Any, packed: Batch, padded: Batch, close: float = 1e-4) -> None:
    wanted = run(model, padded)
    with PackedStack(model, bind(model, FAMILIES[model.gtqlora_family])).installed():
        found = run(model, packed)
    torch.testing.assert_close(found[0], wanted[0], rtol=close, atol=close)
    assert set(found[1]) == set(wanted[1])
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).norm() <= 10 * close * grad.norm(), name
    for position, decision in wanted[2].decisions.items():
        assert torch.equal(found[2].decisions[position].indices_TK, decision.indices_TK)
    assert torch.equal(run(model, padded)[0], wanted[0])  # the model is as it was


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("family", PACKABLE)
def test_a_packed_batch_computes_what_the_padded_one_does(family: str, few_shapes: bool) -> None:
    compare(model_of(family), *batches(few_shapes=few_shapes))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"sliding_window": 3}),
        ("qwen3_moe", {"sliding_window": 3, "use_sliding_window": True}),
        ("qwen2_moe", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_sliding_window_is_kept(family: str, changes: dict[str, Any]) -> None:
    model = model_of(family, **changes)
    compare(model, *batches())
    padded = batches()[1]
    own = run(model, padded)[0]
    with PackedStack(model, bind(model, FAMILIES[family])).installed():
        torch.testing.assert_close(run(model, padded)[0], own, rtol=1e-4, atol=1e-4)
    model.config.sliding_window = None
    assert not torch.allclose(run(model_of(family), padded)[0], own, atol=1e-2)  # it matters here


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("olmoe", {"sliding_window": 3}),  # a key that the family's mask does not heed
        ("qwen2_moe", {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3_moe", {"sliding_window": 3, "use_sliding_window": False}),
        ("mixtral", {"sliding_window": 100}),
    ],
)
def test_a_window_that_the_model_does_not_have_is_not_made(family: str, changes: dict[str, Any]) -> None:
    compare(model_of(family, **changes), *batches())


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_a_recurrence_runs_as_it_is(family: str) -> None:
    compare(model_of(family), batches()[1], batches()[1])


def test_every_token_of_a_pair_is_run_once() -> None:
    packed, padded = batches()
    used = sum(map(sum, LENGTHS))
    assert len(packed["packed_first_P"]) == used == int(real_tokens(packed).sum())
    assert int(real_tokens(padded).sum()) == used + sum(prompt for prompt, *_ in LENGTHS)
    assert most_tokens(rows_of(LENGTHS)) == max(map(sum, LENGTHS))


@pytest.mark.parametrize("size", [sum(map(sum, LENGTHS)), 64, 100])
def test_sequences_cover_all_tokens_and_are_no_longer_than_said(size: int) -> None:
    packing = pack(LENGTHS, 9, size)
    found, places = packing.sequences, packing.places
    lengths, key_lengths = found.bounds_Q1.diff(), found.key_bounds_Q1.diff()
    assert int(found.bounds_Q1[-1]) == len(places.first_P) and len(places.first_P) == size
    assert (lengths >= 0).all() and (lengths <= key_lengths).all() and int(key_lengths.max()) <= found.most == 16
    assert int(found.key_bounds_Q1[-1]) <= len(found.keys_R)
    # a sequence's last keys are its own tokens, in order
    for q, k, n in zip(found.bounds_Q1, found.key_bounds_Q1[1:], lengths, strict=False):
        assert found.keys_R[k - n : k].tolist() == list(range(q, q + n))
    assert len({len(pack(LENGTHS, 9, size).sequences.bounds_Q1), len(found.bounds_Q1)}) == 1


def test_models_with_a_recurrence_are_not_packed() -> None:
    assert {name for name in FAMILIES if name not in PACKABLE} == {"qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"}


@pytest.mark.gpu
@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"), [(name, {}) for name in PACKABLE] + [("mixtral", {"sliding_window": 3})]
)
def test_flash_attention_over_packed_rows(family: str, changes: dict[str, Any], few_shapes: bool) -> None:
    """In half precision another expert may be chosen, so all tokens go to all experts here."""
    everything = {FAMILIES[family].topk_key: models.EXPERTS}
    model = model_of(family, dtype=torch.bfloat16, **changes, **everything).cuda()
    packed, padded = ({name: part.cuda() for name, part in batch.items()} for batch in batches(few_shapes=few_shapes))
    stack = PackedStack(model, bind(model, FAMILIES[family]))
    assert stack._flash
    wanted = run(model, padded)
    with stack.installed():
        found = run(model, packed)
    assert (found[0] - wanted[0]).float().norm() < 0.03 * wanted[0].float().norm()
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).float().norm() <= 0.1 * grad.float().norm() + 1e-3, name
