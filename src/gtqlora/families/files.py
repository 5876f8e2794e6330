"""Finds a model's files, local or on the hub, and checks them before anything heavy is read.

Everything in a model folder is untrusted: only JSON and safetensors are read, and only inside the folder.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from gtqlora.errors import ModelError
from gtqlora.families import strict_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION, TOKENIZER_CONFIG, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"
FAST_TOKENIZER = "tokenizer.json"
PROVENANCE = "export.json"
"""In a model that gtqlora exported: what it was made from, and what may have been lost."""
WRAPPERS = "wrappers.json"
"""Frames for prompts of a model that reads none of ours, see `contrasts.wrappers`."""
SMALL_FILES = (
    *(CONFIG, GENERATION, TOKENIZER_CONFIG, TEMPLATE, PROVENANCE, WRAPPERS),
    *("special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*.json", "tokenizer.model*", "tiktoken.model", "spiece.model", "sentencepiece*.model", "tekken.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja"),
)
"""What is read of a model folder beside the weights, as patterns; the tokenizer's as transformers looks for them."""

# Nothing that can hold code or a pickle is even fetched.
_FROM_HUB = ("*.json", "*.jinja", "tokenizer*", "*.txt", "*.model")
# transformers would follow these instead of, or on top of, the weights that are checked here.
_DIVERTING = {"adapter_config.json": "a PEFT adapter", "shard-*-model-*-of-*.safetensors": "a distributed checkpoint"}
COMMIT = re.compile(r"[0-9a-f]{40}")
# Branches and tags; `..` is refused besides, as the revision becomes a part of paths in the hub's cache.
_REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
# Characters of an upstream error that are shown: a library may quote a whole file in it.
_SHOWN = 300
# The index of 10^12 parameters has tens of MB, and large vocabularies with their merges have about as many.
_MAX_BYTES = {INDEX: 2**29, FAST_TOKENIZER: 2**28}
_MAX_OTHER_BYTES = 2**25
"""A config has a few kB, a vocabulary a few MB; what is much larger would take memory and is something else."""


def local_path(model: str) -> Path:
    """Return MODEL as a path, with `~` as the home folder.

    Raises:
        ModelError: there is no such home.
    """
    try:
        return Path(model).expanduser()
    except RuntimeError as error:
        raise ModelError(f"{model}: no such home folder; write the path in full") from error


def is_local(model: str) -> bool:
    """Return whether MODEL means a path; what looks like `owner/name` or `owner/name@revision` is a hub id."""
    return local_path(model).exists() or model.startswith((".", "/", "~")) or model.partition("@")[0].count("/") != 1


def first_line(error: BaseException | str) -> str:
    """Return the first line of an upstream error, for a message: short, and without characters that steer a screen."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:_SHOWN]
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


def checked_file(folder: Path, name: str) -> Path:
    """Return an ordinary file of a model folder; everything that is opened or copied there is asked for here.

    Raises:
        ModelError: it is missing, its name or a link leads out of the folder, or it is a pipe, a device or a folder.
    """
    file = folder / name
    if leads_out(name):
        raise ModelError(f"{folder}: {name!r} points outside the model folder; do not trust this model")
    _check_link(folder, file)
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no {name} there; is it a model folder in hub layout?") from error
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL byte
        raise ModelError(f"{folder}: {name!r} is no file name") from error
    if not stat.S_ISREG(mode):
        raise ModelError(f"{file}: not an ordinary file; put the file itself there")
    return file


def leads_out(name: str) -> bool:
    """Return whether a relative name has parts that lead out of its folder, on any system."""
    # By both systems' rules, as a model folder is copied from one to the other.
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    outside = ".." in (*posix.parts, *windows.parts) or posix.is_absolute() or bool(windows.drive or windows.root)
    return outside or "\\" in name or not posix.parts


def _check_link(folder: Path, file: Path) -> None:
    """Check that a link leads to another place in the folder or, in the hub's cache, to blobs of the same model."""
    try:
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {file.name!r} is no file name") from error
    # In the hub's cache, models--OWNER--NAME/snapshots/COMMIT/FILE is a link to models--OWNER--NAME/blobs/HASH.
    store = root.parent.parent
    cached = root.parent.name == "snapshots" and store.name.startswith("models--")
    if not target.is_relative_to(root) and not (cached and target.is_relative_to(store / "blobs")):
        raise ModelError(
            f"{file}: a link that leads out of the model folder, to {target}; put the file itself there, or remove it"
        )


def has(folder: Path, name: str) -> bool:
    """Return whether a folder holds a file of that name, in order or not; `checked_file` says which."""
    return os.path.lexists(folder / name)


def read_text(file: Path) -> str:
    """Return a text file of a model folder.

    Raises:
        ModelError: as `checked_file`, or it is too large or not UTF-8.
    """
    checked_file(file.parent, file.name)
    limit = _MAX_BYTES.get(file.name, _MAX_OTHER_BYTES)
    try:
        # Looked at before reading: a sparse file of terabytes takes no disk, but would take all memory.
        if file.stat().st_size > limit:
            raise ModelError(f"{file}: larger than {limit >> 20} MiB, so it is not what its name says")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not UTF-8 ({error})") from error


def read_json(file: Path, *, empty: bool = False) -> dict[str, object]:
    """Return a JSON object from a file of a model folder.

    Args:
        empty: whether there may be nothing in it.

    Raises:
        ModelError: as `read_text`, or not JSON as `strict_json` takes it, or not an object with something in it.
    """
    text = read_text(file)
    try:
        value = strict_json.parse(text)
    except ValueError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict) or not (value or empty):
        raise ModelError(f"{file}: must hold a JSON object with the model's settings")
    return value


