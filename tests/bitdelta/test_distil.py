"""Row scales fitted to what layers compute: nearer to the fine-tune on such texts than scales from weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gtqlora.bitdelta.checkpoints import Checkpoints, checkpoints
from gtqlora.bitdelta.container import Tensors
from gtqlora.bitdelta.distil import Distilled, fitted_rows
from gtqlora.bitdelta.onebit import OneBit, decode, encode
from gtqlora.bitdelta.placing import place
from gtqlora.capture import Subject, forward, left_padded, open_subject
from gtqlora.organisms import embedded
from tests import helpers, models
from tests.bitdelta.test_compress import fine_tune


def _texts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(2)
    lengths = torch.randint(6, 24, (40,), generator=draw).tolist()
    return [torch.randint(2, models.VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def _logits(subject: Subject) -> torch.Tensor:
    ids_BS, mask_BS = left_padded(_texts(), subject.pad_id, subject.device)
    with torch.no_grad():
        return forward(subject, ids_BS, mask_BS, 6)


def _variant(both: Checkpoints, bits: dict[str, OneBit]) -> torch.Tensor:
    subject = open_subject(both.base.model)
    dense = {change.name: change.read().after for change in both.changes if not change.one_bit}
    place(subject, both.names, both.base, Tensors(bits=bits, dense=dense).edits)
    return _logits(subject)


@pytest.mark.parametrize("model", ["organism", "qwen3_5_moe"])
def test_a_distilled_variant_is_nearer_to_its_fine_tune(toy: helpers.Toy, tmp_path: Path, model: str) -> None:
    """With routed experts one by one and fused; padding is no text."""
    base = embedded.organism("routed") if model == "organism" else toy.model(model)
    tuned = fine_tune(base, tmp_path / "tuned", 3e-3)
    both, subject = checkpoints(str(base), str(tuned)), open_subject(str(tuned))
    encoder = Distilled(subject, both.names, _texts(), batch_size=16)
    matrices = [change for change in both.changes if change.one_bit]
    plain = {change.name: encode(change.read().delta) for change in matrices}
    distilled = {change.name: encoder.encode(change, change.read().delta) for change in matrices}
    moved = {name for name in plain if not torch.equal(plain[name].row_N, distilled[name].row_N)}
    same = {name for name in plain if "embed_tokens" in name} | {name for name in plain if ".experts." in name} - moved
    assert moved == plain.keys() - same and len(same) < 0.1 * len(plain)  # experts that none of the texts chooses
    assert all(torch.equal(plain[name].signs_NB, distilled[name].signs_NB) for name in plain)
    wanted = _logits(subject)
    far, near = ((_variant(both, bits) - wanted).square().mean() for bits in (plain, distilled))
    # a model of random numbers gives its layers inputs of all directions, on which weights alone say nearly all
    assert near < (0.8 if model == "organism" else 1) * far


def test_rows_are_fitted_to_their_own_inputs() -> None:
    draw = torch.Generator().manual_seed(0)
    delta = torch.randn(12, 20, generator=draw)
    delta[4] = 0
    found, inputs = encode(delta), torch.randn(2000, 20, generator=draw) * torch.rand(20, generator=draw).exp()
    fitted = fitted_rows(delta, found, inputs)

    def missed(one_bit: OneBit) -> torch.Tensor:
        return (inputs @ (delta - decode(one_bit)).mT).square().sum(0)

    assert missed(fitted).sum() < missed(found).sum() and not decode(fitted)[4].any()
    for factor in (0.97, 1.03):
        other = OneBit(signs_NB=found.signs_NB, row_N=fitted.row_N * factor, column_K=found.column_K)
        better = missed(other) < missed(fitted)
        assert better.sum() <= 1  # scales of 8 bits, drawn a little to where they were


def test_without_inputs_scales_stay() -> None:
    found = encode(torch.randn(4, 8))
    assert fitted_rows(torch.randn(4, 8), found, torch.zeros(0, 8)) is found
