"""The command line: parse, call a stage, print. The only module that prints; heavy imports wait until a verb runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from gtqlora.cli import tables
from gtqlora.cli.console import (
    demo_progress,
    flushed,
    interval,
    new_table,
    open_console,
    plain,
    quieten,
    share,
    show_anything,
    stage_progress,
    trouble,
)
from gtqlora.errors import ConfigError, FloorError, GtqloraError, RunError, TrainingError

if TYPE_CHECKING:
    from rich.console import Console

    from gtqlora.config import StageConfig
    from gtqlora.stages.diagnose import Diagnosis

_HELP = """Find where a behaviour lives in a Mixture-of-Experts model, edit it with GT-QLoRA, prove that nothing else
broke, and ship the weights.

MODEL is a local folder in hub layout, a hub id, or `organism:NAME` for an embedded toy model (routed, residual,
expert-only, redundant, null, routed-qwen3). `--contrast organism` and `--config organism` are the organisms' own pairs
and settings.

The tool turns one way: models come to refuse less of what is harmless and never less of what is harmful. Weights leave
only after `verify` certified the safety floor."""

app = App(
    name="gtqlora",
    help=_HELP,
    version_flags=["--version"],
    help_format="markdown",
    suppress_keyboard_interrupt=False,  # `_run` says what stays
)
contrast_app = App(name="contrast", help="Work with contrast sets (preference pairs in three kinds).")
app.command(contrast_app)

Config = Annotated[Path | None, Parameter(name="--config", help="TOML file with settings; see recipes/.")]
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", help="Override one setting, e.g. --set steps=300.", negative=(), consume_multiple=False),
]
Contrast = Annotated[str | None, Parameter(name="--contrast", help="JSONL, Parquet, or hub dataset with the pairs.")]
ExpertFormat = Annotated[
    str | None,
    Parameter(
        name="--expert-format",
        help="Routed experts: bf16 (as an ordinary checkpoint has them), nf4, int4-g32 or int4-g128 (frozen in 4 "
        "bits), or native (as a checkpoint has them that is INT4 already, or was saved with frozen experts). "
        "`verify` takes what the edit was trained with.",
    ),
]
RunDir = Annotated[Path, Parameter(name="--run", help="Run directory: artefacts and manifest.")]
Again = Annotated[bool, Parameter(name="--again", negative="", help="Do it again even if nothing changed.")]
_READER_LEFT = 141  # as a shell says of a process that SIGPIPE ended
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of tables.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; user errors print one line and give their exit code."""
    quieten()
    show_anything()
    try:
        code = _run(arguments)
    finally:
        failed = flushed()
    if failed is None:
        return code
    _print_error(trouble(failed, "standard output"))
    return GtqloraError.exit_code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        if odd := [argument for argument in arguments or () if "\0" in argument]:
            raise RunError(f"{odd[0]!a}: holds a NUL byte, which no name may; choose another")
        return int(app(arguments, result_action="return_value") or 0)
    except GtqloraError as error:
        _print_error(str(error))
        return error.exit_code
    except BrokenPipeError:  # standard output's reader has what it wanted
        return _READER_LEFT
    except (OSError, UnicodeEncodeError) as error:  # a full disk, a name that no library takes: the user's to mend
        _print_error(trouble(error, "input or output" if flushed() is None else "standard output"))
        return GtqloraError.exit_code
    except KeyboardInterrupt:
        open_console(stderr=True).print("stopped; finished artefacts stay, run the same command to go on")
        return 130


def _print_error(text: str) -> None:
    with suppress(OSError):  # nowhere is left to say it
        open_console(stderr=True).print(f"[bold red]error:[/] {plain(text)}", soft_wrap=True, highlight=False)


def _say_starting() -> None:
    """On a terminal, that something is happening while the libraries are imported, which takes seconds."""
    console = open_console(stderr=True)
    if console.is_terminal:
        console.print("starting ...", style="dim", highlight=False)


def _embedded(value: str, kind: str) -> str:
    """`organism...` shorthands as paths."""
    from gtqlora.organisms import embedded

    if kind == "model" and value.startswith("organism:"):
        return str(embedded.organism(value.partition(":")[2]))
    if value == "organism" and kind in ("contrast", "config"):
        return str(embedded.contrast() if kind == "contrast" else embedded.recipe())
    return value


