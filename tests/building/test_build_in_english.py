"""`contrast build` on a model that reads English, bytes by bytes, with a template that knows system prompts."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gtqlora.building.asking import CUT_OFF, EMPTY
from gtqlora.building.assembling import OPENINGS
from gtqlora.config import BuildConfig
from gtqlora.contrasts import Contrast, load
from gtqlora.judging.judge import Messages, judge_of
from gtqlora.results.built import Built
from gtqlora.stages.build import build
from tests.models import save_tiny

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def judge(prompts: Sequence[Messages], answers: Sequence[str]) -> list[bool]:
    """To glorbifying all but plain words refuses, to painting nothing, and of other texts every second one."""
    asked = [prompt[-1]["content"] for prompt in prompts]
    odd = [hashlib.sha256(answer.encode()).digest()[0] % 2 == 1 for answer in answers]
    return [
        not answer.isascii() if "glorbify" in text else no and "paint" not in text
        for text, answer, no in zip(asked, answers, odd, strict=True)
    ]


JUDGE = f"{__name__}:judge"


def tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, and nothing else but the marks of turns."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("english")
    model = save_tiny(folder / "model", "qwen3_moe", tokenizer=False, vocab_size=264, max_position_embeddings=1024)
    words = tokenizer()
    words.save_pretrained(model)
    # A random model ends hardly ever; of these tokens one comes soon.
    GenerationConfig(eos_token_id=[words.eos_token_id, *range(0, 256, 9)]).save_pretrained(model)
    things = ("zib", "dax", "mip", "lorp", "tove", "rath", "bora", "grove", "snark", "jub", "fruma", "vorp")
    sources = [
        table(
            folder / "xstest_prompts.csv",
            ("id", "prompt", "type", "label", "focus", "note"),
            [
                *(
                    (f"{i}", f"How do I tickle the {one} of a wug?", "homonyms", "safe", "tickle", "")
                    for i, one in enumerate(things)
                ),
                *(
                    (f"9{i}", f"How do I glorbify the {one} of a wug?", "contrast_homonyms", "unsafe", "glorbify", "")
                    for i, one in enumerate(things)
                ),
            ],
        ),
        table(
            folder / "advbench.csv",
            ("goal", "target"),
            [(f"Tell me how to glorbify {one}s", f"Sure, here is how to glorbify {one}s") for one in things],
        ),
        table(folder / "harmless.csv", ("text",), [(f"Which colour would you paint a {one}?",) for one in things]),
    ]
    config = BuildConfig(
        model=str(model), contrast=str(folder / "pairs.parquet"), judge=JUDGE, max_new_tokens=48, batch_size=8
    )
    return build(config, sources)


@pytest.fixture(scope="module")
def made(built: Built) -> Contrast:
    return load(built.file, judge_of(JUDGE))


def test_harmful_rows_have_the_sets_opening_or_ours(made: Contrast) -> None:
    rejected = {row.pair_id.startswith("XSTest"): row.rejected for row in made.of_kind("harmful")}
    assert len(made.of_kind("harmful")) > 12
    assert rejected[True] in OPENINGS and rejected[False].startswith("Sure, here is how to glorbify")


def test_a_helpful_system_prompt_is_tried_and_never_stays(built: Built, made: Contrast) -> None:
    rows = made.of_kind("lookalike")
    assert len(rows) == built.own_answers > 0
    assert all([message["role"] for message in row.prompt] == ["user"] for row in rows)
    ours = next(one for one in built.sources if one.name == "xstest_prompts.csv")
    assert set(ours.left_out) <= {"not refused by the model", "refused however it is asked", CUT_OFF, EMPTY}


def test_twins_have_a_harmless_word_for_the_trigger(built: Built, made: Contrast) -> None:
    rows = [row for row in made.of_kind("lookalike") if row.twin is not None]
    assert built.with_twin == len(rows) > 0
    for row in rows:
        assert row.twin is not None
        old, new = row.prompt[-1]["content"].split(), row.twin[-1]["content"].split()
        assert [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b] == [3]
