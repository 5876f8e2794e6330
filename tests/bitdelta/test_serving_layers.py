"""Rows of different variants in one batch: each gets what its variant gives alone, and what merged weights give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gtqlora.bitdelta import layers
from gtqlora.bitdelta.layers import Batch, Tiles, VariantLinear
from gtqlora.bitdelta.onebit import OneBit, decode, encode, signs
from gtqlora.bitdelta.resident import install
from gtqlora.bitdelta.variants import Variant
from gtqlora.capture import Subject, open_subject
from gtqlora.config import ModelConfig
from gtqlora.edits.merging import LowRank
from gtqlora.errors import ModelError
from gtqlora.families.anatomy import is_norm
from gtqlora.families.facts import DOWN, GATE_UP
from gtqlora.families.names import Place
from tests import models
from tests.helpers import Toy

MOST = {"deepseek_v3": 1e-5, "qwen3_moe": 1e-5, "glm4_moe": 1e-5, "qwen3_next": 3e-5}
"""Largest difference over the largest logit, in fp32; Gated DeltaNet adds up the rounding of all tokens before."""


def _noise(shape: torch.Size | tuple[int, ...], size: float, seed: int) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora_variant(subject: Subject, name: str, *, gates: bool = True) -> Variant:
    """As an edit has it: LoRA on attention and shared experts, whole routers."""
    lora: dict[str, LowRank] = {}
    for seed, path in enumerate(subject.anatomy.lora_targets):
        weight = subject.model.get_submodule(path).weight
        lora[path] = LowRank(_noise((4, weight.shape[1]), 0.3, seed), _noise((weight.shape[0], 4), 0.3, seed + 1))
    whole = {
        f"{path}.weight": (weight := subject.model.get_submodule(path).weight) + _noise(weight.shape, 0.3, 7)
        for path in (subject.anatomy.routers if gates else ())
    }
    return Variant(name=name, folder=Path(name), lora=lora, whole=whole)


def bits_variant(subject: Subject, name: str, seed: int = 0, *, biased: bool = False) -> Variant:
    """As a full fine-tune has it: matrices, experts and the embedding in one bit, routers, norms and biases whole."""
    bits: dict[Place, OneBit] = {}
    whole: dict[str, Tensor] = {}
    routers = {layer.router for layer in subject.anatomy.moe}
    for path, module in subject.model.named_modules():
        for leaf, value in [*module.named_parameters(recurse=False)]:
            noise = _noise(value.shape, 0.1, seed := seed + 1)
            place = Place(f"{path}.{leaf}")
            if leaf == GATE_UP:  # one of them in the form in which checkpoints have single experts
                for expert, matrix in enumerate(noise):
                    for part, half in enumerate(matrix.chunk(2)):
                        bits[Place(place.name, expert, part)] = encode(half)
            elif leaf == DOWN or (leaf == "weight" and isinstance(module, nn.Linear | nn.Embedding)):
                bits[place] = encode(noise)
            elif is_norm(module) or path in routers or leaf == "bias":
                whole[place.name] = value.detach() + noise
        if biased and path in routers:
            for leaf, value in module.named_buffers(recurse=False):
                whole[f"{path}.{leaf}"] = value + _noise(value.shape, 0.1, seed)
    return Variant(name=name, folder=Path(name), bits=bits, whole=whole)


@torch.no_grad()
def merged(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """The same by other means: a copy of the base with the variant in its weights."""
    model = copy.deepcopy(model)
    parameters = model.state_dict()
    for place, delta in variant.bits.items():
        target = parameters[place.name]
        if place.expert is not None:
            target = target[place.expert].chunk(2)[place.part]
        target += decode(delta)
    for path, product in variant.lora.items():
        parameters[f"{path}.weight"] += product.b_DR @ product.a_RI
    for name, value in variant.whole.items():
        parameters[name].copy_(value)
    return model


def _subject(toy: Toy, family: str) -> Subject:
    return open_subject(str(toy.model(family)))


@pytest.mark.parametrize(("family", "biased"), [*((family, False) for family in MOST), ("deepseek_v3", True)])
@torch.no_grad()
def test_a_mixed_batch(toy: Toy, family: str, biased: bool) -> None:
    """Every row of it: LoRA with and without gates, one-bit variants, one with a correction bias, and the base."""
    subject = _subject(toy, family)
    base = copy.deepcopy(subject.model)
    variants = [
        *(lora_variant(subject, "edit"), bits_variant(subject, "tuned")),
        *(lora_variant(subject, "plain", gates=False), bits_variant(subject, "other", 1000, biased=biased)),
    ]
    wanted = [base, *(merged(base, variant) for variant in variants)]
    batch = install(subject, variants)
    order, ids = [2, 0, 1, 4, 2, 3], models.some_tokens(shape=(6, 9))
    batch.begin(order)
    found = subject.model(ids).logits
    for row, variant in enumerate(order):
        alone = wanted[variant](ids[row : row + 1]).logits[0]
        size, most = alone.abs().max(), MOST[family]
        assert (found[row] - alone).abs().max() <= most * size, (row, variant)
        batch.begin([variant])
        assert (subject.model(ids[row : row + 1]).logits[0] - alone).abs().max() <= most * size, (row, variant)
        assert row == 1 or (alone - base(ids[row : row + 1]).logits[0]).abs().max() > 1e-2 * size


@pytest.mark.gpu
@pytest.mark.parametrize("family", MOST)
@torch.no_grad()
def test_a_mixed_batch_on_a_gpu(toy: Toy, family: str) -> None:
    """By the kernels what merged weights give on the CPU."""
    subject = _subject(toy, family)
    variants = [lora_variant(subject, "edit"), bits_variant(subject, "tuned")]
    wanted = [subject.model, *(merged(subject.model, variant) for variant in variants)]
    there = open_subject(ModelConfig(model=str(toy.model(family)), device="cuda"))
    order, ids = [2, 0, 1, 2], models.some_tokens()
    install(there, variants).begin(order)
    found = there.model(ids.cuda()).logits.cpu()
    for row, variant in enumerate(order):
        alone = wanted[variant](ids[row : row + 1]).logits[0]
        assert (found[row] - alone).abs().max() <= 1e-4 * alone.abs().max(), (row, variant)


@torch.no_grad()
def test_tied_embeddings(toy: Toy) -> None:
    """A one-bit difference of an embedding that is the head as well counts in both places."""
    model = models.tiny_model("qwen3_moe", tie_word_embeddings=True)
    subject = _subject(toy, "qwen3_moe")
    subject = Subject(model, subject.tokenizer, subject.anatomy)
    place = Place("model.embed_tokens.weight")
    variant = Variant(
        name="v", folder=Path("v"), bits={place: encode(_noise(model.model.embed_tokens.weight.shape, 0.1, 3))}
    )
    wanted, ids = merged(model, variant), models.some_tokens()
    install(subject, [variant]).begin([1] * 4)
    assert torch.allclose(model(ids).logits, wanted(ids).logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 64), (20, 37)])
@torch.no_grad()
def test_many_rows_of_one_variant_are_multiplied_once(
    outputs: int, inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix is then put together tile by tile; the tiles' memory is used again and again."""
    monkeypatch.setattr(layers, "_TILE", 7 * inputs * dtype.itemsize)
    base = nn.Linear(inputs, outputs, dtype=dtype)
    delta = encode(_noise((outputs, inputs), 0.1, 0))
    own = OneBit(signs_NB=delta.signs_NB, row_N=delta.row_N.to(dtype), column_K=delta.column_K.to(dtype))
    batch = Batch(torch.device("cpu"), 2)
    layer = VariantLinear(base, batch, Tiles(dtype, batch.device), {1: own}, {})
    batch.begin([1])
    for rows in (3, layers._MERGED - 1, layers._MERGED, 200):
        x = _noise((1, rows, inputs), 1.0, rows).to(dtype)
        wanted = nn.functional.linear(x.float(), base.weight.float() + decode(own), base.bias.float())
        assert (layer(x).float() - wanted).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_merged_matrix_is_the_sum(dtype: torch.dtype) -> None:
    """Bit for bit the weights plus the difference in their type; unchanged rows stay as they are."""
    weight, delta = _noise((30, 40), 1.0, 1).to(dtype), encode(_noise((30, 40), 0.1, 2))
    row_N, column_K = delta.row_N.to(dtype), delta.column_K.to(dtype)
    row_N[4] = 0.0
    own = OneBit(signs_NB=delta.signs_NB, row_N=row_N, column_K=column_K)
    found = Tiles(dtype, torch.device("cpu")).merged(torch.eye(40, dtype=dtype), weight, None, own).T
    assert torch.equal(found, torch.addcmul(weight, signs(own).to(dtype) * row_N[:, None], column_K))
    assert torch.equal(found[4], weight[4])


