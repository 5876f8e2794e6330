"""How a bench runs itself as several ranks: one launcher, and what the leader wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def ran(script: str, count: int, given: Sequence[str]) -> Any:
    """Run a script on so many ranks as `torchrun` starts them, and return what their leader wrote into `--worker`.

    Raises:
        RuntimeError: a rank failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run([*command, script, f"--worker={out}", *given], env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{count} ranks ended with {done.returncode}")
        return json.loads(out.read_text())
