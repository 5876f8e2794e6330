"""Norms and rotary embeddings in one kernel each, by Liger-Kernel (arXiv 2410.10989), wherever it computes the same.

Written in torch they are a dozen kernels that read and write whole activations in fp32. Liger's kernels compile in a
second and take any shape, where `torch.compile` takes ten seconds for each. Whether one fits a model is not looked up
by name but tried, on random numbers in the model's dtype: what it computes otherwise stays as it is.

Shape letters: B rows, S sequence, T = B*S tokens, H heads, D sizes of a norm or a head.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from gtqlora.families.anatomy import is_norm
from gtqlora.progress import note

Rotary = Callable[..., tuple[Tensor, Tensor]]
"""(q_BHSD, k_BHSD, cos_BSD, sin_BSD) -> both rotated."""

_ROTARY = "apply_rotary_pos_emb"
_CLOSE = 2e-2
"""Relative: two results in bf16 that were rounded at different places."""


def available() -> bool:
    """Return whether Liger is installed."""
    return importlib.util.find_spec("liger_kernel") is not None


def fuse(model: nn.Module) -> int:
    """Let a model that is on a GPU compute its norms and rotary embeddings by Liger; return how many norms now do.

    A rotary embedding is a function of its transformers module: other models of the family compute by the same one.
    """
    like = next(model.parameters())
    if not like.is_cuda:
        return 0
    if not available():
        note("norms and rotary embeddings are computed in torch; `pip install liger-kernel` makes them faster")
        return 0
    norms = [module for module in model.modules() if is_norm(module)]
    fits = {kind: _norm_fits(next(n for n in norms if type(n) is kind)) for kind in {type(norm) for norm in norms}}
    fused = [norm for norm in norms if fits[type(norm)]]
    for norm in fused:
        norm.__class__ = _fused(type(norm))
    attention = [module for module in model.modules() if hasattr(sys.modules[type(module).__module__], _ROTARY)]
    for name in {type(module).__module__ for module in attention}:
        _fuse_rotary(name, like)
    return len(fused)


@cache
def _fused(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a kind of norm by Liger.

    A class, and no function that one module is given: copies of a norm compute with the weights that they are given.
    """
    return kind if kind.forward is _norm else type(kind.__name__, (kind,), {"forward": _norm})


def _norm(norm: Any, x_BSD: Tensor) -> Tensor:
    """Return x / rms(x) * weight, with only the root mean square in fp32."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # not in place: the gradient that comes in may be another branch's, too
    return LigerRMSNormFunction.apply(x_BSD, norm.weight, norm.variance_epsilon, 0.0, "llama", False)  # type: ignore[return-value]


@torch.no_grad()
def _norm_fits(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    if weight is None or not hasattr(norm, "variance_epsilon"):
        return False
    x_BSD = torch.randn(1, 8, weight.numel(), dtype=weight.dtype, device=weight.device)
    try:
        wanted = type(norm).forward(norm, x_BSD)
    except TypeError:  # a gated norm takes more
        return False
    return _near(_norm(norm, x_BSD), wanted)


def _fuse_rotary(module: str, like: Tensor) -> None:
    """Put Liger's rotation in the place of a transformers module's, for tensors on a GPU."""
    own: Rotary = getattr(sys.modules[module], _ROTARY)
    if isinstance(own, partial) or not _rotation_fits(own, like):
        return
    setattr(sys.modules[module], _ROTARY, partial(_rotated, own))


def _rotated(
    own: Rotary, q_BHSD: Tensor, k_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *more: Any, **others: Any
) -> tuple[Tensor, Tensor]:
    if not q_BHSD.is_cuda or more or others:
        return own(q_BHSD, k_BHSD, cos_BSD, sin_BSD, *more, **others)
    from liger_kernel.ops.rope import LigerRopeFunction

    if len(cos_BSD) != len(q_BHSD):  # the same positions in every row
        return LigerRopeFunction.apply(q_BHSD, k_BHSD, cos_BSD, sin_BSD)  # type: ignore[return-value]
    # All rows as one sequence: Liger compiles its kernel anew for each number of rows, and rows end one by one.
    heads = (_in_one_row(each.transpose(1, 2)).transpose(1, 2) for each in (q_BHSD, k_BHSD))
    rotated = LigerRopeFunction.apply(*heads, _in_one_row(cos_BSD), _in_one_row(sin_BSD))
    q_BHSD, k_BHSD = (each[0].unflatten(1, cos_BSD.shape[:2]).transpose(0, 1) for each in rotated)  # type: ignore[union-attr]
    return q_BHSD, k_BHSD


def _in_one_row(x_BS: Tensor) -> Tensor:
    return x_BS.flatten(0, 1)[None]


@torch.no_grad()
def _rotation_fits(own: Rotary, like: Tensor) -> bool:
    # two rows, more query heads than key heads, and a rotation of half the head, as some families have it
    for rotated in (64, 32):
        q_BHSD, k_BHSD = (
            torch.randn(2, 8, heads, 64, dtype=like.dtype, device=like.device).transpose(1, 2) for heads in (4, 2)
        )
        angles_BSD = torch.rand(1, 8, rotated // 2, device=like.device).repeat(2, 1, 2)
        cos_BSD, sin_BSD = angles_BSD.cos().to(like.dtype), angles_BSD.sin().to(like.dtype)
        try:
            wanted = own(q_BHSD, k_BHSD, cos_BSD, sin_BSD)
        except RuntimeError:  # this family rotates whole heads only
            continue
        found = _rotated(own, q_BHSD.clone(), k_BHSD.clone(), cos_BSD, sin_BSD)
        if not all(map(_near, found, wanted)):
            return False
    return True


def _near(found: Tensor, wanted: Tensor) -> bool:
    close = _CLOSE if found.dtype != torch.float32 else 1e-5
    return torch.allclose(found.float(), wanted.float(), rtol=close, atol=close)
