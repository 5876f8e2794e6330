# pyright: strict
"""What `train` leaves of its course: `metrics.jsonl`, a line of figures every few steps."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from gtqlora.errors import RunError
from gtqlora.results.typed import is_number
from gtqlora.storage.contents import first_line, json_object

METRICS = "metrics.jsonl"
LOGITS_BY_GATES, LOGITS_BY_LORA = "health/logits_by_gates", "health/logits_by_lora"
"""How far router logits are from the original's, root mean square: what LoRA alone does, and what gates add to it."""

Metrics = dict[str, float]
"""Name -> figure of one line: `step`, what the trainer reports (`loss`, `rewards/...`) and routers' `health/...`."""


def read_metrics(file: Path) -> list[Metrics]:
    """Return the lines of a `metrics.jsonl`, none if it is not there; a last line that a kill cut is left out.

    Raises:
        RunError: a line was edited so that it is none of ours.
    """
    lines: list[Metrics] = []
    if not file.exists():
        return lines
    if not file.is_file():
        raise RunError(f"{file}: not a plain file; move it away and run `gtqlora train` again")
    # a kill may cut the last line within a character, hence `replace`: such a line is dropped below
    texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json_object(text)
        except (ValueError, RecursionError) as error:
            # only the last line can be torn; any other was whole once, and was edited
            if number == len(texts):
                break
            raise _not_ours(file, number, first_line(error)) from error
        lines.append(_checked(file, number, line))
    return lines


def _checked(file: Path, number: int, line: dict[str, object]) -> Metrics:
    # not `isinstance`: True is an int
    if type(line.get("step")) is not int:
        raise _not_ours(file, number, "it has no step")
    if odd := [key for key, value in line.items() if not is_number(value)]:
        raise _not_ours(file, number, f"{odd[0]!a} is no number")
    return cast("Metrics", line)


def _not_ours(file: Path, number: int, what: str) -> RunError:
    return RunError(
        f"{file}: line {number} is not what training writes ({what}); move the file away and run `gtqlora train` again"
    )
