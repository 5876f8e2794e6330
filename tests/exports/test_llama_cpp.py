"""GGUF files as llama.cpp runs them: the same answers as transformers', and an error in one line when it fails."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from gtqlora.errors import RunError
from gtqlora.exports import llama_server
from gtqlora.exports.gguf.whole import Plan
from gtqlora.exports.job import Job
from gtqlora.exports.llama_cpp import LlamaCpp, logprobs
from gtqlora.exports.llama_server import serving
from gtqlora.results.verdict import Outcome, of_kind
from tests import helpers
from tests.exports.jobs import certified

Verified = Callable[..., Path]


@pytest.fixture(scope="module")
def job(toy: helpers.Toy, verified: Verified) -> Job:
    return certified(verified(toy.model("glm4_moe")))


@pytest.fixture(scope="module")
def base(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    Plan.of(job).write(path, None)
    return path


def rows_of(job: Job) -> list[Outcome]:
    return [row for kind in ("harmful", "benign") for row in of_kind(job.certificate.outcomes, kind)[:8]]


def test_says_what_verify_heard(job: Job, base: Path) -> None:
    """The same text, length and end from the same token ids, and the same readiness to answer."""
    form = LlamaCpp.of(job, base)
    assert form.name == "GGUF in llama.cpp" and form.notes(job.certificate.outcomes) == []
    rows = rows_of(job)
    for row, said in zip(rows, form.said(rows, edited=False), strict=True):
        assert (said.text, said.tokens, said.ended) == (row.text_before, row.tokens_before, row.ended_before)
        if row.kind == "harmful":
            assert said.rejected_log_prob is not None and row.rejected_log_prob_before is not None
            assert math.isclose(said.rejected_log_prob, row.rejected_log_prob_before, abs_tol=1e-3)
        else:
            assert said.rejected_log_prob is None


def test_what_a_grammar_forces_is_as_likely_as_without_it(base: Path) -> None:
    prompt, forced = [9, 10, 11], [30, 40, 50]
    with serving(base, context=16) as server:
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in forced)
        (reply,) = server.complete([{"prompt": prompt, "n_predict": 3, "n_probs": 1, "grammar": grammar}])
    assert reply["tokens"] == forced
    (every,) = logprobs(base, [[*prompt, *forced]])
    wanted = [every[len(prompt) - 1 + step][token] for step, token in enumerate(forced)]
    found = [token["logprob"] for token in reply["completion_probabilities"]]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_tokenizer_that_reads_otherwise_is_noticed(job: Job, base: Path, tmp_path: Path) -> None:
    """A word of every prompt has another name in the file."""
    strange = tmp_path / "strange.gguf"
    prompts = [row.prompt[-1]["content"].split() for row in rows_of(job)]
    word = prompts[0][0].encode()
    strange.write_bytes(base.read_bytes().replace("▁".encode() + word, "▁".encode() + b"Z" * len(word)))
    form, rows = LlamaCpp.of(job, strange), job.certificate.outcomes
    share = form.tokenizer_agreement(rows)
    assert 0 <= share < 1
    assert f"{share:.1%} of the held-out prompts" in form.notes(rows)[0]


def test_too_long_a_prompt_names_the_file(base: Path) -> None:
    with serving(base, context=64) as server, pytest.raises(RunError, match=f"^{base}: .*context"):
        server.complete([{"prompt": [9] * 63, "n_predict": 8}])


@pytest.mark.parametrize("what", ["cut short", "another format", "missing"])
def test_a_file_that_does_not_load(base: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / "file.gguf"
    if what != "missing":
        path.write_bytes(base.read_bytes()[:-4096] if what == "cut short" else b"no GGUF")
    says = {"cut short": "within the file bounds", "another format": "invalid magic", "missing": "failed to open"}
    with pytest.raises(RunError, match=f"^{re.escape(str(path))}: llama.cpp does not load it .*{says[what]}"):
        logprobs(path, [[9]])


def test_llama_cpp_is_killed(base: Path) -> None:
    with serving(base, context=16) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"llama.cpp stopped in the middle .*killed"):
            server.complete([{"prompt": [9], "n_predict": 1}])


def test_the_server_answers_nobody_without_the_key(base: Path) -> None:
    with serving(base, context=16) as server:
        server.key = "another"
        with pytest.raises(RunError, match=r"refuses a prompt .*API"):
            server.complete([{"prompt": [9], "n_predict": 1}])


def test_without_the_package(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_server, "find_spec", lambda _name: None)
    with pytest.raises(RunError, match=r"pip install 'gtqlora\[gguf\]'"):
        logprobs(base, [[9]])
