"""Does the diagnosis withstand organisms made to break it? Builds fresh ones, diagnoses each, counts what it got right.

    python bench/adversaries.py --each 10 --first-seed 3000 --jobs 32 --json all.json  # 120 organisms, and 10 of null
    python bench/adversaries.py --kinds bykind brittle2 --each 2 --jobs 1
    python bench/adversaries.py --keep ORGANISMS --build-only --jobs 16               # they are diagnosed another time
    python bench/adversaries.py --merge a.json b.json                                   # one summary, runs nothing

The truth is the one recorded with the organism: which weights could learn, and what its plant's losses demand. Even
seeds have DeepSeek-V3's architecture, odd ones Qwen3-MoE's; graded organisms have one share after another. fp32 on the
CPU, one thread a job. Of each kind of prompt a finding is *right*; *undecided rightly* ("cannot tell" for the true
reason); *undecided* for another; or *wrong*, which it also is where a component's role contradicts the truth. Builds
that failed their check are counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from gtqlora.organisms.truth import FLAGGED_KINDS, Kind, Mediation, Truth

if TYPE_CHECKING:
    from gtqlora.organisms.scales import Architecture
    from gtqlora.results.diagnosis import Diagnosis
    from gtqlora.stats import Interval

ARCHITECTURES: tuple[Architecture, Architecture] = ("deepseek_v3", "qwen3_moe")
GRADED: tuple[Kind, ...] = ("graded-20", "graded-40", "graded-60", "graded-80")
ADVERSARIES = (
    *("brittle", "brittle2", "bykind", "weights", "follower", "second-token", "diffuse", "xor", "self-repair"),
    *("wide-twins", "natural", "graded", "null"),
)
"""Kinds that are built unless others are asked for; in "graded" the four shares take turns."""
RIGHT, EXCUSED, UNDECIDED, WRONG = "right", "undecided rightly", "undecided", "wrong"
COMPONENTS = {"routing": "routing", "experts": "experts", "stream": "residual"}
"""Names of components in a truth, and in a diagnosis."""
REASONS = {"broken": "are broken", "between": "add pairs"}
"""What a diagnosis says for each true reason to be undecided."""

Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One organism to be built and diagnosed, each unless its record in the folder says that it was.

    Attributes:
        root: folder of all organisms.
        attempts: trainings before a build is given up.
    """

    kind: Kind
    seed: int
    root: Path
    attempts: int
    build_only: bool

    @property
    def folder(self) -> Path:
        """The organism's own folder."""
        return self.root / f"{self.kind}-{self.seed}"

    @property
    def record(self) -> Path:
        """What is known of its build, which is there when the build is over."""
        return self.root / f"{self.kind}-{self.seed}.json"

    @property
    def architecture(self) -> Architecture:
        """Even seeds have one, odd ones the other."""
        return ARCHITECTURES[self.seed % 2]


@dataclass(frozen=True)
class Said:
    """What a diagnosis says of one kind of prompt."""

    verdict: str
    sentence: str
    words: dict[str, str]
    routing: Interval | None


def said(diagnosis: Diagnosis) -> dict[str, Said]:
    """What a diagnosis says, by kind of prompt; one that does not tell them apart says the same of both."""
    kinds = {found.kind: found for found in getattr(diagnosis, "kinds", ())}
    return {kind: _said(kinds.get(kind, diagnosis)) for kind in FLAGGED_KINDS}


def _said(found: Any) -> Said:
    words = getattr(found, "words", {})
    return Said(found.verdict, found.sentence, words, found.necessary.get("routing"))


def judged(found: Said, truth: Mediation) -> str:
    """Whether that is so."""
    if found.verdict == "cannot tell":
        return EXCUSED if truth.unclear and REASONS[truth.unclear] in found.sentence else UNDECIDED
    words = {part: found.words.get(name, "cannot tell") for part, name in COMPONENTS.items()}
    known = {part: word for part, word in words.items() if word != "cannot tell"}
    fits = found.verdict in truth.verdicts and all(word in getattr(truth, part) for part, word in known.items())
    return RIGHT if fits else WRONG


# --- one organism


def work(job: Job) -> Found:
    """Build one organism unless it is there, diagnose it, and compare."""
    warnings.filterwarnings("ignore")
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from gtqlora.organisms.truth import read_truth

    torch.set_num_threads(1)
    if not job.record.exists():
        job.record.write_text(json.dumps(built(job)))
    found: Found = json.loads(job.record.read_text())
    if "error" in found or job.build_only:
        return found
    started = time.monotonic()
    try:
        compared = compare(read_truth(job.folder), diagnosed(job.folder))
    # a fault in one must not lose what the others found
    except Exception as error:
        compared = {"error": f"{type(error).__name__}: {error}"}
    return {**found, "seconds to diagnose": round(time.monotonic() - started), **compared}


def built(job: Job) -> Found:
    """Build an organism, and say how it went."""
    from gtqlora.errors import TrainingError
    from gtqlora.organisms.build import build
    from gtqlora.organisms.scales import SMALL

    found: Found = {"kind": job.kind, "seed": job.seed, "architecture": job.architecture}
    started, scale = time.monotonic(), replace(SMALL, attempts=job.attempts)
    try:
        truth = build(
            job.kind,
            job.folder,
            seed=job.seed,
            architecture=job.architecture,
            scale=scale,
            progress=lambda _: lambda *_: None,
        )
        found |= {"rejected": len(truth.rejected), "measured": truth.measured}
    except TrainingError as error:
        found |= {"error": str(error), "rejected": job.attempts}
    return {**found, "seconds to build": round(time.monotonic() - started)}


