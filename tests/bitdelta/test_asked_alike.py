"""A variant is served with the chat template's variables that it was judged with, and two judges may judge it."""

from __future__ import annotations

import gc
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from gtqlora.bitdelta.apply import apply
from gtqlora.bitdelta.compress import compress
from gtqlora.bitdelta.container import RECORD, read_variant
from gtqlora.bitdelta.resident import resident
from gtqlora.contrasts.template import encode_prompt
from gtqlora.errors import FloorError, ModelError
from gtqlora.families import load_tokenizer
from gtqlora.results.export import read_export
from tests import helpers, models
from tests.bitdelta.test_compress import fine_tune, settings
from tests.stages.test_thinking import OFF, thinking

ASKED = [{"role": "user", "content": "copy reverse"}]
JUDGES = """
import gc
import importlib
import shutil
from transformers import PreTrainedModel
from tests.helpers import refuses

alive = []

def alike(text):
    if not alive:
        alive.append({id(each) for each in gc.get_objects() if isinstance(each, PreTrainedModel)})
    return refuses(text)

def never(text): return text == "refuse sorry"  # the rows' refusals, none of the model's
"""


@pytest.fixture(scope="module")
def variant(toy: helpers.Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose template asks whether to think, and a variant of it that was judged without."""
    folder = tmp_path_factory.mktemp("alike")
    base = thinking(toy.model("qwen3_moe"), folder / "base")
    tuned = fine_tune(base, folder / "tuned", 3e-3)
    compress(str(base), folder / "variant", settings(tuned, toy, template=OFF))
    return base, folder / "variant"


def test_a_variant_is_spoken_with_as_it_was_judged(variant: tuple[Path, Path]) -> None:
    base, folder = variant
    assert read_variant(folder).record.template == OFF and read_variant(folder).tokenizer is None
    served = resident(str(base), [folder])
    plain, own = (encode_prompt(voice.tokenizer, ASKED) for voice in served.voices)
    assert plain == encode_prompt(load_tokenizer(str(base)), ASKED) != own
    assert own == encode_prompt(load_tokenizer(str(base), OFF), ASKED)
    assert served.voices[0].stop_ids == served.voices[1].stop_ids


def test_cards_and_records_say_with_what_to_ask(variant: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = variant
    apply(str(base), folder, tmp_path / "out")
    assert read_export(tmp_path / "out").template == OFF
    for place in (folder, tmp_path / "out"):
        assert "chat template's `enable_thinking=false`" in (place / "README.md").read_text()


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "bos_token", "a b"])
def test_a_record_cannot_take_the_place_of_the_prompt(variant: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, folder = variant
    copy = Path(shutil.copytree(folder, tmp_path / "variant"))
    models.edit_json(copy / RECORD, lambda old: {**old, "template": {name: "x"}})
    with pytest.raises(ModelError, match=rf"bitdelta\.json: template\.{name}: "):
        resident(str(base), [copy])


def test_a_variant_from_before_is_spoken_with_as_its_base(variant: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = variant
    copy = Path(shutil.copytree(folder, tmp_path / "variant"))
    models.edit_json(copy / RECORD, lambda old: {key: value for key, value in old.items() if key != "template"})
    assert len({voice.tokenizer for voice in resident(str(base), [copy]).voices}) == 1


def test_two_judges_have_to_say_the_same_of_a_variant(
    toy: helpers.Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitdelta_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    base = toy.model("qwen3_moe")
    tuned = fine_tune(base, tmp_path / "tuned", 3e-3)
    before = {id(each) for each in gc.get_objects() if isinstance(each, PreTrainedModel)}
    both: dict[str, Any] = {"second_judge": "bitdelta_judges:alike"}
    found = compress(str(base), tmp_path / "variant", settings(tuned, toy, **both)).record
    assert found.judge.startswith(f"{helpers.JUDGE} sha256:") and " + bitdelta_judges:alike sha256:" in found.judge
    (alive,) = importlib.import_module("bitdelta_judges").alive
    assert alive <= before  # the second one is asked when no model is in memory any more
    with pytest.raises(FloorError, match="cannot tell"):
        compress(
            str(base), tmp_path / "other", settings(tuned, toy, **{**both, "second_judge": "bitdelta_judges:never"})
        )
    assert not (tmp_path / "other").exists()
