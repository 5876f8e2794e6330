"""Norms and rotary embeddings by Liger compute what the model's own do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe

from gtqlora.bitdelta.layers import twin
from gtqlora.capture import fused
from gtqlora.capture.fused import fuse
from gtqlora.families.anatomy import is_norm
from tests import models


@pytest.mark.gpu
@torch.no_grad()
def test_copies_of_a_norm_compute_with_weights_of_their_own() -> None:
    pytest.importorskip("liger_kernel")
    model = nn.ModuleList([models.tiny_model("deepseek_v3")]).cuda()
    norm = next(module for module in model.modules() if is_norm(module))
    hidden = torch.randn(3, norm.get_parameter("weight").numel(), device="cuda")
    before, name = norm(hidden), type(norm).__name__
    other = torch.full_like(norm.get_parameter("weight"), 3.0)
    assert fuse(model) > 0
    assert fuse(model) > 0  # a second time is as good
    assert type(norm).__name__ == name
    torch.testing.assert_close(norm(hidden), before)
    copied = copy.deepcopy(norm)
    copied.get_parameter("weight").copy_(other)
    for changed in (twin(norm, {"weight": other}), copied):
        torch.testing.assert_close(changed(hidden), before * 3 / norm.get_parameter("weight"))
    torch.testing.assert_close(norm(hidden), before)


Rotary = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> tuple[Rotary, Rotary]:
    """A family's own rotation, and Liger's in its place."""
    pytest.importorskip("liger_kernel")
    own = modeling_qwen3_moe.apply_rotary_pos_emb
    own = getattr(own, "args", (own,))[0]
    monkeypatch.setattr(modeling_qwen3_moe, fused._ROTARY, own)
    fuse(nn.ModuleList([models.tiny_model("qwen3_moe")]).cuda())
    put = modeling_qwen3_moe.apply_rotary_pos_emb
    assert put is not own
    return own, put


def to_rotate(rows: int, tokens: int = 5, positions: int | None = None) -> list[Tensor]:
    """Queries, keys, cosines and sines, these of so many rows or of all."""
    queries, keys = (torch.randn(rows, tokens, heads, 16, device="cuda").transpose(1, 2) for heads in (4, 2))
    angles = torch.rand(positions or rows, tokens, 8, device="cuda").repeat(1, 1, 2)
    return [queries, keys, angles.cos(), angles.sin()]


@pytest.mark.gpu
@pytest.mark.parametrize("positions", [1, 3])
def test_rotations_and_their_gradients_are_the_model_s_own(rotations: tuple[Rotary, Rotary], positions: int) -> None:
    given = to_rotate(3, positions=positions)
    found = list[tuple[Tensor, ...]]()
    for rotate in rotations:
        inputs = [each.clone().requires_grad_() for each in given[:2]]
        rotated = rotate(*(each * 1 for each in inputs), *given[2:])
        sum((each * each.detach().cos()).sum() for each in rotated).backward()  # type: ignore[union-attr]
        found.append((*rotated, *(each.grad for each in inputs if each.grad is not None)))
    assert len(found[0]) == 4 and found[0][0].shape == (3, 4, 5, 16)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_another_number_of_rows_compiles_nothing(
    rotations: tuple[Rotary, Rotary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a batch differ from call to call."""
    from triton import knobs

    compiled = list[Any]()
    rotations[1](*to_rotate(3))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **told: compiled.append(told))
    for rows in (2, 5, 7, 9):
        rotations[1](*to_rotate(rows))
    assert not compiled
    rotations[1](*(torch.cat([each, each], -1) for each in to_rotate(3)))
    assert compiled  # heads of another size are another kernel
