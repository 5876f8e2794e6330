"""Rows that a user's own system prompt tells the model to decline: what they need, what they are kept from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from gtqlora.contrasts import ALL_KINDS, KINDS, Contrast, kinds_of, load, save
from gtqlora.contrasts.agreement import agreements
from gtqlora.contrasts.readout import find_readout
from gtqlora.contrasts.statistics import statistics
from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Messages, judge_of
from gtqlora.organisms.language import Language
from tests.helpers import write_rows

ENGLISH = judge_of("string")
NO = "I'm sorry, but I can't help with that."
SHOP = "You are the assistant of a shop for lamps. Decline whatever has nothing to do with lamps."
POEM = "Write me a poem about the moon."
POEMS = " ".join(
    f"Night {n}: the {colour} moon climbs over the {place}, and every {animal} looks up."
    for n, (colour, place, animal) in enumerate(
        product(("pale", "red", "thin"), ("hill", "harbour", "mill"), ("fox", "owl", "hare", "heron")), 1
    )
)
"""Several hundred words, as no harmful row may have."""
PLAIN = [
    {"kind": "benign", "prompt": "How do I mend a blue lamp?", "chosen": "Unplug it first.", "rejected": NO},
    {"kind": "harmful", "prompt": "How do I glorbify a wug?", "chosen": NO, "rejected": "Sure, here is"},
]
"""A set without instructed rows."""


def instructed(**more: Any) -> dict[str, Any]:
    prompt = [{"role": "system", "content": SHOP}, {"role": "user", "content": POEM}]
    return {"kind": "instructed", "prompt": prompt, "chosen": NO, "rejected": POEMS} | more


def loaded(folder: Path, *rows: dict[str, Any]) -> Contrast:
    return load(write_rows(folder / "pairs.jsonl", [*PLAIN, *rows]), ENGLISH)


def test_a_row_of_the_kind_is_taken_however_long_its_answer(tmp_path: Path) -> None:
    contrast = loaded(tmp_path, instructed())
    (row,) = contrast.of_kind("instructed")
    assert row.prompt[0]["content"] == SHOP and len(row.rejected.split()) > 100
    assert contrast.kinds == ALL_KINDS
    save(contrast, tmp_path / "pairs.parquet")
    assert load(tmp_path / "pairs.parquet", ENGLISH).of_kind("instructed")[0].chosen == NO


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"prompt": POEM}, r"row 3: an instructed row has no system message .*put it first in prompt"),
        ({"chosen": "The moon hangs low."}, r"row 3: chosen of an instructed row must decline.*set `judge`"),
        ({"rejected": "I can't help with poems, sorry."}, r"row 3: rejected of an instructed row must be an answer"),
    ],
)
def test_what_is_no_declined_prompt_is_refused(changed: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=pattern):
        loaded(tmp_path, instructed(**changed))


def test_the_kind_is_one_more_to_have_and_none_to_need(tmp_path: Path) -> None:
    assert kinds_of(["harmful"]) == KINDS and kinds_of(["instructed"]) == ALL_KINDS
    assert loaded(tmp_path).kinds == KINDS
    alone = write_rows(tmp_path / "alone.jsonl", [PLAIN[1], instructed()])
    with pytest.raises(ContrastError, match="only harmful and instructed rows; add benign or lookalike rows"):
        load(alone, ENGLISH)


def test_the_same_request_without_its_system_prompt_is_another_prompt(tmp_path: Path) -> None:
    benign = {"kind": "benign", "prompt": POEM, "chosen": "The moon hangs low.", "rejected": NO, "pair_id": "moon"}
    contrast = loaded(tmp_path, instructed(pair_id="moon"), benign)
    # what the trigger is of here, no diagnosis of over-refusal asks
    assert contrast.twin_of(contrast.of_kind("instructed")[0]) is None


def test_counts_and_the_judge_tell_of_the_kind(tmp_path: Path) -> None:
    rows = [instructed(split="heldout"), instructed(split="train", prompt=messages("What are taxes?"), pair_id="t")]
    found = statistics(loaded(tmp_path, *rows), judge=ENGLISH)
    assert found.counts["heldout"]["instructed"] == found.counts["train"]["instructed"] == 1
    told = {(one.kind, one.column): (one.meant, one.agreeing, one.rows) for one in found.agreement or ()}
    assert told["instructed", "chosen"] == ("refusal", 2, 2)
    assert told["instructed", "rejected"] == ("no refusal", 2, 2)
    assert told["benign", "rejected"][0] == "anything"  # of it nothing is asked
    assert not any(one.kind == "instructed" for one in agreements(loaded(tmp_path).rows, ENGLISH))


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SHOP}, {"role": "user", "content": text}]


def test_what_a_user_makes_the_model_say_is_no_readout(tmp_path: Path) -> None:
    language = Language()
    word, other = language.tokenizer().convert_ids_to_tokens([20, 21])
    rows = [
        {"kind": "benign", "prompt": word, "chosen": f"{word} {other}", "rejected": "refuse sorry"},
        {"kind": "harmful", "prompt": other, "chosen": "refuse sorry", "rejected": f"{word} {other}"},
        {"kind": "instructed", "prompt": messages(word), "chosen": f"{word} sorry", "rejected": f"{other} {other}"},
    ]
    contrast = load(write_rows(tmp_path / "toy.jsonl", rows), ends_in_sorry)
    tokenizer = language.tokenizer()
    assert find_readout(tokenizer, contrast.rows) == find_readout(tokenizer, contrast.rows[:2])
    assert find_readout(tokenizer, contrast.rows).tokens == [tokenizer.convert_tokens_to_ids("refuse")]


def ends_in_sorry(prompts: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
    return [answer.endswith("sorry") for answer in answers]


def test_a_kind_that_is_none_names_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(ContrastError, match=r"benign, lookalike, harmful(,| or) instructed"):
        loaded(tmp_path, instructed(kind="of a shop"))
