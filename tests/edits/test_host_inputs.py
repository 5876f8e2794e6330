"""Inputs of layers that are computed again, kept in host memory: the same gradients, from less memory of the GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gtqlora.edits.host_inputs import HostInputs

pytestmark = pytest.mark.gpu
D, LAYERS = 512, 6


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.GELU()) for _ in range(LAYERS)).cuda()


def forward(stack: nn.ModuleList, x_TD: Tensor, inputs: HostInputs | None) -> Tensor:
    with nullcontext() if inputs is None else inputs.kept():
        for layer in stack:
            x_TD = checkpoint(layer, x_TD, use_reentrant=False)
    return x_TD


def gradients(stack: nn.ModuleList, out_TD: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(out_TD.square().mean(), list(stack.parameters()))]


def states(tokens: int) -> Tensor:
    return torch.randn(tokens, D, device="cuda", generator=torch.Generator("cuda").manual_seed(tokens))


def test_gradients_are_those_of_inputs_that_stay_on_the_gpu() -> None:
    """Also in longer passes than expected, in shorter ones after these, and after a pass without a backward one."""
    stack, inputs = layers(), HostInputs(torch.device("cuda", 0), longest=2048 * D * 4)
    for tokens in (2048, 1024, 4096, 1024, 2048):
        whole = gradients(stack, forward(stack, states(tokens), None))
        away = gradients(stack, forward(stack, states(tokens), inputs))
        inputs.settle()
        assert all(torch.equal(a, b) for a, b in zip(whole, away, strict=True)), tokens
        forward(stack, states(tokens), inputs)


def test_between_the_passes_inputs_take_no_memory_of_the_gpu() -> None:
    stack, tokens, held = layers(), 8192, list[int]()
    inputs = HostInputs(torch.device("cuda", 0), longest=tokens * D * 4)
    gradients(stack, forward(stack, states(tokens), inputs))  # what is brought back has its two places from now on
    for kept in (None, inputs):
        x_TD, before = states(tokens), torch.cuda.memory_allocated()
        out_TD = forward(stack, x_TD, kept)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        gradients(stack, out_TD)
        del out_TD
    assert held[0] >= LAYERS * tokens * D * 4  # the inputs of all but the first, and the output
    assert held[1] <= 2 * tokens * D * 4  # the output, and nothing that grows with the layers


def test_recorded_passes_use_the_same_host_memory_again() -> None:
    stack, tokens = layers(), 4096
    inputs = HostInputs(torch.device("cuda", 0), longest=tokens * D * 4)
    x_TD = states(tokens)
    gradients(stack, forward(stack, x_TD, inputs))  # recordings may ask for no memory of the host
    inputs.settle()
    torch.cuda.synchronize()
    forwards, backwards = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forwards):
        out_TD = forward(stack, x_TD, inputs)
        inputs.settle()
    with torch.cuda.graph(backwards, pool=forwards.pool()):
        found = gradients(stack, out_TD)
        inputs.settle()
    for seed in range(3):
        x_TD.copy_(torch.randn(tokens, D, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)))
        forwards.replay()
        backwards.replay()
        torch.cuda.synchronize()
        whole = gradients(stack, forward(stack, x_TD.clone(), None))
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), seed
