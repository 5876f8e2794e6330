"""Memory of GPUs that others read. Run by hand on a machine of two GPUs or more: pytest -m gpu."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.ranks import peers

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tokens_travel_alike_through_nccl_and_through_memory_that_all_read() -> None:
    count = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, "-m", peers.__name__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{len(peers.CHECKS)} checks passed") == count