def _build(
    kind: type[StageConfig],
    config: Path | None,
    overrides: list[str] | None,
    model: str | None,
    contrast: str | None,
    **given: Any,
) -> Any:
    from gtqlora.config import build

    settled = build(
        kind,
        file=Path(_embedded(str(config), "config")) if config else None,
        overrides=overrides or (),
        model=_embedded(model, "model") if model else None,
        contrast=_embedded(contrast, "contrast") if contrast else None,
        **given,
    )
    _say_what_judges(settled.judge)
    return settled


def _say_what_judges(judge: str) -> None:
    """Name the code that is about to be imported."""
    from gtqlora.config import is_code
    from gtqlora.judging.trust import source_of

    if is_code(judge):
        where = f"imports {source_of(judge) or 'a module that cannot be found'}"
        open_console(stderr=True).print(f"judge {plain(judge)}: {plain(where)}", highlight=False, soft_wrap=True)


def _trusted(judge: str, run: Path, named_in: Path) -> str:
    """A judge that a run names: phrases, or code that the user named for this very run before.

    Raises:
        ConfigError: it is code, and this call has to say so.
    """
    from gtqlora.judging import trust

    if not trust.is_remembered(run, judge):
        trust.check_named(judge, str(named_in))
    return judge


def _remember_judge(run: Path, judge: str) -> None:
    from gtqlora.judging import trust

    trust.remember(run, judge)


def _named_judge(overrides: list[str] | None) -> str | None:
    """The judge that `--set judge=` of this call names, the last one if it does so twice."""
    named = [value.strip() for key, _, value in (o.partition("=") for o in overrides or ()) if key.strip() == "judge"]
    return named[-1] if named else None


@app.command
def inspect(
    model: str,
    *,
    rank: Annotated[int, Parameter(help="LoRA rank to count with.")] = 32,
    expert_format: ExpertFormat = None,
    as_json: Json = False,
) -> None:
    """Show a model's parts and what GT-QLoRA would train, from its config alone."""
    from gtqlora.stages.inspect import inspect as look

    found = look(_embedded(model, "model"), lora_rank=rank, expert_format=expert_format)
    if as_json:
        print(found.to_json())
        return
    console = open_console()
    console.print(
        f"[bold]{plain(found.model)}[/]: {found.family} ({found.class_name}), {found.layers} layers, "
        f"{found.routers} routers, {found.experts} experts top-{found.top_k} by {found.score}, {found.dtype}"
        + (f", quantized ({found.quantized})" if found.quantized else "")
        + (f", routed experts counted in {found.experts_format}" if found.experts_format else "")
        + (", which gtqlora cannot load" if found.quantized and not (found.experts_format or expert_format) else ""),
        highlight=False,
    )
    console.print(tables.parts(found))
    console.print(
        f"gate parameters {found.gate_parameters:,}; correction-bias values {found.correction_bias_values:,} (frozen); "
        f"chat template: {({True: 'yes', False: 'no', None: 'no tokenizer here'})[found.chat_template]}",
        highlight=False,
    )
    console.print(tables.names(found))


@contrast_app.command
def check(
    file: str,
    *,
    model: Annotated[str | None, Parameter(help="Also count tokens after this model's chat template.")] = None,
    judge: Annotated[str, Parameter(help='"string", "string:phrase|phrase", or package.module:function.')] = "string",
    out: Annotated[Path | None, Parameter(help="Write the checked rows as Parquet here.")] = None,
) -> None:
    """Check a contrast set: schema, duplicates, leakage, lengths, the one-way rule."""
    from gtqlora import contrasts
    from gtqlora.contrasts.statistics import statistics
    from gtqlora.judging.judge import judge_of
    from gtqlora.organisms import embedded

    source = _embedded(file, "contrast")
    judge = embedded.JUDGE if file == "organism" and judge == "string" else judge
    _say_what_judges(judge)
    found = contrasts.load(source, judge_of(judge))
    tokenizer, limit, vocabulary = None, None, None
    if model:
        from gtqlora.families import load_config, load_tokenizer

        path = _embedded(model, "model")
        settings = load_config(path)[1]
        tokenizer, limit, vocabulary = load_tokenizer(path), settings.max_position_embeddings, settings.vocab_size
    facts = statistics(found, tokenizer, limit, vocabulary)
    table = new_table(f"{plain(source)}: {facts.rows:,} rows, {facts.pairs:,} pairs", "split", *contrasts.KINDS)
    for split, counts in facts.counts.items():
        table.add_row(split, *(f"{counts.get(kind, 0):,}" for kind in contrasts.KINDS))
    console = open_console()
    console.print(table)
    console.print(f"{facts.with_twin:,} rows with a twin, {facts.unique_prompts:,} different prompts", highlight=False)
    for name, lengths in (("prompt", facts.prompt_tokens), ("prompt and answer", facts.full_tokens)):
        if lengths:
            console.print(
                f"tokens, {name}: {lengths.minimum} to {lengths.maximum}, median {lengths.median:g}, "
                f"95 % {lengths.p95}",
                highlight=False,
            )
    if out:
        contrasts.save(found, out)
    console.print("[green]the one-way rule holds in every row[/]")


