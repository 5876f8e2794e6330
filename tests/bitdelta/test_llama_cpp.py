"""Variants as LoRA adapters in llama.cpp itself: what they add, what is lost, how they are judged, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gtqlora.bitdelta.checkpoints import checkpoints
from gtqlora.bitdelta.compress import compress
from gtqlora.bitdelta.container import Tensors, read_variant
from gtqlora.bitdelta.llama_adapter import Lost, Plan
from gtqlora.bitdelta.llama_cpp import adapt
from gtqlora.bitdelta.placing import place
from gtqlora.capture import open_subject
from gtqlora.edits.merging import Whole
from gtqlora.errors import FloorError, ModelError, RunError
from gtqlora.exports import provenance
from gtqlora.exports.gguf import whole
from gtqlora.exports.gguf.reading import read_gguf
from gtqlora.exports.gguf.values import Checkpoint
from gtqlora.exports.job import edited_model
from gtqlora.exports.llama_cpp import distributions
from gtqlora.exports.llama_server import serving
from gtqlora.families.copying import copy_changed
from gtqlora.results.export import read_export
from tests import helpers, models
from tests.bitdelta.test_compress import tensors_of
from tests.exports import ggml

TOKENS = models.some_tokens(1, shape=(1, 8))
WIDE: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "mlp_only_layers": []}


def fine_tune(base: Path, out: Path, *, seed: int = 1, size: float = 3e-4, frozen: str = "norm") -> Path:
    """A fine-tune of all but these tensors, whose differences have rows and columns of different sizes."""
    draw = torch.Generator().manual_seed(seed)

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        sizes = [0.5 + torch.rand(count, generator=draw) for count in tensor.shape[-2:]]
        scale = sizes[0] if len(sizes) == 1 else sizes[0][:, None] * sizes[1]
        return tensor.float() + size * scale * torch.randn(tensor.shape, generator=draw)

    values = {name: Whole(changed(t)) for name, t in tensors_of(base).items() if frozen not in name}
    copy_changed(str(base), out, values)
    return out


@pytest.fixture(scope="module")
def base(toy: helpers.Toy) -> Path:
    return toy.model("qwen3_moe", **WIDE)


@pytest.fixture(scope="module")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    whole.Plan.of(edited_model(str(base), lambda *_: {})).write(path, None)
    return path


@pytest.fixture(scope="module")
def variant(toy: helpers.Toy, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variant")
    tuned = fine_tune(base, folder / "tuned")
    compress(str(base), folder / "delta", toy.verify_config(tuned))
    return folder / "delta"


def test_the_adapter_is_judged_and_written(toy: helpers.Toy, base: Path, variant: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = adapt(str(base), variant, out, toy.verify_config(base))
    print(found)
    record = read_export(out)
    print(json.dumps(record.kept))
    assert provenance.check(out).certified
