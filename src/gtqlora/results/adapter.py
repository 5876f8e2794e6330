# pyright: strict
"""What an adapter folder holds on disk, read without torch: what kind of edit it is, of which model, and its identity.

| file | of | holds |
|---|---|---|
| `gtqlora.json` | both kinds | `Info` |
| `edit.safetensors` | gt-qlora | LoRA pairs and whole routers, by module path |
| `adapter_config.json` | gt-qlora | the base's name, for people and tools that look for it there |
| `direction.safetensors` | projection | the direction |

The form is one that no other loader opens: an edit that was not certified is no deliverable. Everything in the folder
is untrusted when it is read.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

from gtqlora.config import RENAMED, Mode, Target
from gtqlora.errors import RunError
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.run import sha256_bytes, sha256_json

FOLDER, INFO, PEFT_SETTINGS = "adapter", "gtqlora.json", "adapter_config.json"
EDIT_WEIGHTS, DIRECTION = "edit.safetensors", "direction.safetensors"
GT_QLORA, PROJECTION = "gt-qlora", "projection"
_PEFT_TYPE = "GTQLORA"
"""None of PEFT's: it refuses to load a folder that says so."""
# nothing else may lie in an adapter's folder: what is not hashed could be loaded by somebody
_FILES = {GT_QLORA: {INFO, PEFT_SETTINGS, EDIT_WEIGHTS}, PROJECTION: {INFO, DIRECTION}}
_BF16 = "bf16"

Settings = dict[str, object]
"""Name -> value of the settings of a stage, as it was given them."""


@dataclass(frozen=True)
class Deviation:
    """How far stored log-probabilities of the reference are from those computed again, in nats per completion.

    Attributes:
        rows: on how many rows it was looked at.
    """

    mean: float
    max: float
    rows: int


@dataclass(frozen=True)
class LogitsMoved:
    """How far router logits were from the original's when training last logged it, root mean square.

    Attributes:
        lora: of the model with LoRA alone.
        gates: what the trained routers add to that.
    """

    gates: float
    lora: float


@dataclass(frozen=True)
class Training:
    """How a gt-qlora adapter was made: settings, steps done, and why training stopped early, if it did.

    Attributes:
        gate_rates: learning rate of each router, by path, where it was given by its effect.
    """

    config: Settings = field(default_factory=Settings)
    steps: int | None = None
    stopped: str | None = None
    gate_rates: dict[str, float] = field(default_factory=dict[str, float])
    reference: Deviation | None = None
    moved: LogitsMoved | None = None


@dataclass(frozen=True)
class Candidate:
    """What removing one layer's direction leaves of the lookalike refusals and of the accuracy on these prompts."""

    layer: int
    refusal: float
    accuracy: float


@dataclass(frozen=True)
class Projection:
    """How a projection was made: settings, the layer whose direction was taken, and every layer that was tried."""

    config: Settings = field(default_factory=Settings)
    layer: int | None = None
    candidates: list[Candidate] = field(default_factory=list[Candidate])


@dataclass(frozen=True)
class Info:
    """What `gtqlora.json` holds: what the adapter is and what it was made for.

    Attributes:
        kind: "gt-qlora" or "projection".
        base: the model as it was named, a hub id or an absolute path.
        family: its `model_type`.
        revision: the hub commit; None for a folder.
    """

    kind: str
    base: str
    family: str
    details: Training | Projection
    revision: str | None = None

    @property
    def config(self) -> Settings:
        """Return the settings of the stage that made it, under their present names."""
        return {RENAMED.get(key, key): value for key, value in self.details.config.items()}

    @property
    def expert_format(self) -> str:
        """Return the format of the routed experts it was made with; before there was a choice, the checkpoint's own."""
        return str(self.config.get("expert_format", _BF16))

    @property
    def template(self) -> Settings:
        """Return the variables of the chat template that it was made with; none before they could be set."""
        found = self.config.get("template", {})
        return cast(Settings, found) if isinstance(found, dict) else {}

    @property
    def target(self) -> Target | None:
        """Return the program that has to apply the edit as an adapter, where it was trained for one.

        Raises:
            RunError: it is none that is known here.
        """
        return cast("Target | None", self._one_of("target", (None, *get_args(Target))))

    @property
    def mode(self) -> Mode:
        """Return which parts of a gt-qlora adapter were trained.

        Raises:
            RunError: as `target`.
        """
        return cast(Mode, self._one_of("mode", get_args(Mode)))

    def _one_of(self, key: str, values: tuple[object, ...]) -> object:
        if (found := self.config.get(key)) not in values:
            raise RunError(f"{INFO}: {key} = {found!r} is not one of {values}; run `gtqlora train` again")
        return found

    @property
    def norm_preserving(self) -> bool:
        """Return whether a projection keeps the lengths of the weights' columns."""
        return self.config.get("norm_preserving") is True

    @property
    def model(self) -> str:
        """Return the model to load, pinned to the commit it was made on."""
        return self.base if self.revision is None else f"{self.base}@{self.revision}"


