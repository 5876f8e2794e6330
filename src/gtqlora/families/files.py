"""Finds a model's files, local or on the hub, and checks them before anything heavy is read.

Everything in a model folder is untrusted: only JSON and safetensors are read, and only inside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
from safetensors import SafetensorError, safe_open

from gtqlora.errors import ModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SMALL = ("*.json", "*.jinja", "tokenizer*", "*.txt", "*.model")
# transformers would follow these instead of, or on top of, the weights that are checked here.
_DIVERTING = {"adapter_config.json": "a PEFT adapter", "shard-*-model-*-of-*.safetensors": "a distributed checkpoint"}


def is_local(model: str) -> bool:
    """Whether MODEL means a path; anything of the shape `owner/name` that does not exist is a hub id."""
    return Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file.parent}: no {file.name} there; is it a model folder in hub layout?") from error
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict) or not value:
        raise ModelError(f"{file}: must hold a JSON object with the model's settings")
    return value


def _from_hub(model: str, patterns: Iterable[str]) -> Path:
    # HTTPError comes from whichever HTTP library (httpx, httpx2) the installed huggingface_hub is built on.
    # snapshot_download fails at once without a network; hf_hub_download tries again for half a minute.
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(f"{model}: not a local folder, and the hub did not give it ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of an upstream error, for a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def config_file(model: str) -> Path:
    """Where MODEL's config.json is: in a folder, the file itself, or fetched from the hub.

    Raises:
        ModelError: there is no such folder or hub model.
    """
    path = Path(model)
    if not is_local(model):
        return _from_hub(model, [CONFIG]) / CONFIG
    if not path.exists():
        raise ModelError(f"{model}: no such model folder")
    return path if path.is_file() else path / CONFIG


def small_files(model: str) -> Path:
    """The folder of MODEL with config, index and tokenizer, fetched from the hub if need be; weights may be absent.

    Raises:
        ModelError: there is no such folder or hub model.
    """
    return config_file(model).parent if is_local(model) else _from_hub(model, _SMALL)


def _safe_shard(index: Path, name: Any) -> str:
    """A shard name that stays inside the folder and is no pickle."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise ModelError(f"{index}: shard {name!r} is not a .safetensors file")
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if ".." in parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name:
        raise ModelError(f"{index}: shard {name!r} points outside the model folder; do not trust this model")
    return name


def _shards(folder: Path) -> tuple[str, ...]:
    """Names of the weight files, from the index when there is one."""
    if (folder / WEIGHTS).is_file():
        return (WEIGHTS,)
    index = folder / INDEX
    if not index.is_file():
        return ()
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: no weight_map in it; get the index again")
    return tuple(dict.fromkeys(_safe_shard(index, name) for name in weight_map.values()))


def weight_files(model: str) -> tuple[Path, tuple[str, ...]]:
    """The folder of MODEL and its safetensors files, fetched from the hub if need be.

    Raises:
        ModelError: no safetensors, an index that names other places, a shard that is not there, or an adapter.
    """
    folder = small_files(model)
    names = _shards(folder)
    if not is_local(model):
        folder = _from_hub(model, [*_SMALL, *(names or (WEIGHTS,))])
        names = names or _shards(folder)
    for pattern, what in _DIVERTING.items():
        for found in folder.glob(pattern):
            raise ModelError(f"{model}: {found.name} makes this folder {what}; give the folder of the merged model")
    if not names:
        raise ModelError(_without_safetensors(model, folder))
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{model}: shard {name} is missing; get the weights again")
    return folder, names


def _without_safetensors(model: str, folder: Path) -> str:
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if not pickles:
        return f"{model}: no {WEIGHTS} and no {INDEX} there; is it a model folder in hub layout?"
    return f"{model}: only pickled weights ({pickles[0]}), which can run code; convert them to safetensors"


def tensor_names(folder: Path, names: Iterable[str]) -> frozenset[str]:
    """Tensors in the files' headers; reading a header also checks that its file is whole.

    Raises:
        ModelError: a file is corrupt or cut short.
    """
    found: set[str] = set()
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder / name}: corrupt or cut short ({first_line(error)}); get it again") from error
    return frozenset(found)
