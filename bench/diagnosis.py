"""Is the diagnosis right? Builds fresh organisms whose truth was planted, diagnoses each, prints what was found.

    python bench/diagnosis.py --seeds 8 --first-seed 1000                 # 40 organisms, about 90 minutes on 2 cores
    python bench/diagnosis.py --kinds routed null --seeds 2 --json a.json
    python bench/diagnosis.py --embedded                                  # those that ship with the package, 3 minutes
    python bench/diagnosis.py --merge a.json b.json                       # one table of several runs

Even seeds have DeepSeek-V3's architecture, odd ones Qwen3-MoE's. Everything is fp32 on the CPU, one thread a worker.
The diagnosis has the demo's settings and sees the validation words' pairs. Beside ours: the experts that selection
frequency alone names, those that stability selection names, and those that SteerMoE's and SAFEx's rankings name under
their own causal check; and the edit that ablates the single direction of false refusals (all three: `baselines.py`).

A method that only names experts says that their being chosen is necessary, which is what a mask shows, where it names
any, and that no choice of experts is where it names none; all are compared by that question. Our verdict also says
what mediates the refusal where it is not that, and is counted by itself. Coverage: every interval is compared with the
same quantity on three times as many fresh pairs of the same organism, whose own error is allowed for; embedded
organisms have no more pairs to compare with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

KINDS = ("routed", "residual", "expert-only", "redundant", "null")
ARCHITECTURES = ("deepseek_v3", "qwen3_moe")
METHODS = {
    "causal": "ours",
    "frequency": "frequency alone",
    "stability": "stability alone",
    "SteerMoE": "SteerMoE, checked",
    "SAFEx": "SAFEx, checked",
}
"""What names experts, by the heading of its column."""
DIRECTION = "false_refusal_orthogonal"

Job = tuple[str, int | None]
"""(kind, seed) of an organism to be built, or the name of an embedded one and None."""
Found = dict[str, Any]


def work(job: tuple[Job, str]) -> Found:
    """Build one organism, diagnose it, and diagnose it again on fresh pairs."""
    warnings.filterwarnings("ignore")
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import torch

    from gtqlora.errors import GtqloraError

    torch.set_num_threads(1)
    (kind, seed), root = job
    try:
        return {"job": [kind, seed], **_study(kind, seed, Path(root) / f"{kind}-{seed}")}
    except GtqloraError as error:
        return {"job": [kind, seed], "error": str(error)}


def _study(kind: str, seed: int | None, out: Path) -> Found:
    from gtqlora.organisms.embedded import read_truth

    started = time.monotonic()
    model, contrast = _organism(kind, seed, out)
    truth = read_truth(model)
    true = truth.mediation["lookalike"]  # a verdict is of what an edit is to remove
    built = time.monotonic()
    found = _diagnosed(model, contrast, out / "run")
    diagnosed = time.monotonic()
    beside = _baselines(model, contrast, out)
    compared = time.monotonic()
    coverage: dict[str, list[int]] = {}
    if seed is not None:
        larger = _diagnosed(model, _fresh_pairs(out, seed), out / "larger", max_pairs=3 * found["n_pairs"])
        coverage = _coverage(found["intervals"], larger["intervals"])
    times = (started, built, diagnosed, compared, time.monotonic())
    return {
        "architecture": truth.architecture,
        "truth": true.verdicts,
        "routing": true.routing,
        "planted": [list(place) for place in truth.planted],
        "verdict": found["verdict"],
        "role": found["role"],
        "sentence": found["sentence"],
        "experts": {**found["experts"], **beside.pop("experts")},
        **beside,
        "coverage": coverage,
        "seconds": [round(after - before) for before, after in itertools.pairwise(times)],
    }


def _organism(kind: str, seed: int | None, folder: Path) -> tuple[Path, Path]:
    """An organism's folder and its contrast set."""
    from gtqlora.organisms import embedded
    from gtqlora.organisms.build import build

    if seed is None:
        return embedded.organism(kind), embedded.contrast()
    architecture = ARCHITECTURES[seed % 2]
    build(kind, folder, seed=seed, architecture=architecture, progress=lambda _stage: lambda *_: None)  # type: ignore[arg-type]
    return folder, folder / embedded.CONTRAST


def _baselines(model: Path, contrast: Path, out: Path) -> Found:
    """What published methods name after their own causal check, and what the edit by one direction does."""
    from baselines import baselines, by_direction, observed_of

    observed = observed_of(model, contrast)
    methods = baselines(observed, seed=0)
    return {
        "experts": {m.name: [[observed.layers[position], e] for position, e in m.named] for m in methods},
        "masked": {m.name: m.does for m in methods},
        "direction": asdict(by_direction(model, contrast, DIRECTION, out / "direction")),
    }


