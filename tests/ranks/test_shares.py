"""How a batch is shared: every row once, one shape for all ranks, and fillers that no loss sees."""

from __future__ import annotations

import pytest
import torch

from gtqlora.contrasts import ALL_KINDS
from gtqlora.edits.collating import KindCollator
from gtqlora.edits.reference import FILLER, Row


def _rows(count: int) -> list[Row]:
    return [
        {
            "prompt_ids": [10 + i] * (3 + i),
            "chosen_ids": [20 + i] * (1 + i % 3),
            "rejected_ids": [30 + i] * 2,
            "kind": ALL_KINDS[i % len(ALL_KINDS)],
            "ref_chosen_logps": -1.0 - i,
            "ref_rejected_logps": -2.0 - i,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [4, 6, 7, 3])
def test_ranks_share_a_batch(count: int, packed: bool, few_shapes: bool) -> None:
    rows = _rows(count)
    batches = [
        KindCollator(pad_token_id=0, few_shapes=few_shapes, packed=packed, share=(rank, 4)).torch_call(rows)
        for rank in range(4)
    ]
    assert len({tuple((name, tensor.shape) for name, tensor in sorted(batch.items())) for batch in batches}) == 1
    found = list[tuple[int, int, float]]()
    for batch in batches:
        half = len(batch["kind"])
        assert half == -(-count // 4)
        for i, kind in enumerate(batch["kind"].tolist()):
            completions = batch["completion_mask"][[i, half + i]]
            if kind == FILLER:
                assert not completions.any() and batch["ref_chosen_logps"][i] == batch["ref_rejected_logps"][i] == 0
                continue
            assert completions.any(dim=1).all()
            found.append((kind, int(batch["input_ids"][i, 0]), float(batch["ref_chosen_logps"][i])))
    assert found == [(ALL_KINDS.index(row["kind"]), row["prompt_ids"][0], row["ref_chosen_logps"]) for row in rows]


def test_one_process_has_all_rows_and_no_filler() -> None:
    batch = KindCollator(pad_token_id=0).torch_call(_rows(5))
    assert len(batch["input_ids"]) == 10 and not torch.isin(batch["kind"], torch.tensor([FILLER])).any()