def info_of(model: str, family: str, details: Training | Projection) -> Info:
    """Return the `Info` of an edit of a pinned model, `owner/name@commit` or a path."""
    base, at, revision = model.rpartition("@")
    # a folder's name may hold an @, too
    pinned = bool(at) and not Path(model).exists()
    kind = PROJECTION if isinstance(details, Projection) else GT_QLORA
    return Info(kind, base if pinned else model, family, details, revision if pinned else None)


def write_settings(path: Path, info: Info, *, rank: int | None = None, alpha: int | None = None) -> None:
    """Write what stands beside the weights; rank and alpha of a gt-qlora adapter."""
    if info.kind == GT_QLORA:
        _write(path / PEFT_SETTINGS, _peft_settings(info, rank, alpha))
    _write(path / INFO, to_json(info))


def _write(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _peft_settings(info: Info, rank: object, alpha: object) -> dict[str, object]:
    base: dict[str, object] = {"base_model_name_or_path": info.base, "revision": info.revision}
    return {**base, "peft_type": _PEFT_TYPE, "r": rank, "lora_alpha": alpha, "task_type": "CAUSAL_LM"}


def read_files(path: Path) -> dict[str, bytes]:
    """Return every file of an adapter, read once: name -> bytes. Nothing else may lie there, and nothing may be a link.

    Raises:
        RunError: the folder is not an adapter of ours, or a file is missing, unknown, a link or no plain file.
    """
    if not (path / INFO).is_file():
        raise RunError(f"{path}: not a gtqlora adapter (no readable {INFO}); run `gtqlora train` first")
    found: dict[str, bytes] = {}
    for file in sorted(path.iterdir()):
        # lstat, so that a link is seen and not followed
        if not stat.S_ISREG(file.lstat().st_mode):
            raise RunError(f"{file}: a link or no plain file, which no adapter of ours holds; run `gtqlora train`")
        found[file.name] = file.read_bytes()
    kind = info_from(path, found[INFO]).kind
    missing, extra = sorted(_FILES[kind] - found.keys()), sorted(found.keys() - _FILES[kind])
    if missing or extra:
        what = f"no {missing[0]}" if missing else f"{extra[0]}, which is no part of a {kind} adapter"
        raise RunError(f"{path}: the adapter holds {what}; run `gtqlora train` again")
    return found


def info_from(path: Path, data: bytes) -> Info:
    """Return the `Info` that the bytes of a `gtqlora.json` spell.

    Raises:
        RunError: it is not what `write_settings` writes; the message names the key.
    """
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a gtqlora adapter (no readable {INFO}); run `gtqlora train` first") from error
    try:
        info = from_json(Info, value)
        if info.kind not in _FILES:
            raise Mismatch(f"'kind' is {info.kind!a}, not one of {', '.join(_FILES)}")
        # once more by the kind: without settings of its own, `details` fits either record
        details = Projection if info.kind == PROJECTION else Training
        return replace(info, details=from_json(details, cast("dict[str, object]", value)["details"]))
    except Mismatch as error:
        raise RunError(f"{path / INFO}: {error}; run `gtqlora train` again") from error


def read_info(path: Path) -> Info:
    """Return what an adapter folder says of itself.

    Raises:
        RunError: the folder is not an adapter of ours.
    """
    try:
        data = (path / INFO).read_bytes()
    except OSError as error:
        raise RunError(f"{path}: not a gtqlora adapter (no readable {INFO}); run `gtqlora train` first") from error
    return info_from(path, data)


def scale_of(path: Path, info: Info, data: bytes) -> tuple[int, int]:
    """Return rank and alpha of a gt-qlora adapter, whose settings must be, key by key, those that we write.

    Raises:
        RunError: another key or value; it names the key.
    """
    file = path / PEFT_SETTINGS
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file}: not valid JSON ({error}); run `gtqlora train` again") from error
    if not isinstance(value, dict):
        raise RunError(f"{file}: not a JSON object; run `gtqlora train` again")
    found = cast("dict[str, object]", value)
    wanted = _peft_settings(info, info.config.get("rank"), info.config.get("alpha"))
    for key in sorted(found.keys() | wanted.keys()):
        if key not in wanted or key not in found or found[key] != wanted[key]:
            raise RunError(f"{file}: {key!r} is not what `gtqlora train` wrote; run it again")
    rank, alpha = found["r"], found["lora_alpha"]
    # compared with themselves above, they may still be of any type; True is an int
    if type(rank) is not int or type(alpha) is not int or rank < 1 or alpha < 1:
        raise RunError(f"{file}: r = {rank!r} and lora_alpha = {alpha!r} must be positive whole numbers")
    return rank, alpha


def digest_of(files: dict[str, bytes]) -> str:
    """Return the identity of an adapter's weights and settings; `export` demands the one that `verify` certified."""
    return sha256_json([(name, sha256_bytes(data)) for name, data in sorted(files.items())])


def adapter_hash(path: Path) -> str:
    """Return the identity of the adapter that lies there; see `digest_of`."""
    return digest_of(read_files(path))
