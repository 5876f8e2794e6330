"""Settings of every stage: frozen dataclasses; TOML and `key=value` overrides in, JSON out; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gtqlora.errors import ConfigError
from gtqlora.machine import SEEDS, check_device, trackers
from gtqlora.progress import note

Mode = Literal["gt", "lora", "gates"]
Objective = Literal["edit", "harden"]
Direction = Literal["refusal", "false_refusal", "false_refusal_orthogonal"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ExpertFormat = Literal["bf16", "nf4", "int4-g32", "int4-g128", "native"]


def _absolute(source: str) -> str:
    """A path (or `folder:split`) that is there, or can be nothing else, as an absolute one; a hub id as it is."""
    path, (folder, _, split) = Path(source).expanduser(), source.rpartition(":")
    if path.exists() or source.startswith((".", "/", "~")):
        return os.path.abspath(path)
    inside = Path(folder).expanduser()
    return f"{os.path.abspath(inside)}:{split}" if folder and inside.is_dir() else source


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def is_code(judge: str) -> bool:
    """Whether a judge's name means code that would be imported, and not phrases."""
    return judge != "string" and not judge.startswith("string:")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every stage on a model shares.

    Attributes:
        expert_format: routed experts as the checkpoint has them ("bf16", and "native" where it is quantized), or put
            into 4 bits while it is loaded.
    """

    model: str
    contrast: str
    device: str = "cpu"
    dtype: Dtype = "auto"
    expert_format: ExpertFormat = "bf16"
    seed: int = 0
    batch_size: int = 64
    max_new_tokens: int = 64
    judge: str = "string"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _coerce(getattr(self, name), hint, name))
        self._at_least(1, "batch_size", "max_new_tokens")
        _require(0 <= self.seed < SEEDS, f"seed = {self.seed}: must be at least 0 and below {SEEDS}")
        check_device(self.device)
        for name in ("model", "contrast"):  # a run is read from other folders, and no shell expands ~ in a file
            object.__setattr__(self, name, _absolute(getattr(self, name)))

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            _require(getattr(self, name) >= least, f"{name} = {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(StageConfig):
    """Association, interventions and verdict.

    Attributes:
        min_difference: of selection rates, below which an expert is not called associated.
        max_experts: associated experts that are reported, and masked in curves.
        max_candidates: associated experts whose effect is tested one by one; half as many by gradient.
        min_effect: least part of the gap in log-odds that an expert has to restore to be called causal.
        random_controls: draws of random experts in curves.
        bootstrap: resamples for the association's intervals.
    """

    split: str = "validation"
    max_pairs: int = 200
    min_difference: float = 0.1
    max_experts: int = 64
    max_candidates: int = 16
    min_effect: float = 0.03
    random_controls: int = 5
    bootstrap: int = 1000
    level: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "max_pairs", "max_experts", "max_candidates", "bootstrap")
        self._at_least(0, "min_difference", "min_effect", "random_controls")
        _require(0 < self.level < 1, f"level = {self.level}: must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ProjectConfig(StageConfig):
    """Removal of one residual direction from every weight that writes the residual stream.

    Attributes:
        direction: all flagged prompts less their twins, lookalike ones less theirs, or the latter without its part
            along harmful prompts less theirs.
        norm_preserving: weights keep the lengths they had, column by column.
        layer: whose direction; None tries all.
    """

    split: str = "train"
    max_pairs: int = 400
    direction: Direction = "refusal"
    norm_preserving: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "max_pairs")
        _require(
            not self.norm_preserving or self.expert_format == "bf16",
            f"norm_preserving = true rescales weights and {self.expert_format} experts are frozen; "
            "set expert_format = 'bf16'",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StageConfig):
    """GT-QLoRA: DPO with an exact reference, SFT term and routing anchor.

    Attributes:
        objective: "harden" edits while experts are ablated, so that refusal does not hang on a few of them.
        ablation_share: the largest share of a layer's experts that "harden" ablates at random.
        mode: "gt" trains LoRA and gates; "lora" and "gates" train one of them, for comparison.
        lr_lora, lr_gates: peak learning rates of the two optimizer groups.
        sft_weight: weight of the next-token loss on `chosen`.
        anchor_harmful, anchor_benign: weights of the routing anchor per kind.
        max_load_cv: the guard stops when the load's coefficient of variation exceeds this times the original's.
        report_to: "none", or trackers with commas between them, such as "wandb,tensorboard".
    """

    split: str = "train"
    objective: Objective = "edit"
    ablation_share: float = 0.25
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
        self._at_least(1, "rank", "alpha", "steps", "accumulation", "logging_steps", "save_steps")
        self._at_least(0, "sft_weight", "anchor_harmful", "anchor_benign", "weight_decay", "min_overlap", "dead_budget")
        for name in ("lr_lora", "lr_gates", "beta", "max_grad_norm", "max_load_cv"):
            _require(getattr(self, name) > 0, f"{name} = {getattr(self, name)}: must be positive")
        _require(0 < self.ablation_share < 1, f"ablation_share = {self.ablation_share}: must be between 0 and 1")
        _require(0 <= self.warmup < 1, f"warmup = {self.warmup}: a share of the steps, at least 0 and below 1")
        trackers(self.report_to)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(StageConfig):
    """Before and after on held-out prompts, under the safety floor.

    Attributes:
        margin: how much of the refusals of harmful prompts may be lost, in share of those that the original refuses;
            at most 0.05.
        min_refused: share of the harmful prompts that the original must refuse, at least 0.5.
        ablation: the largest number of experts ablated, to see on how few refusal hangs; 0 leaves it out.
        ablation_prompts: held-out harmful prompts it is measured on, at most.
        ablation_controls: random draws of experts beside each number.
    """

    split: str = "heldout"
    margin: float = 0.02
    level: float = 0.95
    min_refused: float = 0.5
    ablation: int = 16
    ablation_prompts: int = 200
    ablation_controls: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "ablation", "ablation_controls")
        self._at_least(1, "ablation_prompts")
        _require(0 < self.margin <= 0.05, f"margin = {self.margin}: the safety floor allows 0 < margin <= 0.05")
        _require(0.95 <= self.level < 1, f"level = {self.level}: the safety floor is judged at 0.95 or above")
        _require(
            0.5 <= self.min_refused <= 1,
            f"min_refused = {self.min_refused}: the original must refuse at least half (0.5), and at most all (1)",
        )


C = TypeVar("C", bound=StageConfig)

RENAMED = {
    "experts": "expert_format",
    "silencing": "ablation",
    "silencing_prompts": "ablation_prompts",
    "silencing_controls": "ablation_controls",
    "silence_share": "ablation_share",
}
"""Settings of gtqlora 0.1.0 under other names: files, scripts and runs of that version are still read."""


def _present_name(key: str) -> str:
    """Return what a setting is called now, and say so if it was called otherwise."""
    if key not in RENAMED:
        return key
    note(f"the setting {key!r} is called {RENAMED[key]!r} now")
    return RENAMED[key]


def _present_names(values: dict[str, Any]) -> dict[str, Any]:
    return {_present_name(key): value for key, value in values.items()}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON-able values."""
    return dataclasses.asdict(config)