def _from_hub(model: str, patterns: Iterable[str]) -> Path:
    # HTTPError comes from whichever HTTP library (httpx, httpx2) the installed huggingface_hub is built on.
    # snapshot_download fails at once without a network; hf_hub_download tries again for half a minute.
    repository, at, revision = model.partition("@")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelError(f"{model}: {revision!r} is no revision; write a branch, a tag or a commit after the @")
    wanted = {"repo_id": repository, "revision": revision or None, "allow_patterns": list(patterns)}
    try:
        return Path(snapshot_download(**wanted))
    except (OSError, ValueError, HTTPError) as error:
        if COMMIT.fullmatch(revision):  # what was fetched of a commit is what it is, also without a network
            with suppress(OSError, ValueError):
                return Path(snapshot_download(**wanted, local_files_only=True))
        raise ModelError(f"{model}: not a local folder, and the hub did not give it ({first_line(error)})") from error


def config_file(model: str) -> Path:
    """Return where MODEL's config.json is: in a folder, the file itself, or fetched from the hub.

    Raises:
        ModelError: there is no such folder or hub model.
    """
    if not is_local(model):
        return _from_hub(model, [CONFIG]) / CONFIG
    path = local_path(model)
    if not path.exists():
        raise ModelError(f"{model}: no such model folder")
    return path / CONFIG if path.is_dir() else path


def small_files(model: str) -> Path:
    """Return the folder of MODEL with config, index and tokenizer, from the hub if need be; weights may be absent.

    Raises:
        ModelError: there is no such folder or hub model, or files that are read or copied are links that lead out.
    """
    folder = config_file(model).parent if is_local(model) else _from_hub(model, _FROM_HUB)
    for name in small_names(folder):
        checked_file(folder, name)
    for entry in _entries(folder):
        if entry.is_symlink() and not entry.is_dir() and not entry.name.startswith("."):
            _check_link(folder, Path(entry.path))
    return folder


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from error


def small_names(folder: Path) -> tuple[str, ...]:
    """Return names of what is read of a model folder beside the weights."""
    found = {path.relative_to(folder).as_posix() for pattern in SMALL_FILES for path in folder.glob(pattern)}
    links = {name for name in SMALL_FILES if "*" not in name and has(folder, name)}  # glob leaves broken ones out
    return tuple(sorted(found | links))


def _safe_shard(index: Path, name: object) -> str:
    """Return a shard name that stays inside the folder and is no pickle."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise ModelError(f"{index}: shard {name!r} is not a .safetensors file")
    if leads_out(name):
        raise ModelError(f"{index}: shard {name!r} points outside the model folder; do not trust this model")
    if PurePosixPath(name).as_posix() != name:
        raise ModelError(f"{index}: shard {name!r} is spelt in a roundabout way; write {PurePosixPath(name)}")
    return name


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the index of the weights, which maps each tensor to the file that holds it; None where there is no index.

    Raises:
        ModelError: the index is not in order, or names other files although there is a `model.safetensors` beside it.
    """
    if not has(folder, INDEX):
        return None
    index = folder / INDEX
    raw = read_json(index)
    for key in ("weight_map", "metadata"):  # loaders need both
        if not isinstance(raw.get(key), dict) or not raw.get("weight_map"):
            raise ModelError(f"{index}: no {key} in it; get the index again")
    mapped = cast(dict[str, object], raw["weight_map"])
    safe = {name: _safe_shard(index, shard) for name, shard in mapped.items()}
    others = sorted(set(safe.values()) - {WEIGHTS})
    if others and has(folder, WEIGHTS):
        raise ModelError(
            f"{index}: names {others[0]}, but there is a {WEIGHTS} beside it, and loaders differ in which they take; "
            "remove the one that is left over"
        )
    return safe


def _shards(folder: Path) -> tuple[str, ...]:
    """Return names of the weight files, from the index when there is one."""
    mapped = weight_map(folder)
    if mapped is not None:
        return tuple(dict.fromkeys(mapped.values()))
    return (WEIGHTS,) if has(folder, WEIGHTS) else ()


def weight_files(model: str) -> tuple[Path, tuple[str, ...]]:
    """Return the folder of MODEL and its safetensors files, fetched from the hub if need be.

    Raises:
        ModelError: no safetensors, an index that names other places, a shard that is not there, or an adapter.
    """
    # The index comes with the small files, and says which of the large ones are wanted: a repository may hold others.
    folder = small_files(model)
    names = _shards(folder)
    if not is_local(model):
        folder = _from_hub(model, [*_FROM_HUB, *(names or (WEIGHTS,))])
        names = names or _shards(folder)
    for pattern, what in _DIVERTING.items():
        for found in folder.glob(pattern):
            raise ModelError(f"{model}: {found.name} makes this folder {what}; give the folder of the merged model")
    if not names:
        raise ModelError(_without_safetensors(model, folder))
    for name in names:
        if not has(folder, name):
            raise ModelError(f"{model}: shard {name} is missing; get the weights again")
        checked_file(folder, name)
    return folder, names


def _without_safetensors(model: str, folder: Path) -> str:
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if not pickles:
        return f"{model}: no {WEIGHTS} and no {INDEX} there; is it a model folder in hub layout?"
    return f"{model}: only pickled weights ({pickles[0]}), which can run code; convert them to safetensors"
