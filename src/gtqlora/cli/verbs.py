"""The verbs of the command line: each reads its options, runs one stage, and hands what it found to `printing`.

Imports of what is heavy stand inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, TypeVar

from cyclopts import Parameter

from gtqlora.cli import printing
from gtqlora.cli.console import demo_progress, stage_progress, starting
from gtqlora.cli.recorded import as_edited, as_verified, existing_run, judge_of_verdict
from gtqlora.cli.servers import ServerOptions
from gtqlora.cli.settings import (
    ExpertFormat,
    FormatOptions,
    HubOptions,
    Json,
    MadeRun,
    Model,
    OldExpertFormat,
    RunDir,
    StageOptions,
    asked_format,
    configured,
    embedded_model,
    judges_in,
    named_judge,
    same_prompts,
)
from gtqlora.errors import ConfigError, FloorError, TrainingError

if TYPE_CHECKING:
    from gtqlora.config import StageConfig
    from gtqlora.run import Run

    C = TypeVar("C", bound=StageConfig, contravariant=True)
    R = TypeVar("R", covariant=True)

    class Stage(Protocol[C, R]):
        """A stage's function."""

        def __call__(self, config: C, run: Run, *, again: bool = False) -> R:
            """Run it, or return what it left before if nothing changed."""
            ...


NO_OPTIONS = StageOptions()
NO_FORMAT, NO_HUB, NO_SERVER = FormatOptions(), HubOptions(), ServerOptions()


def inspect(
    model: Model,
    *,
    rank: Annotated[int, Parameter(help="LoRA rank to count with.")] = 32,
    expert_format: ExpertFormat = None,
    experts: OldExpertFormat = None,
    as_json: Json = False,
) -> None:
    """Show a model's parts and what GT-QLoRA would train, from its config alone."""
    asked = asked_format(expert_format, experts)
    with starting():  # transformers imports a model's class only when it is asked for
        from gtqlora.config import ExpertFormat as Formats
        from gtqlora.config.values import coerce, require
        from gtqlora.stages.inspect import inspect as look

        require(rank >= 1, f"--rank {rank}: must be at least 1")
        if asked is not None:
            coerce(asked, Formats, "expert_format")
        found = look(embedded_model(model), lora_rank=rank, expert_format=asked)
    if as_json:
        printing.show_json(found)
    else:
        printing.show_inspection(found, asked_format=asked)


@contextmanager
def _opened(path: Path) -> Iterator[Run]:
    """Hold a run directory, and show what its stage is doing."""
    from gtqlora.run import Run

    with Run(path) as run, stage_progress():
        yield run


def _staged(stage: Stage[C, R], config: C, path: Path, *, again: bool) -> R:
    """Run a stage that needs no earlier one; its judge needs no naming when it judges this run again."""
    from gtqlora.judging import trust

    with _opened(path) as run:
        # before the stage: after one that is killed, the next verb on this run must not ask for the judge again
        for judge in judges_in(config).values():
            trust.remember(path, judge)
        return stage(config, run, again=again)


def diagnose(model: Model, *, run: RunDir, options: StageOptions = NO_OPTIONS) -> None:
    """Find the behaviour: association, interventions with controls, directions, a verdict."""
    with starting():
        from gtqlora.config import DiagnoseConfig
        from gtqlora.stages.diagnose import diagnose as stage

    found = _staged(stage, configured(DiagnoseConfig, options, {"model": model}), run, again=options.again)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_diagnosis(found)
        printing.show_next_train(model, *same_prompts(options), "--run", run)


def train(
    model: Model,
    *,
    run: RunDir,
    mode: Annotated[str | None, Parameter(help="gt (LoRA and gates), lora, or gates.")] = None,
    objective: Annotated[
        str | None,
        Parameter(
            help="edit, or harden: edit while experts are ablated, so that refusal does not depend on a few of them."
        ),
    ] = None,
    target: Annotated[
        str | None,
        Parameter(
            name="--for",
            help="Train only what a program applies of an adapter: peft, llama.cpp, vllm or sglang.",
        ),
    ] = None,
    options: StageOptions = NO_OPTIONS,
) -> int:
    """Edit the behaviour with GT-QLoRA; resumes from the last checkpoint if it was interrupted."""
    with starting():
        from gtqlora.config import TrainConfig
        from gtqlora.stages.train import train as stage

    given = {"model": model, "mode": mode, "objective": objective, "target": target}
    config = configured(TrainConfig, options, given)
    found = _staged(stage, config, run, again=options.again)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_trained(found, run)
    # The adapter is there, but a script that goes on to `verify` must not take a stopped training for a finished one.
    return TrainingError.exit_code if found.stopped else 0


def project(model: Model, *, run: RunDir, options: StageOptions = NO_OPTIONS) -> None:
    """Edit by projection, for comparison: remove the refusal direction from the residual stream."""
    with starting():
        from gtqlora.config import ProjectConfig
        from gtqlora.stages.project import project as stage

    found = _staged(stage, configured(ProjectConfig, options, {"model": model}), run, again=options.again)
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_projected(found)


