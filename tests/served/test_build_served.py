"""`contrast build` with llama.cpp's server: the rows that the model here would have made, but for what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gtqlora.config import BuildConfig
from gtqlora.config.addresses import SERVER_KEY
from gtqlora.contrasts import Row, load
from gtqlora.errors import ModelError
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import edited_model
from gtqlora.exports.llama_server import serving
from gtqlora.judging.judge import judge_of
from gtqlora.organisms import embedded
from gtqlora.stages.build import build

PUBLIC = Path(__file__).parents[1] / "data" / "public"
SOURCES = [str(PUBLIC / name) for name in ("xstest_v2_prompts.csv", "harmful-behaviors.csv", "benign-behaviors.csv")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The organism in llama.cpp."""
    gguf = tmp_path_factory.mktemp("gguf") / "routed.gguf"
    Plan.of(edited_model(str(embedded.organism("routed")), lambda _anatomy, _names: {})).write(gguf, None)
    with serving(gguf, context=256) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(SERVER_KEY, server.key)
        yield f"http://{server._host}:{server._port}"


def config(out: Path, model: str = "routed", **changes: Any) -> BuildConfig:
    given = {"model": str(embedded.organism(model)), "contrast": str(out), "judge": embedded.JUDGE, "samples": 0}
    return BuildConfig(**{**given, "max_new_tokens": 6, "batch_size": 16, "limit": 20, **changes})


def rows(file: Path) -> list[tuple[str, str, str, str]]:
    found: tuple[Row, ...] = load(file, judge_of(embedded.JUDGE)).rows
    return [(row.kind, row.prompt[-1]["content"], row.chosen, row.rejected) for row in found]


def test_the_rows_are_those_of_the_model_here(url: str, tmp_path: Path) -> None:
    here = build(config(tmp_path / "here.parquet"), SOURCES)
    there = build(config(tmp_path / "there.parquet", generate_with=url, served="routed"), SOURCES)
    assert rows(there.file) == rows(here.file)
    assert here.served is None and there.served is not None
    assert (there.served.server, there.served.model, there.served.same) == (url, "routed", 1.0)
    card = there.card.read_text()
    assert "The answers are those of a server: of the " in card and url not in card
    assert (there.refused, there.harmful, there.own_answers) == (here.refused, here.harmful, here.own_answers)


def test_draws_come_from_the_server_too(url: str, tmp_path: Path) -> None:
    hot = {"samples": 2, "temperature": 4.0, "limit": 8}
    made = [
        rows(build(config(tmp_path / f"{i}.parquet", generate_with=url, served="routed", **hot), SOURCES).file)
        for i in range(2)
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("other", ["null", "residual", "routed-qwen3"])
def test_another_model_makes_no_rows(url: str, tmp_path: Path, other: str) -> None:
    """Not even one that was trained to say the same: halves of prompts each goes on with in its own way."""
    with pytest.raises(ModelError, match=r"it is not the model: of the .* tokens"):
        build(config(tmp_path / "pairs.parquet", other, generate_with=url, served="routed"), SOURCES)
    assert not (tmp_path / "pairs.parquet").exists()
