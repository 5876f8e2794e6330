"""Datasets by the datasets library: from a folder, from the hub, or from the hub's cache where it cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gtqlora.errors import ContrastError
from gtqlora.storage.contents import first_line

_SECONDS = 4.0
"""How long the hub may take to say that it is there."""


def load_dataset(name: str, config: str | None, split: str | None) -> Any:
    """Return what the library's function of this name does, without its half minute of retries where there is no hub.

    Raises:
        ContrastError: the hub cannot be reached, and its cache has no such dataset.
        Exception: whatever the library raises.
    """
    import datasets

    why = "" if Path(name).is_dir() else _unreachable(name)
    if not why:
        return datasets.load_dataset(name, config, split=split)
    try:
        with _offline():
            return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library has many ways to say that the cache has nothing
        raise ContrastError(
            f"{name}: no such file or folder here, the hub cannot be reached ({why}), and its cache does not have it; "
            "give a file, or mend the network (HTTPS_PROXY, HF_ENDPOINT; HF_HUB_OFFLINE=1 does without)"
        ) from error


def _unreachable(name: str) -> str:
    """Return why the hub cannot be asked about a dataset; "" if it can, whatever it says, or is not to be."""
    from datasets import config
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if config.HF_HUB_OFFLINE:
        return ""
    try:
        HfApi(endpoint=config.HF_ENDPOINT).dataset_info(name, timeout=_SECONDS)
    except HfHubHTTPError:  # it answers
        return ""
    except Exception as error:  # of whichever library sends the request
        return first_line(error)
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