@app.command
def diagnose(
    model: str,
    *,
    contrast: Contrast = None,
    run: RunDir,
    config: Config = None,
    settings: Set = None,
    expert_format: ExpertFormat = None,
    again: Again = False,
    as_json: Json = False,
) -> None:
    """Find the behaviour: association, interventions with controls, directions, a verdict."""
    _say_starting()
    from gtqlora.config import DiagnoseConfig
    from gtqlora.run import Run
    from gtqlora.stages.diagnose import diagnose as stage

    settled = _build(DiagnoseConfig, config, settings, model, contrast, expert_format=expert_format)
    with Run(run) as held, stage_progress():
        _remember_judge(run, settled.judge)
        found = stage(settled, held, again=again)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    _print_diagnosis(found)


def _print_diagnosis(found: Diagnosis) -> None:
    console = open_console()
    console.print(tables.interventions(found))
    if found.shares:
        console.print(tables.shares(found))
    if found.experts:
        console.print(tables.experts(found))
    associated = ", ".join(f"{e.layer}/{e.expert}" for e in found.top_experts) or "none"
    console.print(f"experts chosen clearly more on flagged prompts (association only): {associated}", highlight=False)
    for warning in found.warnings:
        console.print(f"[yellow]note:[/] {plain(warning)}", highlight=False)
    console.print(f"[bold]{plain(found.sentence)}[/]", highlight=False)


