"""Where settings come from: TOML files, `key=value` texts, callers, and what runs recorded. Unknown keys are errors."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from gtqlora.config.addresses import is_loopback, servers_of
from gtqlora.config.building import BuildConfig
from gtqlora.config.judges import must_be_named, why_named
from gtqlora.config.stages import (
    DiagnoseConfig,
    ModelConfig,
    ProjectConfig,
    StageConfig,
    TrainConfig,
    VerifyConfig,
)
from gtqlora.config.values import Scalar, coerce, require, scalar
from gtqlora.errors import ConfigError
from gtqlora.progress import note

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound=StageConfig)

JUDGE_KEYS = ("judge", "second_judge")
"""Settings that name a judge."""
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


def _known_name(key: str, known: Iterable[str], where: str) -> str:
    """Return what a known setting is called now.

    Raises:
        ConfigError: it is not known here, under its present name either.
    """
    # checked first: a key that is refused needs no word about its name
    if RENAMED.get(key, key) not in known:
        _check_known(key, known, where)
    return _present_name(key)


def to_dict(config: DataclassInstance) -> dict[str, object]:
    """Return a config as JSON-able values, flat, whatever it is made of."""
    return dataclasses.asdict(config)


# The model is opened as it was for the edit, and its prompts are judged in the same way; the rest is the verifier's.
_OF_THE_EDIT = (
    *(field.name for field in dataclasses.fields(ModelConfig)),
    "contrast",
    "judge",
    "max_new_tokens",
    "seed",
)


def of_the_edit(recorded: Mapping[str, object]) -> dict[str, object]:
    """Return what `verify` takes over from the settings that an edit was made with.

    How the model is opened is taken whole, so that a new setting of `ModelConfig` is neither forgotten nor named here.
    """
    values = {_present_name(key): value for key, value in recorded.items()}
    return {key: values[key] for key in _OF_THE_EDIT if key in values}


def _check_known(key: str, known: Iterable[str], where: str) -> None:
    if key not in known:
        if having := [stage for stage, kind in STAGES.items() if RENAMED.get(key, key) in get_type_hints(kind)]:
            raise ConfigError(f"{where} {key!r} is unknown; it is a setting of {', '.join(having)}")
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
        raise ConfigError(f"{where} {key!r} is unknown; {hint}")


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error


TEMPLATE = "template"
"""The one setting that is a table of its own: variables of the chat template, by name."""
RIVALS = {"gate_step": "lr_gates", "lr_gates": "gate_step"}
"""Settings of which only one can be given, each with the other."""
STAGES: dict[str, type[StageConfig]] = {
    "build": BuildConfig,
    "diagnose": DiagnoseConfig,
    "project": ProjectConfig,
    "train": TrainConfig,
    "verify": VerifyConfig,
}


def _from_file(path: Path, stage: str) -> dict[str, object]:
    """Return a file's settings for one stage; names are checked in every stage's table, so a typo shows up at once."""
    keys = {name: get_type_hints(kind) for name, kind in STAGES.items()}
    found: dict[str, object] = {}
    own: dict[str, object] = {}
    for name, value in _read_toml(path).items():
        if isinstance(value, dict) and name != TEMPLATE:
            _check_known(name, keys, f"{path}: section")
            table = {_known_name(key, keys[name], f"{path}: [{name}] key"): entry for key, entry in value.items()}
            own |= table if name == stage else {}
        else:
            present = _known_name(name, set().union(*keys.values()), f"{path}: key")
            found |= {present: value} if present in keys[stage] else {}
    found |= own  # the stage's own table wins, wherever it stands in the file
    # A recipe may come from a stranger, so that it can name neither code to run nor where harmful prompts are sent.
    for key in JUDGE_KEYS:
        judge = found.get(key)
        if isinstance(judge, str) and must_be_named(judge):
            raise ConfigError(
                f"{path} names the judge {judge!r}, {why_named(judge)}; take it out of the file and, if you trust it, "
                f"say --set {key}={judge}"
            )
    _check_stays(found, path)
    return found


def _check_stays(found: Mapping[str, object], path: Path) -> None:
    """Check that a file sends no prompts to other machines.

    Raises:
        ConfigError: it names a server there.
    """
    names = [name for key in ("served", "served_before", "served_after") if isinstance(name := found.get(key), str)]
    server = found.get("generate_with", "")
    for url in servers_of(server if isinstance(server, str) else "", "", *names):
        require(
            not url or is_loopback(url),
            f"{path} names a server on another machine, to which prompts would be sent; take it out of the file and, "
            "if you trust it, say it in the command",
        )


def _from_overrides(overrides: Sequence[str], known: Iterable[str]) -> tuple[dict[str, str], dict[str, Scalar]]:
    """Return the settings that overrides give, and the variables of the chat template."""
    values: dict[str, str] = {}
    variables: dict[str, Scalar] = {}
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        table, dot, variable = key.partition(".")
        require(bool(equals), f"--set {override}: must be key=value")
        require(key != TEMPLATE, f"--set {override}: name the variable, as in --set {TEMPLATE}.enable_thinking=false")
        if table == TEMPLATE and dot:
            variables[variable] = scalar(value)
        else:
            values[_known_name(key, known, "--set key")] = value
    return values, variables


def build(kind: type[C], *, file: Path | None = None, overrides: Sequence[str] = (), **given: object) -> C:
    """Build a stage's config from a TOML file, then what the caller gives, then `key=value` overrides.

    None from the caller gives nothing. Top-level keys of the file serve every stage; a table such as `[train]` serves
    its stage, and wins. `[template]` serves every stage, too, and `template.NAME=value` overrides one variable of it.

    Raises:
        ConfigError: unknown key (with a suggestion), wrong type, or a value out of range.
    """
    hints = get_type_hints(kind)
    stage = next(name for name, known in STAGES.items() if known is kind)
    values: dict[str, Any] = {} if file is None else _from_file(file, stage)
    for key in given:
        _check_known(key, hints, f"[{stage}] key")
    values |= {key: value for key, value in given.items() if value is not None}
    # Last, so that `--set` wins over everything else, also over another setting that says the same otherwise.
    last, variables = _from_overrides(overrides, hints)
    for key, other in RIVALS.items():
        if last.get(key, "none") != "none" and other not in last:
            values.pop(other, None)
    values |= last
    if variables:
        # one by one: the others stay as the file, or the edit that is verified, has them
        values[TEMPLATE] = {**coerce(values.get(TEMPLATE, {}), hints[TEMPLATE], TEMPLATE), **variables}  # type: ignore[dict-item]
    for key in ("model", "contrast"):
        require(bool(values.get(key)), f"[{stage}] {key} is missing; give it on the command line or in the config")
    return kind(**values)


def build_recorded(kind: type[C], values: object, where: str) -> C:
    """Build a stage's config from what a run's manifest holds of it.

    Raises:
        ConfigError: not a table, an unknown key, a wrong type or a value out of range.
    """
    # Checked as strictly as a user's file: a run directory may have been edited, or be a stranger's.
    hints = get_type_hints(kind)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: the config is no table")
    present = {_known_name(key, hints, f"{where}: config key"): value for key, value in values.items()}
    for key in ("model", "contrast"):
        require(bool(present.get(key)), f"{where}: config key {key!r} is missing")
    # Coerced here already, where the message can name the manifest; the config itself only knows the key.
    settled: dict[str, Any] = {key: coerce(value, hints[key], f"{where}: {key}") for key, value in present.items()}
    return kind(**settled)
