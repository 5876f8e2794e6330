"""Does the diagnosis withstand organisms made to break it? Builds fresh ones, diagnoses each, counts what it got right.

    python bench/adversaries.py --each 10 --first-seed 3000 --jobs 16 --json all.json  # all kinds, two architectures
    python bench/adversaries.py --kinds bykind brittle2 --each 2 --jobs 1
    python bench/adversaries.py --merge a.json b.json                                   # one summary, runs nothing

The truth is the one recorded with the organism: which weights could learn, and what its plant's losses demand. Even
seeds have DeepSeek-V3's architecture, odd ones Qwen3-MoE's. fp32 on the CPU, one thread a job. Of each kind of prompt a
finding is *right*; *undecided rightly* ("cannot tell" for the true reason); *undecided* for another; or *wrong*, which
it also is where a component's role contradicts the truth. Builds that failed their check are counted.
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
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from gtqlora.organisms.truth import FLAGGED_KINDS, Kind, Mediation, Truth

if TYPE_CHECKING:
    from gtqlora.results.diagnosis import Diagnosis
    from gtqlora.stats import Interval

ARCHITECTURES = ("deepseek_v3", "qwen3_moe")
RIGHT, EXCUSED, UNDECIDED, WRONG = "right", "undecided rightly", "undecided", "wrong"
COMPONENTS = {"routing": "routing", "experts": "experts", "stream": "residual"}
"""Names of components in a truth, and in a diagnosis."""
REASONS = {"broken": "are broken", "between": "add pairs"}
"""What a diagnosis says for each true reason to be undecided."""

Job = tuple[Kind, int]
Found = dict[str, Any]


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


def work(job: tuple[Job, str]) -> Found:
    """Build one organism, diagnose it, and compare."""
    warnings.filterwarnings("ignore")
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from gtqlora.errors import GtqloraError, TrainingError
    from gtqlora.organisms.build import build
    from gtqlora.organisms.scales import SMALL

    torch.set_num_threads(1)
    (kind, seed), root = job
    folder, started = Path(root) / f"{kind}-{seed}", time.monotonic()
    found: Found = {"kind": kind, "seed": seed, "architecture": ARCHITECTURES[seed % 2]}
    try:
        truth = build(kind, folder, seed=seed, architecture=ARCHITECTURES[seed % 2], progress=lambda _: lambda *_: None)
    except TrainingError as error:
        return {**found, "error": str(error), "rejected": SMALL.attempts}
    built = time.monotonic()
    try:
        compared = compare(truth, diagnosed(folder))
    except GtqloraError as error:
        compared = {"error": str(error)}
    seconds = [round(built - started), round(time.monotonic() - built)]
    return {**found, "rejected": len(truth.rejected), "measured": truth.measured, "seconds": seconds, **compared}


def diagnosed(model: Path) -> Diagnosis:
    """The diagnosis of a built organism, with the settings of the demo."""
    from gtqlora.config import DiagnoseConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.run import Run
    from gtqlora.stages.diagnose import diagnose

    settings = {"model": str(model), "contrast": str(model / embedded.CONTRAST)}
    with Run(model / "run") as run:
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
    return {**rows, "all": _row(results)}


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
    with TemporaryDirectory() as root, context.Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(work, [(job, root) for job in jobs], chunksize=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["all"], choices=("all", *get_args(Kind)))
    parser.add_argument("--each", type=int, default=10, help="fresh organisms of each kind")
    parser.add_argument("--first-seed", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write every result here, as they come")
    parser.add_argument("--merge", type=Path, nargs="+", help="sum up results written before, run nothing")
    args = parser.parse_args()
    if args.merge:
        print(json.dumps(summary([found for file in args.merge for found in json.loads(file.read_text())]), indent=1))
        return 0
    kinds: tuple[Kind, ...] = get_args(Kind) if "all" in args.kinds else tuple(args.kinds)
    jobs: list[Job] = [(kind, args.first_seed + i) for i in range(args.each) for kind in kinds]
    results: list[Found] = []
    for found in run(jobs, args.jobs):
        results.append(found)
        halves = {kind: half["judged"] for kind, half in found.get("by_kind", {}).items()}
        print(found["kind"], found["seed"], halves or found["error"], file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(summary(results), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
