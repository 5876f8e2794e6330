"""The manifest of a run directory: which stages were done, of what, with which versions, and what they left."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, NotRequired, TypedDict, cast

from gtqlora.errors import RunError
from gtqlora.storage.contents import read_json

MANIFEST = "manifest.json"
FORMAT = 1
_PACKAGES = ("gtqlora", "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "datasets", "numpy")


class Record(TypedDict):
    """What the manifest says of one stage; what older versions did not write may be absent.

    `hash` is `stage_hash`; `inputs` are the contents of what was read, `outputs` of what was written (None: nothing
    was there), as hashes; `seconds` of wall time, `finished` in UTC.
    """

    hash: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str | None]
    versions: dict[str, str]
    device: NotRequired[str]
    seed: NotRequired[int | None]
    seconds: NotRequired[float]
    finished: NotRequired[str]


class Manifest(TypedDict):
    """What `manifest.json` holds: the records of the stages by their names."""

    format: int
    stages: dict[str, Record]


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, of those that are here."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_output(name: str, identity: object) -> bool:
    """Tell whether these are a name inside the run, and the hash of what it held."""
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not name.startswith("/") and isinstance(identity, str | None)


def _is_record(value: object) -> bool:
    """Tell whether this is what `Run.stage` writes of a stage; another version may have written less."""
    if not isinstance(value, dict) or not isinstance(value.get("hash"), str) or not _texts(value.get("inputs")):
        return False
    outputs, seconds = value.get("outputs"), value.get("seconds", 0.0)
    return (
        isinstance(value.get("config"), dict)
        and isinstance(outputs, dict)
        and all(_is_output(name, identity) for name, identity in outputs.items())
        and _texts(value.get("versions", {}))
        and isinstance(value.get("device", ""), str)
        and isinstance(value.get("finished", ""), str)
        and isinstance(value.get("seed"), int | None)
        and isinstance(seconds, int | float)
        and not isinstance(seconds, bool)
    )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a run directory.

    Raises:
        RunError: it is not there, or none of ours.
    """
    file, remedy = folder / MANIFEST, "choose another --run"
    manifest = read_json(file, remedy)
    stages = manifest.get("stages")
    if type(manifest.get("format")) is not int or not isinstance(stages, dict):
        raise RunError(f"{file}: not a manifest of gtqlora's; {remedy}")
    if manifest["format"] != FORMAT:
        raise RunError(f"{file}: of format {manifest['format']}, which this version does not know; {remedy}")
    for name, stage in stages.items():
        if not _is_record(stage):
            raise RunError(f"{file}: not a manifest of gtqlora's (the record of {name!a} is malformed); {remedy}")
    return cast(Manifest, manifest)


def recorded(folder: Path) -> set[str]:
    """Return the first parts of the names of a run's recorded outputs; none if the manifest there is not of a run."""
    try:
        stages = read_manifest(folder)["stages"].values()
    except RunError:
        return set()
    return {PurePosixPath(name).parts[0] for stage in stages for name in stage["outputs"]}