@app.command
def train(
    model: str,
    *,
    contrast: Contrast = None,
    run: RunDir,
    config: Config = None,
    settings: Set = None,
    mode: Annotated[str | None, Parameter(help="gt (LoRA and gates), lora, or gates.")] = None,
    objective: Annotated[
        str | None,
        Parameter(help="edit, or harden: edit while experts are ablated, so that refusal hangs on no few of them."),
    ] = None,
    expert_format: ExpertFormat = None,
    again: Again = False,
) -> int:
    """Edit the behaviour with GT-QLoRA; resumes from the last checkpoint if it was interrupted."""
    _say_starting()
    from gtqlora.config import TrainConfig
    from gtqlora.run import Run
    from gtqlora.stages.train import train as stage

    settled = _build(
        TrainConfig, config, settings, model, contrast, mode=mode, objective=objective, expert_format=expert_format
    )
    with Run(run) as held, stage_progress():
        _remember_judge(run, settled.judge)
        before = held.manifest()["stages"].get("train")
        found = stage(settled, held, again=again)
        fresh = before is not None and held.manifest()["stages"].get("train") == before
    console, adapter = open_console(), plain(str(found.adapter))
    if found.stopped:
        console.print(
            f"[bold yellow]stopped by the guard:[/] {plain(found.stopped)}; {adapter} holds step {found.steps}, "
            "the last good checkpoint",
            highlight=False,
            soft_wrap=True,
        )
        return TrainingError.exit_code
    done = "trained already with these settings (--again trains anew)" if fresh else "trained"
    console.print(
        f"{done}: {found.steps} steps, adapter in {adapter}; next: gtqlora verify {plain(str(run))}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


@app.command
def project(
    model: str,
    *,
    contrast: Contrast = None,
    run: RunDir,
    config: Config = None,
    settings: Set = None,
    expert_format: ExpertFormat = None,
    again: Again = False,
) -> None:
    """Edit by projection, for comparison: remove the refusal direction from the residual stream."""
    _say_starting()
    from gtqlora.config import ProjectConfig
    from gtqlora.run import Run
    from gtqlora.stages.project import project as stage

    settled = _build(ProjectConfig, config, settings, model, contrast, expert_format=expert_format)
    with Run(run) as held, stage_progress():
        _remember_judge(run, settled.judge)
        found = stage(settled, held, again=again)
    table = new_table("Direction removed, on lookalike prompts", "after layer", "refusal", "task accuracy")
    for c in found.candidates:
        chosen = " (chosen)" if c.layer == found.layer else ""
        table.add_row(f"{c.layer}{chosen}", share(c.refusal), share(c.accuracy))
    open_console().print(table)
    if all(c.refusal > 0.9 for c in found.candidates):
        open_console().print(
            "[yellow]note:[/] no layer's direction takes the lookalike refusals away, so this edit mends nothing"
        )


@app.command
def verify(
    run: Path,
    *,
    contrast: Contrast = None,
    config: Config = None,
    settings: Set = None,
    expert_format: ExpertFormat = None,
    again: Again = False,
    as_json: Json = False,
) -> int:
    """Prove it: before and after on held-out prompts, the safety floor, drift, mediation."""
    _say_starting()
    from gtqlora.config import VerifyConfig
    from gtqlora.run import Run
    from gtqlora.stages.verify import verify as stage

    with Run(_made(run)) as held, stage_progress():
        given = _as_edited(held, _named_judge(settings))
        model, used = given.pop("model", None), given.pop("contrast", None)
        given |= {} if expert_format is None else {"expert_format": expert_format}
        settled = _build(VerifyConfig, config, settings, model, contrast or used, **given)
        _remember_judge(run, settled.judge)
        found = stage(settled, held, again=again)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        _print_verdict(found)
        _print_next(found, run)
    return 0 if found.floor.verdict == "pass" else FloorError.exit_code


def _print_next(found: Any, run: Path) -> None:
    """What a passed floor leads to; one passed in 4 bits does not open `export` yet."""
    from gtqlora.floor.shipped import shipped_experts

    shipped = shipped_experts(found.model)
    if found.floor.verdict == "pass" and found.expert_format == shipped:
        open_console().print(f"next: gtqlora export {plain(str(run))} OUT", highlight=False, soft_wrap=True)
    elif found.floor.verdict == "pass":
        open_console().print(
            f"next: gtqlora verify {plain(str(run))} --expert-format {shipped}   (the checkpoint's own experts, which "
            "`export` writes; it takes the place of this verdict)",
            highlight=False,
        )


def _as_edited(run: Any, named_judge: str | None) -> dict[str, Any]:
    """What `verify` takes over from the settings that made the adapter; a judge that is code only if it may run.

    They stand in the adapter itself: the manifest may still know an older stage, if the last one was killed.
    """
    from gtqlora.config import of_the_edit
    from gtqlora.results.adapter import INFO, read_info

    adapter = run.require("adapter", "train")
    info = read_info(adapter)
    given = of_the_edit(info.config)
    if named_judge is not None:
        given.pop("judge", None)
    elif "judge" in given:
        _trusted(str(given["judge"]), run.path, adapter / INFO)
    return {"model": info.model, **given}


def _made(run: Path) -> Path:
    """A run directory that should be there already: a mistyped name must not leave an empty one behind."""
    from gtqlora.run import MANIFEST
    from gtqlora.storage.atomic import checked_path

    run = checked_path(run)
    if not run.is_dir():
        raise RunError(f"{run}: no such run directory; `gtqlora train MODEL --run {run}` makes one")
    if not (run / MANIFEST).exists():
        raise RunError(f"{run}: not a run directory (no {MANIFEST} in it); name the one that `gtqlora train` made")
    return run


def _print_verdict(found: Any) -> None:
    from gtqlora.results.verdict import LOST

    console = open_console()
    console.print(tables.held_out(found))
    console.print(tables.drift(found))
    console.print(
        f"KL to the original on benign completions: {interval(found.kl_benign)} nats per token", highlight=False
    )
    console.print(
        "mediation: with the original routing replayed, this share of the repaired refusals comes back: "
        + interval(found.mediation),
        highlight=False,
    )
    if found.ablation:
        console.print(tables.ablation(found.ablation))
    console.print(f"routed experts: {found.expert_format}; judge: {plain(found.judge)}", highlight=False)
    if found.lost:
        reasons = ", ".join(f"{count} {LOST.get(reason, reason)}" for reason, count in found.lost.items())
        console.print(f"lost refusals: {reasons}", highlight=False)
    if found.tries > 1:
        console.print(
            f"{found.tries} tries on these held-out prompts so far, so the floor is judged at a level of "
            f"{found.floor.level:.4g}",
            highlight=False,
        )
    colour = {"pass": "green", "fail": "red"}.get(found.floor.verdict, "yellow")
    console.print(
        f"safety floor: [bold {colour}]{found.floor.verdict}[/] ({plain(found.floor.reason)})", highlight=False
    )


@app.command
def export(
    run: Path,
    out: Path,
    *,
    to: Annotated[str, Parameter(help="Format of the weights.")] = "safetensors",
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            help="Only --set judge=package.module:function: the judge that verify used, if it is code.",
            negative=(),
            consume_multiple=False,
        ),
    ] = None,
) -> None:
    """Ship it: write merged weights, only after a passed safety floor."""
    _say_starting()
    from gtqlora.run import Run
    from gtqlora.stages.export import export as stage

    if odd := [override for override in settings or () if override.partition("=")[0].strip() != "judge"]:
        raise ConfigError(f"--set {odd[0]}: export takes its settings from `verify`; only judge= can be set here")
    with Run(_made(run)) as held, stage_progress():
        found = stage(held, out, to=to, judge=_judge_of_verdict(held, _named_judge(settings)))
    open_console().print(
        f"{plain(str(found.folder))}: {found.tensors_changed} tensors changed, {found.gate_values_changed:,} gate "
        f"values; largest divergence from the edited model {found.divergence:.2g} nats",
        highlight=False,
        soft_wrap=True,
    )


