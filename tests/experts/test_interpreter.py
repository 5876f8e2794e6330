"""Runs the tests of all Triton kernels in Triton's interpreter, in one process of their own."""

from __future__ import annotations

import pytest

from tests import warm
from tests.helpers import ROOT

pytest.importorskip("triton")
FILES = {"tests/experts/test_gpu_kernels.py": 51, "tests/bitdelta/test_serving_kernels.py": 40}
"""Files, and how many of their tests pass at least."""


CODE = """
import os, sys, pytest
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
for name in [name for name in sys.modules if name.partition(".")[0] == "triton" and "._C" not in name]:
    del sys.modules[name]  # it asks for the variable as it is imported
os.chdir(sys.argv[1])
sys.exit(pytest.main(["-p", "no:cacheprovider", "-n", "0", "-rp", *sys.argv[2:]]))
"""


def test_kernels_in_the_interpreter() -> None:
    done = warm.process(CODE, ROOT, *FILES)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    for file, least in FILES.items():
        assert done.stdout.count(f"PASSED {file}::") >= least, done.stdout
