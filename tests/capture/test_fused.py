"""Norms and rotary embeddings by Liger compute what the model's own do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gtqlora.bitdelta.layers import twin
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
