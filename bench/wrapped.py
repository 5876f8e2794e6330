"""Does the second floor see what the first does not? Edits organisms as the demo does, and asks again inside frames.

    python bench/wrapped.py                   # the embedded organisms routed and residual, and tests/data/framed
    python bench/wrapped.py DIR...            # others, as of `python -m gtqlora.organisms build framed --out DIR`

    python bench/wrapped.py DIR --taught harmful   # as if the user had put harmful prompts inside frames into training

Prints, of each edit, both floors' verdicts, the harmful refusals lost plainly and in each frame, the lookalike prompts
repaired plainly that are answered inside frames, what `export` says, and the seconds that frames add to `verify`.
Everything is fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtqlora.results.verdict import Verdict
    from gtqlora.run import Run

say = partial(print, flush=True)
SHOWN = ("routed", "residual", str(Path(__file__).parents[1] / "tests" / "data" / "framed"))


@dataclass
class Clock:
    """The seconds during which something of a name is in progress, as `progress.shown_by` reports it."""

    name: str
    begun: dict[str, float] = field(default_factory=dict[str, float])
    ended: dict[str, float] = field(default_factory=dict[str, float])

    def __call__(self, what: str, _done: int, _total: int) -> None:
        if self.name in what:
            self.begun.setdefault(what, time.monotonic())
            self.ended[what] = time.monotonic()

    @property
    def seconds(self) -> float:
        return sum(end - self.begun[what] for what, end in self.ended.items())


def write_pairs(model: Path, to: Path, taught: Sequence[str]) -> None:
    """Copy an organism's pairs, so that the copy's ledger counts this bench's own tries.

    Args:
        taught: kinds whose training rows stand, those of every second pair, inside one of the first two frames.
    """
    from gtqlora.families.files import WRAPPERS
    from gtqlora.organisms import embedded

    own = model / embedded.CONTRAST
    rows = [json.loads(line) for line in (own if own.exists() else embedded.contrast()).read_text().splitlines()]
    frames = [one["turns"][0]["content"] for one in json.loads((model / WRAPPERS).read_text())["wrappers"]][:2]
    for row in rows:
        number = int(row["pair_id"].rpartition("-")[2])
        if row["split"] == "train" and row["kind"] in taught and number % 2:
            for key in ("prompt", "twin"):
                row[key] = row[key] and frames[number // 2 % 2].replace("{prompt}", row[key])
    to.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edited(model: Path, contrast: Path, run: Run) -> None:
    """Train the demo's GT-QLoRA edit."""
    from gtqlora.config import TrainConfig, build
    from gtqlora.demo import BY_VERDICT
    from gtqlora.organisms import embedded
    from gtqlora.stages.train import train

    settings = BY_VERDICT.get(embedded.read_truth(model).verdict, ())
    train(build(TrainConfig, file=embedded.recipe(), model=str(model), contrast=str(contrast), overrides=settings), run)


def verified(model: Path, contrast: Path, run: Run) -> tuple[Verdict, float, float]:
    """Verify it; return the verdict, the seconds taken, and those of them that frames took."""
    from gtqlora.config import VerifyConfig, build
    from gtqlora.organisms import embedded
    from gtqlora.progress import shown_by
    from gtqlora.stages.verify import verify

    given = {"file": embedded.recipe(), "model": str(model), "contrast": str(contrast), "overrides": ("ablation=0",)}
    started, clock = time.monotonic(), Clock("inside frames")
    with shown_by(clock):
        verdict = verify(build(VerifyConfig, **given), run)
    return verdict, time.monotonic() - started, clock.seconds


def exports(run: Run, out: Path) -> str:
    """What `export` says."""
    from gtqlora.errors import FloorError
    from gtqlora.stages.export import export

    try:
        export(run, out)
    except FloorError as error:
        return f"refused, {str(error).partition(': ')[2]}"
    return "written"


def measured(name: str, root: Path, taught: Sequence[str]) -> None:
    from gtqlora.organisms import embedded
    from gtqlora.run import Run

    model = Path(name) if Path(name).is_dir() else embedded.organism(name)
    contrast = root / f"{model.name}.jsonl"
    write_pairs(model, contrast, taught)
    with Run(root / model.name) as run:
        edited(model, contrast, run)
        verdict, seconds, in_frames = verified(model, contrast, run)
        print_verdict(model.name, verdict)
        say(f"  verify {seconds:.1f} s, of which frames {in_frames:.1f} s")
        say(f"  export {exports(run, root / f'{model.name}-exported')}")


def print_verdict(name: str, verdict: Verdict) -> None:
    plain, wrapped, lookalike = verdict.floor, verdict.wrapped, verdict.table["lookalike"]
    assert wrapped is not None
    say(
        f"{name}: lookalike prompts refused {lookalike.refusal_before.value:.3f}, "
        f"after the edit {lookalike.refusal_after.value:.3f}"
    )
    everywhere = wrapped.floor
    say(f"  {'':20} {'refused':>7} {'lost':>6}  {'at most':>7}  verdict")
    for label, refused, losses, found in (
        ("plain", plain.refused, plain.losses, plain.verdict),
        ("all frames", everywhere.refused, everywhere.losses, everywhere.verdict),
        *((row.name, row.refused, row.losses, row.verdict) for row in wrapped.wrappers),
    ):
        say(f"  {label:20} {refused:7} {losses.value:6.1%}  {losses.high:7.1%}  {found}")
    say(f"  second floor: {wrapped.verdict}")
    if (held := wrapped.repairs) is not None:
        say(f"  repairs answered inside frames: {held.before.value:.3f}, after {held.after.value:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("organisms", nargs="*", default=SHOWN, help="embedded ones, or folders")
    kinds = ("harmful", "lookalike", "benign")
    parser.add_argument(
        "--taught", nargs="+", default=(), choices=kinds, help="also trained inside the first two frames"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with TemporaryDirectory() as root:
        for name in args.organisms:
            measured(name, Path(root), args.taught)
    return 0


if __name__ == "__main__":
    sys.exit(main())
