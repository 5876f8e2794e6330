"""gtqlora: find where a behaviour lives in a Mixture-of-Experts model, edit it, prove that nothing else broke, ship it.

Every stage is one function `stage(config, run) -> frozen result`. Names are imported on first use, so that importing
the package is quick.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gtqlora.config import DiagnoseConfig, ProjectConfig, TrainConfig, VerifyConfig
    from gtqlora.diagnose import diagnose
    from gtqlora.edit import train
    from gtqlora.edited import Edited, load
    from gtqlora.errors import GtqloraError
    from gtqlora.export import export
    from gtqlora.inspect import inspect
    from gtqlora.project import project
    from gtqlora.report import report
    from gtqlora.run import Run
    from gtqlora.verify import verify

# On some processors bitsandbytes tells of kernels that we do not use, in every process in which PEFT imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {
    "DiagnoseConfig": "config",
    "Edited": "edited",
    "GtqloraError": "errors",
    "ProjectConfig": "config",
    "Run": "run",
    "TrainConfig": "config",
    "VerifyConfig": "config",
    "diagnose": "diagnose",
    "export": "export",
    "inspect": "inspect",
    "load": "edited",
    "project": "project",
    "report": "report",
    "train": "edit",
    "verify": "verify",
}

__all__ = [
    "DiagnoseConfig",
    "Edited",
    "GtqloraError",
    "ProjectConfig",
    "Run",
    "TrainConfig",
    "VerifyConfig",
    "diagnose",
    "export",
    "inspect",
    "load",
    "project",
    "report",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gtqlora' has no attribute {name!r}")
    return getattr(import_module(f"gtqlora.{_HOME[name]}"), name)


class _Door(ModuleType):
    """Keeps `gtqlora.verify` the function when the submodule of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_home = isinstance(value, ModuleType) and _HOME.get(name) == name
        super().__setattr__(name, getattr(value, name) if is_home else value)


sys.modules[__name__].__class__ = _Door