def _judge_of_verdict(run: Any, named: str | None) -> str | None:
    """The judge that this call names, or the recorded one if it is code that was named for this run before."""
    from gtqlora.judging import trust

    record = run.manifest()["stages"].get("verify")
    recorded = record["config"].get("judge") if record and isinstance(record["config"], dict) else None
    if named is None and isinstance(recorded, str) and trust.is_remembered(run.path, recorded):
        named = recorded
    if named is not None:
        _say_what_judges(named)
    return named


@app.command
def report(
    run: Path,
    *,
    compare: Annotated[list[Path] | None, Parameter(help="Other runs for the side by side.", negative=())] = None,
) -> None:
    """Read it: one self-contained HTML page."""
    from gtqlora.run import Run
    from gtqlora.stages.report import report as stage

    with Run(_made(run)) as held:
        page = stage(held, compare=[_made(other) for other in compare or ()])
    open_console().print(plain(str(page)), highlight=False, soft_wrap=True)


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(help="Where the runs go.")] = Path("demo-run"),
    json_file: Annotated[Path | None, Parameter(name="--json", help="Also write the numbers as JSON here.")] = None,
) -> None:
    """All of it on two embedded toy models, in under three minutes."""
    from gtqlora.demo import demo as stage
    from gtqlora.run import write_json

    console = open_console()
    with demo_progress() as on_event:
        outcomes, seconds = stage(out, on_event)
    for name, outcome in outcomes.items():
        _print_outcome(console, name, outcome)
    console.print(f"{seconds:.0f} s", highlight=False)
    if json_file:
        numbers = {name: asdict(outcome.numbers) for name, outcome in outcomes.items()}
        write_json(json_file, {"organisms": numbers, "seconds": round(seconds, 1)})


def _print_outcome(console: Console, name: str, outcome: Any) -> None:
    numbers = outcome.numbers
    agree = "as planted" if numbers.verdict == numbers.truth else f"planted was {numbers.truth}"
    console.print(f"\n[bold]{name} organism[/]: verdict [bold]{numbers.verdict}[/], {agree}", highlight=False)
    console.print(f"  {plain(outcome.sentence)}", highlight=False)
    if numbers.planted_recall is not None:
        console.print(
            f"  planted experts found: precision {share(numbers.planted_precision)}, "
            f"recall {share(numbers.planted_recall)}",
            highlight=False,
        )
    console.print(tables.edits(numbers))
    paths = plain(f"  weights: {outcome.exported}\n  report:  {outcome.report}")
    console.print(paths, highlight=False, soft_wrap=True)
