"""Turn what a command line says into settings: shared options, `organism` shorthands, judges that are code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from cyclopts import Parameter

from gtqlora.cli.console import remark
from gtqlora.cli.servers import Server, say_who_answers
from gtqlora.errors import ConfigError
from gtqlora.progress import note

if TYPE_CHECKING:
    from gtqlora.config import BuildConfig, StageConfig

    C = TypeVar("C", bound=StageConfig)

FORMATS = (
    "Routed experts: bf16 (as an ordinary checkpoint has them), nf4, int4-g32 or int4-g128 (frozen in 4 bits), or "
    "native (as a checkpoint has them that is INT4 already, or was saved with frozen experts)."
)
JUDGES = (
    '"string", "string:phrase|phrase", "classifier:MODEL", "wildguard", "llama-guard:MODEL", "chat:URL#MODEL", or '
    "package.module:name."
)
Model = Annotated[str, Parameter(help="Local folder, hub id, or organism:NAME.")]
MadeRun = Annotated[Path, Parameter(help="Run directory that an earlier verb made.")]
RunDir = Annotated[Path, Parameter(name="--run", help="Run directory: artefacts and manifest.")]
Json = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON instead of tables.")]
Recipe = Annotated[Path | None, Parameter(name="--config", help="TOML file with settings; see recipes/.")]
ExpertFormat = Annotated[str | None, Parameter(name="--expert-format", help=FORMATS)]
_OLD_FLAG = "--experts"
OldExpertFormat = Annotated[str | None, Parameter(name=_OLD_FLAG, show=False)]
"""What 0.1.0 called `--expert-format`; scripts that say so still run."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Hold the options that every verb has which runs a stage on a model."""

    contrast: Annotated[
        str | None,
        Parameter(name="--contrast", help="JSONL, JSON, CSV, Parquet, folder or hub dataset with the pairs."),
    ] = None
    config: Recipe = None
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set", help="Override one setting, e.g. --set steps=300.", negative=(), consume_multiple=False
        ),
    ] = None
    expert_format: ExpertFormat = None
    experts: OldExpertFormat = None
    again: Annotated[
        bool, Parameter(name="--again", negative="", show_default=False, help="Do it again even if nothing changed.")
    ] = False
    as_json: Json = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Hold the options of `contrast build`: what sources are, and the settings that are given most often."""

    described: Annotated[
        list[str] | None,
        Parameter(
            name="--as",
            help="What the rows of a source that is not known are: KIND:prompt=COLUMN, and maybe "
            ",where=COLUMN=VALUE,topic=COLUMN,pair=COLUMN,opening=COLUMN,answer=COLUMN,of=PART-OF-A-SOURCE'S-NAME; for "
            "KIND instructed also ,system=COLUMN-OR-SYSTEM-PROMPT; "
            "given several times, each row is what the first says that fits.",
            negative=(),
            consume_multiple=False,
        ),
    ] = None
    limit: Annotated[int | None, Parameter(help="Prompts of each kind that the model is asked, at most.")] = None
    judge: Annotated[str | None, Parameter(help=JUDGES)] = None
    max_new_tokens: Annotated[int | None, Parameter(help="Tokens at which an answer is cut off.")] = None
    batch_size: Annotated[int | None, Parameter(help="Prompts that run together.")] = None
    seed: Annotated[int | None, Parameter(help="Seed of the draws.")] = None
    device: Annotated[str | None, Parameter(help="cpu, or a GPU such as cuda:0.")] = None
    expert_format: ExpertFormat = None
    generate_with: Server = None
    served: Annotated[str | None, Parameter(name="--served", help="What that server calls the model.")] = None
    config: Recipe = None
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set", help="Override one setting, e.g. --set samples=8.", negative=(), consume_multiple=False
        ),
    ] = None
    restart: Annotated[
        bool,
        Parameter(
            name="--restart",
            negative="",
            show_default=False,
            help="Begin anew, without the answers of a build that was stopped.",
        ),
    ] = False
    as_json: Json = False

    def given(self) -> dict[str, object]:
        """Return the settings among them; None gives nothing."""
        names = ("limit", "judge", "max_new_tokens", "batch_size", "seed", "device", "expert_format")
        names = (*names, "generate_with", "served")
        return {name: getattr(self, name) for name in names}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """Hold the options of `export` that say what is written."""

    to: Annotated[
        str,
        Parameter(
            help="safetensors (merged), peft, gguf (merged), gguf-adapter; or hub: publish OUT, which is there already."
        ),
    ] = "safetensors"
    target: Annotated[
        str | None, Parameter(name="--for", help="With --to peft: the program that loads it: peft, vllm or sglang.")
    ] = None
    onto: Annotated[
        Path | None,
        Parameter(name="--onto", help="With --to gguf: your own GGUF of the base; only changed tensors are rewritten."),
    ] = None
    tokenizer: Annotated[
        Path | None,
        Parameter(name="--tokenizer", help="With --to gguf: a GGUF of the same model to take the tokenizer from."),
    ] = None
    base: Annotated[
        Path | None,
        Parameter(name="--base", help="With --to gguf-adapter: your own GGUF that it will be loaded on."),
    ] = None
    overlay: Annotated[
        bool,
        Parameter(
            name="--overlay",
            negative="",
            help="One more file with the changed tensors, and links to the base's files.",
        ),
    ] = False
    link: Annotated[
        bool,
        Parameter(name="--link", negative="", help="Share unchanged bytes with the base's files where the disk can."),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Hold the options of `export --to hub`."""

    repo: Annotated[str | None, Parameter(name="--repo", help="With --to hub: OWNER/NAME there.")] = None
    private: Annotated[
        bool,
        Parameter(name="--private", negative="--public", help="With --to hub: whether only you and yours may see it."),
    ] = True
    dry_run: Annotated[
        bool,
        Parameter(
            name="--dry-run",
            negative="",
            show_default=False,
            help="With --to hub: show what would go where; send nothing.",
        ),
    ] = False
    base_model: Annotated[
        str | None,
        Parameter(name="--base-model", help="With --to hub: the base's OWNER/NAME there, for a card that has none."),
    ] = None


