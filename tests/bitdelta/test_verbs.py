"""`gtqlora bitdelta` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gtqlora.bitdelta.compress import compress
from gtqlora.cli import main
from tests import helpers
from tests.bitdelta.test_compress import fine_tune, pairs
from tests.bitdelta.test_in_llama_cpp import fine_tune as matrices_tuned


def test_compress_and_apply(toy: helpers.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = toy.model("qwen3_moe")
    tuned = fine_tune(base, tmp_path / "tuned")
    judged = [
        "--contrast",
        str(pairs(tmp_path / "pairs")),
        "--set",
        f"judge={helpers.JUDGE}",
        "--set",
        "max_new_tokens=2",
    ]
    given = ["bitdelta", "compress", str(base), str(tuned), str(tmp_path / "delta"), *judged, "--set", "margin=0.05"]
    assert main([*given, "--distill", "--name", "polite"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "polite, one bit a weight on",
        "times smaller",
        "safety floor against the base: pass",
        "refused after",
    ):
        assert part in " ".join(shown.split())
    assert json.loads((tmp_path / "delta" / "bitdelta.json").read_text())["distilled"] is True
    assert main(["bitdelta", "apply", str(base), str(tmp_path / "delta"), str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == str(tmp_path / "out") and found["tensors_changed"] > 50


def test_an_adapter_for_llama_cpp(toy: helpers.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = toy.model("qwen3_moe", mlp_only_layers=[])
    tuned = matrices_tuned(base, tmp_path / "tuned")
    pairs = str(toy.pairs(tmp_path / "pairs.jsonl", harmful=150))  # what the variant may have lost counts on
    compress(str(base), tmp_path / "delta", toy.verify_config(tuned, contrast=pairs))
    given = ["bitdelta", "apply", str(base), str(tmp_path / "delta"), str(tmp_path / "out"), "--to", "llama.cpp"]
    settings = ("margin=0.05", "max_new_tokens=2", f"judge={helpers.JUDGE}")
    judged = ["--contrast", pairs, *(word for setting in settings for word in ("--set", setting))]
    assert main([*given, *judged]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("an adapter for llama.cpp", "against the variant as it was judged: pass", "--lora adapter.gguf"):
        assert part in shown
    assert "23 tensors have a width that Q1_0 or Q2_K has no blocks for" in shown
    assert main([*given[:4], str(tmp_path / "other"), *given[5:]]) == 2
    assert "contrast" in capsys.readouterr().err
    assert main(["export", "--check", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("compress", "BASE", "BASE", "OUT", "--contrast", "PAIRS"), "is the same as"),
        (("compress", "BASE", "nowhere/at/all", "OUT", "--contrast", "PAIRS"), "no such model folder"),
        (("compress", "BASE", "BASE", "OUT"), "contrast"),
        (("compress", "BASE", "BASE", "OUT", "--contrast", "organism"), "add --config organism"),
        (
            ("compress", "BASE", "BASE", "OUT", "--contrast", "PAIRS", "--set", "split=all", "--distill"),
            "split = 'all'",
        ),
        (("apply", "BASE", "BASE", "OUT"), "give a folder that `gtqlora bitdelta compress` wrote"),
        (("apply", "BASE", "nowhere", "OUT"), "no such folder"),
        (("apply", "BASE", "nowhere", "OUT", "--gguf", "a.gguf"), "go with --to llama.cpp"),
        (("apply", "BASE", "nowhere", "OUT", "--to", "llama.cpp", "--contrast", "PAIRS"), "no such folder"),
    ],
)
def test_errors_are_one_line(
    toy: helpers.Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], part: str
) -> None:
    places = {"BASE": toy.model("qwen3_moe"), "OUT": tmp_path / "out", "PAIRS": toy.contrast}
    more = ("--set", f"judge={helpers.JUDGE}") if "PAIRS" in words else ()
    assert main(["bitdelta", *(str(places.get(word, word)) for word in (*words, *more))]) == 2
    done = capsys.readouterr()
    assert not done.out and part in done.err
    assert [line for line in done.err.splitlines() if line.startswith("error")] and not list(tmp_path.iterdir())
