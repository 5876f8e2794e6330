"""gtqlora: find where a behaviour lives in a Mixture-of-Experts model, edit it, prove that nothing else broke, ship it.

Every stage is one function `stage(config, run) -> frozen result`. Names are imported on first use, so that importing
the package is quick.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtqlora.config import DiagnoseConfig, ExportConfig, ProjectConfig, TrainConfig, VerifyConfig
    from gtqlora.edits.edited import Edited, load
    from gtqlora.errors import GtqloraError
    from gtqlora.run import Run
    from gtqlora.stages.diagnose import diagnose
    from gtqlora.stages.export import export
    from gtqlora.stages.inspect import inspect
    from gtqlora.stages.plan import plan
    from gtqlora.stages.project import project
    from gtqlora.stages.report import report
    from gtqlora.stages.train import train
    from gtqlora.stages.verify import verify

# On some processors bitsandbytes tells of kernels that we do not use, in every process in which PEFT imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {
    "DiagnoseConfig": "config",
    "Edited": "edits.edited",
    "ExportConfig": "config",
    "GtqloraError": "errors",
    "ProjectConfig": "config",
    "Run": "run",
    "TrainConfig": "config",
    "VerifyConfig": "config",
    "diagnose": "stages.diagnose",
    "export": "stages.export",
    "inspect": "stages.inspect",
    "load": "edits.edited",
    "plan": "stages.plan",
    "project": "stages.project",
    "report": "stages.report",
    "train": "stages.train",
    "verify": "stages.verify",
}

__all__ = [
    "DiagnoseConfig",
    "Edited",
    "ExportConfig",
    "GtqloraError",
    "ProjectConfig",
    "Run",
    "TrainConfig",
    "VerifyConfig",
    "diagnose",
    "export",
    "inspect",
    "load",
    "plan",
    "project",
    "report",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gtqlora' has no attribute {name!r}")
    return getattr(import_module(f"gtqlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