def diagnosed(model: Path) -> Diagnosis:
    """The diagnosis of a built organism, with the settings of the demo."""
    from gtqlora.config import DiagnoseConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.diagnose import diagnose

    settings = {"model": str(model), "contrast": str(model / embedded.CONTRAST)}
    with TemporaryDirectory() as root, Run(Path(root)) as run:
        return diagnose(build(DiagnoseConfig, file=embedded.recipe(), **settings), run)


def compare(truth: Truth, diagnosis: Diagnosis) -> Found:
    """The diagnosis beside the truth, for each kind of prompt and for the experts."""
    by_kind = {}
    for kind, found in said(diagnosis).items():
        true = truth.mediation[kind]
        by_kind[kind] = {
            "judged": judged(found, true),
            "verdict": found.verdict,
            "words": found.words,
            "sentence": found.sentence,
            "true": true.verdicts,
        }
        if true.share is not None and found.routing is not None:
            interval = found.routing
            by_kind[kind] |= {"share": [true.share, interval.value, interval.low, interval.high]}
    named = {(e.layer, e.expert) for e in diagnosis.causal_experts}
    planted = set(truth.planted) if truth.causal else set()
    experts = {"planted": len(planted), "named": len(named & planted), "falsely": sorted(named - planted)}
    return {"by_kind": by_kind, "experts": experts}


# --- all of them


def summary(results: list[Found]) -> Found:
    """Counts for each kind, and for all kinds together."""
    kinds = [kind for kind in get_args(Kind) if any(found["kind"] == kind for found in results)]
    rows = {kind: _row([found for found in results if found["kind"] == kind]) for kind in kinds}
    rates = {"rate right, or rightly undecided": _rate(results, RIGHT, EXCUSED), "rate wrong": _rate(results, WRONG)}
    return {**rows, "all": {**_row(results), **rates}}


def _rate(results: list[Found], *judged: str) -> list[float]:
    """The share of findings that are judged so, with its interval; the findings of an organism are one group."""
    from gtqlora.stats import rate

    halves = [(half["judged"], i) for i, found in enumerate(results) for half in found.get("by_kind", {}).values()]
    found = rate([said in judged for said, _ in halves], groups=[organism for _, organism in halves])
    return [round(value, 4) for value in (found.value, found.low, found.high)]


def _row(results: list[Found]) -> Found:
    good = [found for found in results if "by_kind" in found]
    verdicts = Counter(half["judged"] for found in good for half in found["by_kind"].values())
    shares = [half["share"] for found in good for half in found["by_kind"].values() if "share" in half]
    row: Found = {
        "organisms": len(results),
        "diagnosed": len(good),
        "rejected builds": sum(found["rejected"] for found in results),
        **{name: verdicts[name] for name in (RIGHT, EXCUSED, UNDECIDED, WRONG)},
        "both halves right": sum(_all_right(found) for found in good),
        "planted experts": sum(found["experts"]["planted"] for found in good),
        "planted experts named": sum(found["experts"]["named"] for found in good),
        "experts named falsely": sum(len(found["experts"]["falsely"]) for found in good),
    }
    if shares:
        row["shares in interval"] = f"{sum(low <= true <= high for true, _, low, high in shares)} of {len(shares)}"
    return row


def _all_right(found: Found) -> bool:
    return all(half["judged"] == RIGHT for half in found["by_kind"].values())


def run(jobs: list[Job], processes: int) -> Iterator[Found]:
    """Results as they come."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(work, jobs, chunksize=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=ADVERSARIES, choices=("graded", *get_args(Kind)))
    parser.add_argument("--each", type=int, default=10, help="fresh organisms of each kind")
    parser.add_argument("--first-seed", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write every result here, as they come")
    parser.add_argument("--keep", type=Path, help="folder of the organisms; those that stand there are not built anew")
    parser.add_argument("--build-only", action="store_true", help="do not diagnose")
    parser.add_argument("--attempts", type=int, default=3, help="trainings before a build is given up")
    parser.add_argument("--merge", type=Path, nargs="+", help="sum up results written before, run nothing")
    args = parser.parse_args()
    if args.merge:
        print(json.dumps(summary([found for file in args.merge for found in json.loads(file.read_text())]), indent=1))
        return 0
    with TemporaryDirectory() as root:
        folder = args.keep or Path(root)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(summary(_results(args, folder)), indent=1))
    return 0


def _results(args: argparse.Namespace, root: Path) -> list[Found]:
    jobs = [
        Job(
            # the architecture goes by the seed, too: each share has both
            kind=GRADED[(i // 2) % len(GRADED)] if kind == "graded" else kind,
            seed=args.first_seed + i,
            root=root,
            attempts=args.attempts,
            build_only=args.build_only,
        )
        for i in range(args.each)
        for kind in args.kinds
    ]
    results: list[Found] = []
    for found in run(jobs, args.jobs):
        results.append(found)
        halves = {kind: half["judged"] for kind, half in found.get("by_kind", {}).items()}
        print(found["kind"], found["seed"], halves or found.get("error", "built"), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    sys.exit(main())