def _diagnosed(model: Path, contrast: Path, out: Path, **given: int) -> Found:
    """What a diagnosis says, the experts that each method names, and all of its intervals by name."""
    from gtqlora.config import DiagnoseConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.results.association import STABLE
    from gtqlora.run import Run, read_parquet
    from gtqlora.stages.diagnose import FOLDER, diagnose

    settings = {"model": str(model), "contrast": str(contrast), **given}
    with Run(out) as run:
        found = diagnose(build(DiagnoseConfig, file=embedded.recipe(), **settings), run)
    rows: Any = [row for row in read_parquet(out / FOLDER / "association.parquet") if not row["kind"]]
    experts = {
        "causal": [[e.layer, e.expert] for e in found.causal_experts],
        "frequency": [[e.layer, e.expert] for e in found.top_experts],
        "stability": [[row["layer"], row["expert"]] for row in rows if row["stability"] >= STABLE and row["low"] > 0],
    }
    said = next(half for half in found.kinds if half.kind == "lookalike")  # as `true` in `_study`
    return {
        "verdict": found.verdict,
        "role": said.words.get("routing", "cannot tell"),
        "sentence": found.sentence,
        "n_pairs": found.n_pairs,
        "experts": experts,
        "intervals": dict(_intervals(found, rows)),
    }


def _fresh_pairs(folder: Path, seed: int) -> Path:
    """A larger contrast set of the validation words, drawn anew."""
    from gtqlora.organisms.build import contrast_rows
    from gtqlora.organisms.language import Language

    rows = []
    for part in range(4):
        drawn = contrast_rows(Language(), random.Random(f"{seed}-{part}").getrandbits(32))
        rows += [{**row, "pair_id": f"{part}-{row['pair_id']}"} for row in drawn if row["split"] == "validation"]
    seen: dict[str, dict[str, Any]] = {}
    taken = {row["pair_id"] for row in rows if seen.setdefault(row["prompt"], row) is not row}  # no prompt stands twice
    path = folder / "fresh.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["pair_id"] not in taken))
    return path


def _intervals(found: Any, rows: Sequence[Found]) -> Iterator[tuple[str, list[float]]]:
    """Every interval that means the same in two diagnoses of one organism, as [value, low, high]."""

    def ends(interval: Any) -> list[float]:
        return [interval.value, interval.low, interval.high]

    for kind in found.kinds:
        for name in ("shares", "shares_log_odds", "necessary", "sufficient"):
            for part, interval in getattr(kind, name).items():
                yield f"{name}: {kind.kind} {part}", ends(interval)
        for cell in kind.cells:
            where = f"{kind.kind} {cell.routing[0]}{cell.experts[0]}{cell.stream[0]}"
            yield f"cells refusal: {where}", ends(cell.refusal)
            yield f"cells log-odds: {where}", ends(cell.log_odds)
    for row in rows:
        yield f"association: {row['layer']}/{row['expert']}", [row["difference"], row["low"], row["high"]]


def _coverage(found: dict[str, list[float]], larger: dict[str, list[float]]) -> dict[str, list[int]]:
    """By group of quantities: how many intervals hold the truth, and how many there are.

    The larger sample's own error is allowed for: the gap may be as wide as both half-widths there, in quadrature.
    """
    counts: dict[str, list[int]] = {}
    for name, (value, low, high) in found.items():
        if name not in larger:
            continue
        true, true_low, true_high = larger[name]
        sides = (high - value, true - true_low) if true > value else (value - low, true_high - true)
        group = counts.setdefault(name.partition(":")[0], [0, 0])
        group[0] += bool(abs(true - value) <= (sides[0] ** 2 + sides[1] ** 2) ** 0.5 + 1e-9)
        group[1] += 1
    return counts


# --- what is printed


def _right(found: Found, method: str) -> bool:
    """Whether what a method says of the choice of experts can be said of the organism."""
    if method == "causal":
        return found["role"] in found["routing"]
    said = {"necessary", "both"} if found["experts"][method] else {"neither", "sufficient"}
    return not said.isdisjoint(found["routing"])


def _judged(found: Found) -> str:
    """Whether our verdict, which says more than that, is so."""
    if found["verdict"] == "cannot tell":
        return "undecided"
    return "right" if found["verdict"] in found["truth"] else "wrong"


def _hits(found: Found, method: str) -> tuple[int, int, int]:
    """Planted experts named, all named, all planted."""
    named, planted = {tuple(e) for e in found["experts"][method]}, {tuple(e) for e in found["planted"]}
    return len(named & planted), len(named), len(planted)