def asked_format(given: str | None, old: str | None) -> str | None:
    """Return the expert format that the options name; a note says so if it came by its old name."""
    if old is not None:
        note(f"the option {_OLD_FLAG} is called --expert-format now")
    return given or old


def embedded_model(name: str) -> str:
    """Return a model as a path or hub id, with `organism:NAME` as the folder of that embedded organism.

    Raises:
        ModelError: no organism of that name is embedded.
    """
    from gtqlora.organisms import embedded

    return str(embedded.organism(name.partition(":")[2])) if name.startswith("organism:") else name


def embedded_contrast(source: str) -> str:
    """Return a contrast set as a path or dataset id, with `organism` as the organisms' own pairs."""
    from gtqlora.organisms import embedded

    return str(embedded.contrast()) if source == "organism" else source


def embedded_recipe(file: Path) -> Path:
    """Return a recipe's file, with `organism` as the one that is packaged with the organisms."""
    from gtqlora.organisms import embedded

    return embedded.recipe() if str(file) == "organism" else file


def configured(kind: type[C], options: StageOptions, given: Mapping[str, object]) -> C:
    """Return a stage's settings from its options, and say which code judges, if code does.

    Args:
        given: settings from elsewhere, such as the model; None gives nothing, and options win.

    Raises:
        ConfigError: an unknown setting, a value of a wrong type or out of range, or the organisms' pairs without
            their judge.
        ModelError: no organism of that name is embedded.
    """
    from gtqlora.config import build

    # An option that was not given must not hide what the caller gives, such as the settings of the edit.
    chosen = {"contrast": options.contrast, "expert_format": asked_format(options.expert_format, options.experts)}
    if chosen["expert_format"] == "bf16":  # where the edit's experts lay says nothing of these
        given = {key: value for key, value in given.items() if key not in ("expert_memory", "expert_disk")}
    values = {**given, **{key: value for key, value in chosen.items() if value is not None}}
    for key, resolved in (("model", embedded_model), ("contrast", embedded_contrast)):
        if values.get(key) is not None:
            values[key] = resolved(str(values[key]))
    file = embedded_recipe(options.config) if options.config else None
    settled = build(kind, file=file, overrides=options.settings or (), **values)
    # their refusals are words of their own, so that the default judge would call every row wrong
    if options.contrast == "organism" and settled.judge == kind.judge:
        raise ConfigError(f"--contrast organism: judge {settled.judge!r} cannot judge it; add --config organism")
    for key, judge in judges_in(settled).items():
        say_what_judges(judge, key=key)
    say_who_answers(settled, "served_before", "served_after")
    return settled


def judges_in(config: StageConfig) -> dict[str, str]:
    """Return the judges that a stage's settings name, by the settings that do."""
    from gtqlora.config import JUDGE_KEYS

    named = {key: getattr(config, key, None) for key in JUDGE_KEYS}
    return {key: judge for key, judge in named.items() if judge is not None}


def build_config(model: str, out: Path, options: BuildOptions) -> BuildConfig:
    """Return the settings of `contrast build`, and say which code judges, if code does.

    Raises:
        ConfigError, ModelError: as `configured`.
    """
    from gtqlora.config import BuildConfig, build

    file = embedded_recipe(options.config) if options.config else None
    given = {"model": embedded_model(model), "contrast": str(out), **options.given()}
    settled = build(BuildConfig, file=file, overrides=options.settings or (), **given)
    say_what_judges(settled.judge)
    say_who_answers(settled, "served")
    return settled


def say_what_judges(judge: str, *, key: str = "judge") -> None:
    """Name, on stderr, the file of the code that is about to be imported as the judge, or where prompts will go.

    Raises:
        JudgeError: the name means no judge.
    """
    from gtqlora.config import is_code
    from gtqlora.config.judges import is_remote
    from gtqlora.judging.names import check_known
    from gtqlora.judging.trust import source_of

    check_known(judge, key=key)  # now: stages hash gigabytes before they build their judge
    if is_code(judge):
        remark(f"judge {judge}: imports {source_of(judge) or 'a module without a file of its own'}")
    elif is_remote(judge):
        remark(f"judge {judge}: prompts and answers leave this machine")


def named_judge(overrides: Sequence[str] | None) -> str | None:
    """Return the judge that `--set judge=` of this call names, the last one if it does so twice."""
    return set_by(overrides).get("judge")


def set_by(overrides: Sequence[str] | None) -> dict[str, str]:
    """Return what each `--set` of this call sets, as `build` reads them: the last one wins."""
    pairs = (override.partition("=") for override in overrides or ())
    return {key.strip(): value.strip() for key, _, value in pairs}


def same_prompts(options: StageOptions) -> list[str]:
    """Return the words with which another stage has the same prompts, judge and experts as one with these options."""
    given = {
        "--contrast": options.contrast,
        "--config": options.config,
        "--expert-format": options.expert_format or options.experts,
        "--set": f"judge={judge}" if (judge := named_judge(options.settings)) else None,
    }
    words = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    return [*words, *same_template(options.settings)]


def same_template(overrides: Sequence[str] | None) -> list[str]:
    """Return the words with which another verb renders prompts as one with these overrides."""
    variables = (override for override in overrides or () if override.strip().startswith("template."))
    return [word for override in variables for word in ("--set", override)]