def verify(
    run: MadeRun,
    *,
    rejudge: Annotated[
        bool,
        Parameter(help="Judge the texts of the last verdict anew, e.g. by another judge; no decoding.", negative=()),
    ] = False,
    server: ServerOptions = NO_SERVER,
    options: StageOptions = NO_OPTIONS,
) -> int:
    """Prove it: before and after on held-out prompts, the safety floors, drift, mediation.

    Pairs, judge and expert format are those that the edit was trained with, unless an option names others. With
    --generate-with a server gives the plain answers; that verdict is for information, and `export` goes by another.
    """
    with starting():
        from gtqlora.config import VerifyConfig
        from gtqlora.judging import trust
        from gtqlora.results.adapter import Training, read_info
        from gtqlora.stages.verify import verify as stage

    with _opened(existing_run(run)) as held:
        # The run is held first: nobody may train it anew between the reading of its settings and the verdict.
        settled = as_verified if rejudge else as_edited
        given = {**settled(held, options.settings), **server.given()}
        config = configured(VerifyConfig, options, given)
        for judge in judges_in(config).values():
            trust.remember(run, judge)
        found = stage(config, held, again=options.again, rejudge=rejudge)
        made = read_info(held.require("adapter", "train")).details
    if options.as_json:
        printing.show_json(found)
    else:
        printing.show_verdict(found)
        printing.show_next(found, run, made.stopped if isinstance(made, Training) else None)
    return 0 if found.decision == "pass" else FloorError.exit_code


def export(
    run: MadeRun | None = None,
    out: Annotated[Path | None, Parameter(help="New folder for the files.")] = None,
    *,
    check: Annotated[
        Path | None,
        Parameter(name="--check", help="Write nothing: is this folder, or file of one, what was certified?"),
    ] = None,
    options: FormatOptions = NO_FORMAT,
    hub: HubOptions = NO_HUB,
    settings: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            help="Only --set judge=package.module:function: the judge that verify used, if it is code.",
            negative=(),
            consume_multiple=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Ship it: write the edit in the form that a program loads, only after a passed safety floor.

    `export --check OUT` says whether files are what was certified; with RUN before it, whether RUN still says so.
    """
    # Any other setting would export something else than what was verified.
    if odd := [override for override in settings or () if override.partition("=")[0].strip() != "judge"]:
        raise ConfigError(f"--set {odd[0]}: export takes its settings from `verify`; only judge= can be set here")
    _refuse_stray(options, hub, check, out)
    judge = named_judge(settings)
    if check is not None:
        return _check(check, run, judge, as_json=as_json)
    if run is None or out is None:
        raise ConfigError(f"{'RUN' if run is None else 'OUT'} is missing. See gtqlora export --help")
    if options.to == "hub":
        _publish(run, out, hub, judge, as_json=as_json)
    else:
        _export(run, out, options, judge, as_json=as_json)
    return 0


def _refuse_stray(options: FormatOptions, hub: HubOptions, check: Path | None, out: Path | None) -> None:
    """Check that nothing is asked for that would be left undone without a word."""
    if check is not None and (options, hub, out) != (NO_FORMAT, NO_HUB, None):
        raise ConfigError("--check writes nothing, so it goes with RUN, --set judge= and --json only")
    if options.to == "hub" and options != replace(NO_FORMAT, to="hub"):
        raise ConfigError("--to hub publishes OUT as it is; give the format's options to the export that writes it")
    # a forgotten --to hub must not end in a second export under the name of a published one
    if options.to != "hub" and hub != NO_HUB:
        raise ConfigError("--repo, --public, --dry-run and --base-model are for --to hub only")


def _export(run: Path, out: Path, options: FormatOptions, judge: str | None, *, as_json: bool) -> None:
    with starting():
        from gtqlora.config import ExportConfig
        from gtqlora.stages.export import export as stage

    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    config = ExportConfig(**given)  # type: ignore[arg-type]
    with _opened(existing_run(run)) as held:
        found = stage(held, out, config, judge=judge_of_verdict(held, judge))
    if as_json:
        printing.show_json(found)
    else:
        printing.show_exported(found)


def _publish(run: Path, out: Path, hub: HubOptions, judge: str | None, *, as_json: bool) -> None:
    with starting():
        from gtqlora.stages.publish import publish as stage

    if hub.repo is None:
        raise ConfigError("--repo is missing: --to hub needs OWNER/NAME. See gtqlora export --help")
    with _opened(existing_run(run)) as held:
        named = judge_of_verdict(held, judge)
        found = stage(
            held,
            out,
            hub.repo,
            private=hub.private,
            dry_run=hub.dry_run,
            base_model=hub.base_model,
            judge=named,
        )
    if as_json:
        printing.show_json(found)
    else:
        printing.show_published(found)


def _check(place: Path, run: Path | None, judge: str | None, *, as_json: bool) -> int:
    """Check files against their record alone, which needs no large library, or against the run as well."""
    if run is None:
        from gtqlora.exports.provenance import check

        with stage_progress():
            found = check(place)
    else:
        with starting():
            from gtqlora.stages.publish import provenance

        with _opened(existing_run(run)) as held:
            found = provenance(held, place, judge=judge_of_verdict(held, judge))
    if as_json:
        printing.show_json({"certified": found.certified, **vars(found)})
    else:
        printing.show_provenance(found)
    return 0 if found.certified else 1


def report(
    run: MadeRun,
    *,
    compare: Annotated[list[Path] | None, Parameter(help="Other runs for the side by side.", negative=())] = None,
    as_json: Json = False,
) -> None:
    """Read it: one self-contained HTML page."""
    from gtqlora.run import Run
    from gtqlora.stages.report import report as stage

    with Run(existing_run(run)) as held:
        page = stage(held, compare=[existing_run(other) for other in compare or ()])
    if as_json:
        printing.show_json({"page": page})
    else:
        printing.show_path(page)


def demo(
    *,
    out: Annotated[Path, Parameter(help="Where the runs go.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Run all of it on two embedded toy models, in about two minutes."""
    from gtqlora.demo import demo as stage

    with demo_progress() as on_event:
        outcomes, seconds = stage(out, on_event)
    if as_json:
        organisms = {name: outcome.numbers for name, outcome in outcomes.items()}
        printing.show_json({"organisms": organisms, "seconds": round(seconds, 1)})
    else:
        printing.show_demo(outcomes, seconds)
