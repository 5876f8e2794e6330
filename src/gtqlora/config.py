"""Settings of every stage: frozen dataclasses; TOML and `key=value` overrides in, JSON out; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gtqlora.errors import ConfigError

Mode = Literal["gt", "lora", "gates"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage on a model shares."""

    model: str
    contrast: str
    device: str = "cpu"
    dtype: Dtype = "auto"
    seed: int = 0
    batch_size: int = 64
    max_new_tokens: int = 64
    judge: str = "string"

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, f"batch_size = {self.batch_size}: must be at least 1")
        _require(self.max_new_tokens >= 1, f"max_new_tokens = {self.max_new_tokens}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(StageConfig):
    """Association, interventions and verdict."""

    split: str = "validation"
    max_pairs: int = 200
    min_difference: float = 0.1
    max_experts: int = 64
    random_controls: int = 5
    bootstrap: int = 1000
    level: float = 0.95


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(StageConfig):
    """Removal of the refusal direction from every weight that writes the residual stream."""

    split: str = "train"
    max_pairs: int = 400
    layer: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """GT-QLoRA: DPO with an exact reference, SFT term and routing anchor.

    Attributes:
        mode: "gt" trains LoRA and gates; "lora" and "gates" train one of them, for comparison.
        lr_lora, lr_gates: peak learning rates of the two optimizer groups.
        sft_weight: weight of the next-token loss on `chosen`.
        anchor_harmful, anchor_benign: weights of the routing anchor per kind.
        max_load_cv: the guard stops when the load's coefficient of variation exceeds this times the original's.
    """

    split: str = "train"
    mode: Mode = "gt"
    rank: int = 32
    alpha: int = 64
    lr_lora: float = 2e-4
    lr_gates: float = 5e-6
    beta: float = 0.1
    sft_weight: float = 1.0
    anchor_harmful: float = 1.0
    anchor_benign: float = 0.1
    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 50
    max_load_cv: float = 3.0
    min_overlap: float = 0.1
    dead_budget: int = 20_000
    report_to: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "alpha", "steps", "accumulation", "logging_steps", "save_steps"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("lr_lora", "lr_gates", "beta"):
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: must be positive")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(StageConfig):
    """Before and after on held-out prompts, under the safety floor.

    Attributes:
        margin: how much refusal of harmful prompts may drop, in share of prompts; at most 0.05.
    """

    split: str = "heldout"
    margin: float = 0.02
    level: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.margin <= 0.05, f"margin = {self.margin}: the safety floor allows 0 < margin <= 0.05")
        _require(0.95 <= self.level < 1, f"level = {self.level}: the safety floor is judged at 0.95 or above")


C = TypeVar("C", bound=StageConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-able values."""
    return dataclasses.asdict(config)


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """A TOML value or override text as the field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        _require(value in args, f"{key} = {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None or value == "none":
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), key)
    if hint is bool:
        table = {True: True, False: False, "true": True, "false": False}
        _require(value in table, f"{key} = {value!r}: must be true or false")
        return table[value]
    try:
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key} = {value!r}: must be {hint.__name__}") from error


def _read_toml(path: Path, section: str, known: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    sections = {k: v for k, v in table.items() if isinstance(v, dict)}
    for name in sections:
        _check_known(name, known, f"{path}: section")
    shared = {k: v for k, v in table.items() if not isinstance(v, dict)}
    return {**shared, **sections.get(section, {})}


def _check_known(key: str, known: set[str], where: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
        raise ConfigError(f"{where} {key!r} is unknown{hint}")


STAGES: dict[str, type[StageConfig]] = {
    "diagnose": DiagnoseConfig,
    "project": ProjectConfig,
    "train": TrainConfig,
    "verify": VerifyConfig,
}


def build(
    kind: type[C], *, file: Path | None = None, overrides: Sequence[str] = (), **given: Any
) -> C:
    """A stage's config from a TOML file, then what the caller gives, then `key=value` overrides.

    Top-level keys of the file serve every stage; a `[train]`-like table serves its stage and wins.

    Raises:
        ConfigError: unknown key (with a suggestion), wrong type, or a value out of range.
    """
    hints = get_type_hints(kind)
    section = next(name for name, cls in STAGES.items() if cls is kind)
    values: dict[str, Any] = {}
    if file is not None:
        shared_keys = set().union(*(get_type_hints(cls) for cls in STAGES.values()))
        for key, value in _read_toml(file, section, set(STAGES)).items():
            _check_known(key, set(hints) | shared_keys, f"{file}: key")
            if key in hints:
                values[key] = value
    values.update({k: v for k, v in given.items() if v is not None})
    for override in overrides:
        key, equals, value = override.partition("=")
        _require(bool(equals), f"--set {override}: must be key=value")
        values[key.strip()] = value.strip()
    for key in values:
        _check_known(key, set(hints), f"[{section}] key")
    for key in ("model", "contrast"):
        _require(bool(values.get(key)), f"[{section}] {key} is missing; give it on the command line or in the config")
    return kind(**{k: _coerce(v, hints[k], k) for k, v in values.items()})
