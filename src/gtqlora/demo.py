"""Run the `demo`: both embedded organisms diagnosed, edited in four ways, verified, exported and reported."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gtqlora.errors import GtqloraError, RunError
from gtqlora.machine import uncollected
from gtqlora.organisms import embedded
from gtqlora.organisms.truth import Truth

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess
    from multiprocessing.queues import Queue

    from gtqlora.results.verdict import Verdict
    from gtqlora.stats import Interval

ORGANISMS = ("routed", "residual")
CONTRAST = "pairs.jsonl"
_KINDS = ("harmful", "lookalike", "benign")
EDITS = ("projection", "lora", "gates", "gt")
# Where the residual stream carries the behaviour LoRA does the work and may run hot, with an anchor that holds the
# routing of what it does to the stream; where the routing does, a hot LoRA would override the gates instead of leaving
# the repair to them. Chosen answers weigh more there: with weight 1 up to a tenth of the refusals inside one frame
# begin with a word of the answer, with 3 up to 1.8 % by what is drawn, with 10 none of 3,350 on two seeds.
BY_VERDICT = {"residual": ("lr_lora=6e-4", "anchor_harmful=20", "sft_weight=10")}
# The demo itself is to be over soon. Losses are flat from step 100 on, so that 150 steps say what 250 do; only LoRA
# alone still moves where it may not run hot, and goes as far in fewer steps at a rate as much higher. Inside frames 240
# prompts tell: of them at most 3 % are lost in any frame, and the floor allows 10 %.
_SHORTER, _SHORTER_BY_LORA = ("steps=150",), ("steps=150", "lr_lora=5e-5")
_FEWER = ("wrapped_prompts=240",)

Event = tuple[str, str, int, int]
"""(organism, what, done, total)."""


@dataclass(frozen=True, kw_only=True)
class EditNumbers:
    """Rates on held-out prompts after one edit, or of the model as it is.

    Attributes:
        floor: the safety floor's verdict; None for the model as it is, which is held to no floor.
        replayed_lookalike_refusal: over-refusal with the original's routing replayed.
        repaired_by_routing: share of the repaired refusals that the original repairs with the edited model's routing.
        repaired_by_gates, repaired_by_lora: share that this part of the edit repairs alone; None where the edit has not
            both.
    """

    harmful_refusal: float
    lookalike_refusal: float
    benign_refusal: float
    lookalike_accuracy: float
    benign_accuracy: float
    floor: str | None
    replayed_lookalike_refusal: float
    repaired_by_routing: float | None = None
    repaired_by_gates: float | None = None
    repaired_by_lora: float | None = None


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One organism's numbers; the names of the fields are the stable keys of `gtqlora demo --json`.

    Attributes:
        verdict: what the diagnosis says mediates false refusals; `truth` is where it was implanted.
        planted_precision, planted_recall: of the experts found; None where no expert was implanted (or found).
        edits: "base" and every edit -> its rates.
    """

    verdict: str
    truth: str
    planted_precision: float | None
    planted_recall: float | None
    edits: dict[str, EditNumbers]


@dataclass(frozen=True)
class Outcome:
    """One organism's numbers, and the paths worth opening."""

    numbers: Numbers
    sentence: str
    report: Path
    exported: Path


Message = (
    tuple[Literal["event"], Event] | tuple[Literal["done"], tuple[str, Outcome]] | tuple[Literal["error", "crash"], str]
)
"""What an organism's process sends: progress, its outcome, a line for the user, or a traceback."""