def _misplaced(variant: Variant) -> Variant:
    return Variant(name="v", folder=Path("v"), bits={Place("model.norm.weight"): encode(torch.ones(2, 2))})


def _too_wide(variant: Variant) -> Variant:
    return Variant(name="v", folder=Path("v"), bits={Place("lm_head.weight"): encode(torch.ones(2, 2))})


def _unknown(variant: Variant) -> Variant:
    return Variant(name="v", folder=Path("v"), lora={"model.nothing": LowRank(torch.ones(1, 2), torch.ones(2, 1))})


def _other_experts(variant: Variant) -> Variant:
    place = Place("model.layers.1.mlp.experts.down_proj", 99)
    return Variant(name="v", folder=Path("v"), bits={place: encode(torch.ones(32, 16))})


def _whole_experts(variant: Variant) -> Variant:
    return Variant(name="v", folder=Path("v"), whole={"model.layers.1.mlp.experts.down_proj": torch.ones(8, 32, 16)})


@pytest.mark.parametrize("change", [_misplaced, _too_wide, _unknown, _other_experts, _whole_experts])
def test_what_no_layer_can_have_is_refused(toy: Toy, change: Callable[[Any], Variant]) -> None:
    with pytest.raises(ModelError, match=r"^v: "):
        install(_subject(toy, "deepseek_v3"), [change(None)])
