"""Runs the tests of all Triton kernels in Triton's interpreter, in one process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")
FILES = {"tests/experts/test_gpu_kernels.py": 51, "tests/bitdelta/test_serving_kernels.py": 40}
"""Files, and how many of their tests pass at least."""


def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-rp", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    for file, least in FILES.items():
        assert done.stdout.count(f"PASSED {file}::") >= least, done.stdout