def demo(out: Path, on_event: Callable[[Event], None]) -> tuple[dict[str, Outcome], float]:
    """Run both organisms side by side, each in a process of its own; return the outcomes and the seconds taken.

    Raises:
        GtqloraError: a stage failed; whatever was finished stays in `out`.
    """
    started = time.monotonic()
    # spawn, as torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    events: Queue[Message] = context.Queue()
    # the organisms run side by side and must not take each other's cores
    threads = max(1, (os.cpu_count() or 2) // len(ORGANISMS))
    workers = {name: context.Process(target=_work, args=(name, out / name, threads, events)) for name in ORGANISMS}
    for worker in workers.values():
        worker.start()
    try:
        outcomes = _collect(workers, events, on_event)
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()
    return {name: outcomes[name] for name in ORGANISMS}, time.monotonic() - started


def _collect(
    workers: Mapping[str, SpawnProcess], events: Queue[Message], on_event: Callable[[Event], None]
) -> dict[str, Outcome]:
    """Wait for every process, passing on what they report.

    Raises:
        GtqloraError: one of them failed, or died.
    """
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < len(workers):
        try:
            # a process that died without a word sends no message, so look after it now and then
            message = events.get(timeout=1)
        except queue.Empty:
            dead = [name for name, worker in workers.items() if name not in outcomes and not worker.is_alive()]
            if dead and events.empty():
                raise RunError(f"the demo's process for {dead[0]!r} died (out of memory?); run it again") from None
            continue
        if message[0] == "event":
            on_event(message[1])
        elif message[0] == "done":
            name, outcome = message[1]
            outcomes[name] = outcome
        elif message[0] == "error":
            raise GtqloraError(message[1])
        else:
            raise RuntimeError(message[1])
    return outcomes


def _work(name: str, out: Path, threads: int, events: Queue[Message]) -> None:
    """Be one organism's process: report progress and the outcome through `events`."""
    import torch

    from gtqlora.progress import shown_by

    torch.set_num_threads(threads)
    stage = ["start"]

    def reporter(what: str, done: int, total: int) -> None:
        events.put(("event", (name, f"{stage[0]}: {what}", done, total)))

    try:
        # what is garbage of toy models is little, and to look for it costs seconds in all that was imported
        with shown_by(reporter), uncollected():
            events.put(("done", (name, run_organism(name, out, lambda label: stage.__setitem__(0, label)))))
    except GtqloraError as error:
        events.put(("error", f"{name}: {error}"))
    except BaseException:  # a crash in a child must reach the parent whole, whatever it was
        events.put(("crash", traceback.format_exc()))


def run_organism(name: str, out: Path, on_stage: Callable[[str], None]) -> Outcome:
    """Diagnose, edit in every way, verify each, export and report the GT-QLoRA edit."""
    from gtqlora.run import Run, atomic_write
    from gtqlora.stages.export import export
    from gtqlora.stages.report import report

    organism, pairs = embedded.organism(name), out / CONTRAST
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(pairs) as staged:  # a copy, so that its ledger counts the demo's own tries
        shutil.copyfile(embedded.contrast(), staged)
    numbers, sentence = study(organism, pairs, out, edits=EDITS, on_stage=on_stage, shorter=True)
    on_stage("export and report")
    with Run(out / "gt") as run:
        exported = out / "exported"
        # the demo may be run again in one folder; what was exported is never overwritten
        if not exported.exists():
            export(run, exported)
        page = report(run, compare=[out / edit for edit in EDITS if edit != "gt"])
    return Outcome(numbers, sentence, page, exported)


def study(
    model: Path,
    contrast: Path,
    out: Path,
    *,
    edits: Sequence[str],
    on_stage: Callable[[str], None] = lambda _label: None,
    overrides: Sequence[str] = (),
    shorter: bool = False,
) -> tuple[Numbers, str]:
    """Diagnose an organism, edit and verify it in each way; return the demo's numbers and the diagnosis' sentence.

    Args:
        overrides: `key=value` settings for training, instead of what the verdict suggests.
        shorter: train for fewer steps, and ask fewer prompts inside frames.
    """
    from gtqlora.config import DiagnoseConfig, ProjectConfig, TrainConfig, VerifyConfig, build
    from gtqlora.run import Run
    from gtqlora.stages.diagnose import diagnose
    from gtqlora.stages.project import project
    from gtqlora.stages.train import train
    from gtqlora.stages.verify import verify

    settled = partial(build, file=embedded.recipe(), model=str(model), contrast=str(contrast))
    with Run(out / "gt") as run:
        on_stage("diagnose")
        diagnosis = diagnose(settled(DiagnoseConfig), run)
    settings = overrides or BY_VERDICT.get(diagnosis.verdict, ())
    verdicts: dict[str, Verdict] = {}
    for edit in edits:
        on_stage(edit)
        with Run(out / edit) as run:
            if edit == "projection":
                project(settled(ProjectConfig), run)
            else:
                by_lora = (edit, diagnosis.verdict) == ("lora", "routing")
                less = (_SHORTER_BY_LORA if by_lora else _SHORTER) if shorter else ()
                train(settled(TrainConfig, mode=edit, overrides=(*less, *settings)), run)
            # ablation is for the report, which is the GT-QLoRA edit's
            quick = (*(_FEWER if shorter else ()), *(() if edit == "gt" else ("ablation=0",)))
            verdicts[edit] = verify(settled(VerifyConfig, overrides=quick), run)
    found = {(expert.layer, expert.expert) for expert in diagnosis.causal_experts}
    return _numbers(diagnosis.verdict, found, embedded.read_truth(model), verdicts), diagnosis.sentence


def _numbers(verdict: str, found: set[tuple[int, int]], truth: Truth, verdicts: Mapping[str, Verdict]) -> Numbers:
    base = next(iter(verdicts.values()), None)
    planted = set(truth.planted)
    hits = len(found & planted)
    return Numbers(
        verdict=verdict,
        truth=truth.verdict,
        planted_precision=hits / len(found) if planted and found else None,
        planted_recall=hits / len(planted) if planted else None,
        edits=({"base": _unedited(base)} if base else {}) | {edit: _edited(v) for edit, v in verdicts.items()},
    )


def _unedited(verdict: Verdict) -> EditNumbers:
    """Return the model's own numbers: held to no floor, and replaying its own routing."""
    harmful, lookalike, benign = (verdict.table[kind] for kind in _KINDS)
    return EditNumbers(
        harmful_refusal=harmful.refusal_before.value,
        lookalike_refusal=lookalike.refusal_before.value,
        benign_refusal=benign.refusal_before.value,
        lookalike_accuracy=_value(lookalike.accuracy_before),
        benign_accuracy=_value(benign.accuracy_before),
        floor=None,
        replayed_lookalike_refusal=lookalike.refusal_before.value,
    )


def _edited(verdict: Verdict) -> EditNumbers:
    """Return the numbers of the edited model."""
    harmful, lookalike, benign = (verdict.table[kind] for kind in _KINDS)
    ways, parts = verdict.mediation, verdict.factorial
    gates, lora = (parts.gates_repair, parts.lora_repair) if parts else (None, None)
    return EditNumbers(
        harmful_refusal=harmful.refusal_after.value,
        lookalike_refusal=lookalike.refusal_after.value,
        benign_refusal=benign.refusal_after.value,
        lookalike_accuracy=_value(lookalike.accuracy_after),
        benign_accuracy=_value(benign.accuracy_after),
        floor=verdict.decision,
        replayed_lookalike_refusal=_value(ways.refusal_replayed),
        repaired_by_routing=ways.indirect.as_edited.value if ways.indirect else None,
        repaired_by_gates=gates.value if gates else None,
        repaired_by_lora=lora.value if lora else None,
    )


def _value(interval: Interval | None) -> float:
    """Return the rate of rows that the demo's own pairs always have."""
    assert interval is not None
    return interval.value