def print_table(results: Sequence[Found]) -> None:
    for found in results:
        kind, seed = found["job"]
        if "error" in found:
            print(f"{kind:12} {seed or '':5} {found['error']}")
            continue
        hit, named, planted = _hits(found, "causal")
        mark = "" if (judged := _judged(found)) == "right" else f"  {judged.upper()}"
        seconds = "/".join(map(str, found["seconds"]))
        print(
            f"{kind:12} {seed or '':5} {found['architecture']:12} {found['verdict']:12} causal {named:2}, planted "
            f"among them {hit}/{planted}  {seconds:>14} s{mark}"
        )
    good = [found for found in results if "error" not in found]
    verdicts = Counter(_judged(found) for found in good)
    print("\nverdicts: " + ", ".join(f"{verdicts[name]} {name}" for name in ("right", "undecided", "wrong")))
    print(f"\n{'is the choice of experts needed?':32}" + _row(list(METHODS.values())))
    for kind in (*dict.fromkeys(found["job"][0] for found in good), "all"):
        chosen = [found for found in good if kind in ("all", found["job"][0])]
        right = [sum(_right(found, method) for found in chosen) for method in METHODS]
        print(f"{'right, ' + kind:32}" + _row([f"{count} of {len(chosen)}" for count in right]))
    _print_experts(good)
    _print_masks(good)
    _print_directions(good)
    _print_coverage(good)


def _row(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>19}" for cell in cells)


def _print_experts(good: Sequence[Found]) -> None:
    routed = [found for found in good if found["job"][0].startswith("routed")]
    null = [found for found in good if found["job"][0] == "null"]
    sums = {m: [sum(column) for column in zip(*(_hits(f, m) for f in routed), strict=True)] for m in METHODS}
    if routed:
        print(f"{'routed: precision':32}" + _row([f"{hit / max(named, 1):.3f}" for hit, named, _ in sums.values()]))
        print(f"{'routed: recall':32}" + _row([f"{hit / planted:.3f}" for hit, _, planted in sums.values()]))
    if null:
        quiet = [sum(not found["experts"][m] for found in null) for m in METHODS]
        print(f"{'null: no expert named':32}" + _row([f"{q} of {len(null)}" for q in quiet]))


def _print_masks(good: Sequence[Found]) -> None:
    """What the experts that are ranked first do for the refusals, whether they are then named or not."""
    print("\nunder the mask of what is ranked first: refuses / as twin / broken, means over organisms")
    for found in _means(good, _masked):
        print(found)


def _masked(found: Found) -> Iterator[tuple[str, list[float]]]:
    for method, kinds in found["masked"].items():
        for kind, does in kinds.items():
            yield f"{method}: {kind}", list(does.values())


def _print_directions(good: Sequence[Found]) -> None:
    print(f"\n{DIRECTION} ablated: harmful refused / lookalike refused / lookalike right, means over organisms")
    for line in _means(good, lambda found: [("", [v for v in found["direction"].values() if isinstance(v, float)])]):
        print(line)
    floors = Counter(found["direction"]["floor"] for found in good)
    print("floor: " + ", ".join(f"{verdict} {count}" for verdict, count in floors.items()))


def _means(good: Sequence[Found], rates: Callable[[Found], Iterable[tuple[str, list[float]]]]) -> Iterator[str]:
    """A line for each kind of organism and each name: the means of its rates."""
    rows: dict[str, list[list[float]]] = {}
    for found in good:
        for name, values in rates(found):
            rows.setdefault(f"{found['job'][0]:14}{name}", []).append(values)
    for name, values in rows.items():
        means = [sum(column) / len(column) for column in zip(*values, strict=True)]
        yield f"{name:36}" + " / ".join(f"{mean:.3f}" for mean in means)


def _print_coverage(good: Sequence[Found]) -> None:
    if not any(found["coverage"] for found in good):
        return
    print("\nintervals that hold the truth (nominal 95 %)")
    for group in dict.fromkeys(name for found in good for name in found["coverage"]):
        held = sum(found["coverage"].get(group, [0, 0])[0] for found in good)
        total = sum(found["coverage"].get(group, [0, 0])[1] for found in good)
        print(f"{group:32}{held / total:16.3f}   ({held:,} of {total:,})")


def _embedded() -> list[Job]:
    from gtqlora.organisms import embedded

    return [(name, None) for name in embedded.names()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="fresh organisms of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--embedded", action="store_true", help="the organisms that ship with the package; builds none")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--merge", type=Path, nargs="+", help="print results written before, run nothing")
    args = parser.parse_args()
    if args.merge:
        print_table([found for file in args.merge for found in json.loads(file.read_text())])
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    jobs: list[Job] = _embedded() if args.embedded else [(kind, seed) for kind in args.kinds for seed in seeds]
    started, context = time.monotonic(), multiprocessing.get_context("spawn")
    with TemporaryDirectory() as root, context.Pool(args.workers, maxtasksperchild=1) as pool:
        results = []
        for found in pool.imap_unordered(work, [(job, root) for job in jobs], chunksize=1):
            results.append(found)
            print(f"{found['job']} done, {len(results)} of {len(jobs)}", file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(sorted(results, key=lambda f: str(f["job"])), indent=1))
    import torch
    import transformers

    print_table(sorted(results, key=lambda f: [job[0] for job in jobs].index(f["job"][0])))
    machine = f"{platform.machine()}, {args.workers} workers, {time.monotonic() - started:.0f} s"
    print(f"\n{machine}; torch {torch.__version__}, transformers {transformers.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