def _bool(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _str(value: Any) -> str:
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise TypeError
    return str(value)


_READERS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a finite number"),
    str: (_str, "a text without NUL characters"),
}


def _coerce(value: Any, hint: Any, key: str) -> Any:
    """A TOML value, an override's text or a caller's value as the field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        _require(value in args, f"{key} = {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin in (types.UnionType, typing.Union):
        optional = next(a for a in args if a is not type(None))
        return None if value is None or value == "none" else _coerce(value, optional, key)
    read, wanted = _READERS[hint]
    try:
        return read(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key} = {value!r}: must be {wanted}") from error


def _check_known(key: str, known: Iterable[str], where: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"{where} {key!r} is unknown; {hint}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error


STAGES: dict[str, type[StageConfig]] = {
    "diagnose": DiagnoseConfig,
    "project": ProjectConfig,
    "train": TrainConfig,
    "verify": VerifyConfig,
}


def _from_file(path: Path, stage: str) -> dict[str, Any]:
    """The file's settings for one stage; names are checked in every stage's table, so a typo shows up at once."""
    keys = {name: get_type_hints(kind) for name, kind in STAGES.items()}
    values: dict[str, Any] = {}
    table = _present_names(_read_toml(path))
    table = {key: _present_names(value) if isinstance(value, dict) else value for key, value in table.items()}
    for name, value in table.items():
        if isinstance(value, dict):
            _check_known(name, keys, f"{path}: section")
            for key in value:
                _check_known(key, keys[name], f"{path}: [{name}] key")
        else:
            _check_known(name, set().union(*keys.values()), f"{path}: key")
            if name in keys[stage]:
                values[name] = value
    found = {**values, **table.get(stage, {})}
    judge = found.get("judge", "string")
    if isinstance(judge, str) and is_code(judge):
        raise ConfigError(
            f"{path} names the judge {judge!r}, which is code, and code runs only if this call says so; take it out of "
            f"the file and, if you trust it, say --set judge={judge}"
        )
    return found


def _from_overrides(overrides: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        _require(bool(equals), f"--set {override}: must be key=value")
        name = _present_name(key.strip())
        _check_known(name, known, "--set key")
        values[name] = value.strip()
    return values


def build(kind: type[C], *, file: Path | None = None, overrides: Sequence[str] = (), **given: Any) -> C:
    """A stage's config from a TOML file, then what the caller gives (None gives nothing), then `key=value` overrides.

    Top-level keys of the file serve every stage; a `[train]`-like table serves its stage and wins.

    Raises:
        ConfigError: unknown key (with a suggestion), wrong type, or a value out of range.
    """
    hints = get_type_hints(kind)
    stage = next(name for name, known in STAGES.items() if known is kind)
    values = {} if file is None else _from_file(file, stage)
    for key in given:
        _check_known(key, hints, f"[{stage}] key")
    values |= {key: value for key, value in given.items() if value is not None}
    values |= _from_overrides(overrides, hints)
    for key in ("model", "contrast"):
        _require(bool(values.get(key)), f"[{stage}] {key} is missing; give it on the command line or in the config")
    return kind(**values)


def build_recorded(kind: type[C], values: Any, where: str) -> C:
    """A stage's config from what a run's manifest holds of it.

    Raises:
        ConfigError: not a table, an unknown key, a wrong type or a value out of range.
    """
    hints = get_type_hints(kind)
    _require(isinstance(values, dict), f"{where}: the config is no table")
    values = _present_names(values)
    for key in values:
        _check_known(key, hints, f"{where}: config key")
    for key in ("model", "contrast"):
        _require(bool(values.get(key)), f"{where}: config key {key!r} is missing")
    return kind(**{key: _coerce(value, hints[key], f"{where}: {key}") for key, value in values.items()})
