"""What settings ask of this machine, which is checked before anything is loaded: devices and trackers; its memory."""

from __future__ import annotations

import difflib
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from gtqlora.errors import ConfigError

if TYPE_CHECKING:
    import torch

SEEDS = 2**32
"""Seeds lie below this number, as NumPy takes no more than 32 bits."""

_DEVICE = re.compile(r"cpu|mps|cuda(:(0|[1-9]\d{0,2}))?")
# Packages that pip knows by another name than Python.
_PIP = {"comet_ml": "comet-ml"}
_TRACKERS = {
    **{name: (name,) for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")},
    **{"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)},
}
"""Names that `report_to` takes. Each needs one of the modules beside it."""


def check_device(name: str) -> None:
    """Check that this machine has a device.

    Raises:
        ConfigError: the name is no device's, or there is no such device here.
    """
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"device = {name!r}: must be cpu, cuda, cuda:0 (or another number) or mps")
    if name == "cpu":
        return
    # Only now: whoever runs on a CPU reads settings without waiting for torch.
    import torch

    here = "set device = cpu, or use a machine that has it"
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"device = {name!r}: this machine or this PyTorch has no MPS device; {here}")
    elif not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: this machine or this PyTorch has no CUDA device; {here}")
    elif int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")


def use_gpu(name: str) -> torch.device:
    """Make a GPU the one that "cuda" means, and return it with its number; "cuda" is the one that it means already."""
    import torch

    device = torch.device(name)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave Python's collector of cycles off for a while; it is on afterwards if it was before."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def release_memory() -> None:
    """Free the memory of models that nobody holds any more: a judge may need it next."""
    import torch  # settings are checked without it

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device or this machine has no memory left."""
    words = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, and of torch on a CPU
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def trackers(names: str) -> list[str]:
    """Return the trackers that a text such as "wandb,tensorboard" names; none for "none".

    Raises:
        ConfigError: a name is unknown, or the package it needs is not installed.
    """
    found = [] if names == "none" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in _TRACKERS:
            close = difflib.get_close_matches(name.lower(), _TRACKERS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: none, {', '.join(sorted(_TRACKERS))}"
            raise ConfigError(f"report_to = {names!r}: no tracker is called {name!r}; {hint}")
        if not any(map(_installed, _TRACKERS[name])):
            raise ConfigError(
                f"report_to = {names!r}: {name} is not installed; pip install {_PIP.get(name, name)}, or set "
                "report_to = none"
            )
    return found


def _installed(module: str) -> bool:
    """Whether a module can be imported."""
    # A mere folder of that name has no origin; wandb keeps its runs in one.
    spec = find_spec(module)
    return spec is not None and spec.origin is not None
