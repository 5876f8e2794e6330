"""`verify` with `transformers serve`, which takes prompts as text only and serves any folder by its path."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from gtqlora.results.verdict import SCORES, read_outcomes
from gtqlora.run import SERVED, Run
from gtqlora.stages.verify import verify
from tests import helpers

missing = [name for name in ("fastapi", "openai", "uvicorn") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"`transformers serve` needs {' and '.join(missing)}; pip install 'transformers[serving]'"
)
SECONDS = 60


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The server's address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = "from transformers.cli.transformers import main; main()"
    words = [sys.executable, "-c", serve, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(
        words,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _wait(health: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(SECONDS * 5):
        try:
            urllib.request.urlopen(health).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    raise AssertionError(f"no server within {SECONDS} s")


def test_the_exported_folder_says_what_the_model_here_says(
    url: str, toy: helpers.Toy, verified: Callable[..., Path], tmp_path: Path
) -> None:
    model = toy.model("glm4_moe")
    path, out = Path(shutil.copytree(verified(model), tmp_path / "run")), tmp_path / "out"
    helpers.exported(path, out)
    sixty = {("heldout", kind): 12 for kind in ("harmful", "lookalike", "benign")}
    few = helpers.write_rows(tmp_path / "few.jsonl", helpers.toy_rows(sixty))
    lean = {"ablation": 0, "mediation_prompts": 0, "wrapped_prompts": 1, "contrast": str(few), "batch_size": 4}
    names = {"generate_with": url, "served_before": str(model), "served_after": str(out)}
    with Run(path) as run:
        there = verify(toy.verify_config(model, **lean, **names), run)
    assert there.served is not None and there.served.same_before == there.served.same_after == 1
    known = {row.prompt_json: row for row in read_outcomes(path)}
    told = [(row, known[row.prompt_json]) for row in read_outcomes(path / SERVED, SCORES) if row.prompt_json in known]
    assert len(told) > 20 and all((a.text_before, a.text_after) == (b.text_before, b.text_after) for a, b in told)
