"""The packages that only GGUF needs, imported when they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from gtqlora.errors import RunError


def _optional(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise RunError(f"GGUF needs the package {name}; pip install 'gtqlora[gguf]'") from error


def gguf() -> ModuleType:
    """Return the `gguf` package: names and a writer.

    Raises:
        RunError: it is not installed.
    """
    return _optional("gguf")


def libgguf() -> ModuleType:
    """Return the `libgguf` package: ggml's own quantization.

    Raises:
        RunError: it is not installed.
    """
    return _optional("libgguf")
