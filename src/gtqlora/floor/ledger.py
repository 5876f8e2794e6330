"""Every verdict is kept: beside the held-out set, so that tries are counted, and in the run, so that none is lost.

Many edits judged on the same prompts until one passes, or one edit judged on ever more prompts, pass more often than
the level says. The ledger counts them: the level is corrected for as many tries (Bonferroni).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gtqlora.errors import RunError
from gtqlora.results.typed import Mismatch, from_json, to_json
from gtqlora.run import sha256_json
from gtqlora.storage import user_state
from gtqlora.storage.atomic import named_errors
from gtqlora.storage.lines import append_line

NAME = "gtqlora-ledger.jsonl"
_OF_EDITS = "edits.jsonl"

Prompts = dict[str, list[bool | str | None]]
"""Hash of a harmful prompt -> whether the original refuses it, whether the edit keeps that, hashes of its groupings.

What is undecided is kept as null: neither kept, nor lost for good.
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One verdict.

    Attributes:
        model, contrast: hashes of their contents.
        judge: see `judging.trust.identity`.
        shipped: whether what was judged is what `export` would write (the checkpoint's own experts and dtype).
        decided: whether the judge could tell refusals from answers, and the model here gave them and no server; what it
            said counts only then.
        prompts: the harmful ones that it was judged on.
    """

    finished: str
    adapter: str
    model: str
    contrast: str
    judge: str
    shipped: bool
    decided: bool
    verdict: str
    reason: str
    prompts: Prompts

    @property
    def try_id(self) -> str:
        """Say what makes two verdicts one try: the same edit on the same prompts, judged by the same judge."""
        return sha256_json([self.adapter, self.judge, sorted(self.prompts)])


def short_hash(value: str) -> str:
    """Return enough of a hash to tell prompts apart; the ledger holds none of their words."""
    return sha256_json(value)[:12]


def places(contrast: str, run: Path) -> list[Path]:
    """Return where the ledger of a held-out set may lie, the best first: beside it, with the user, in the run."""
    path, package = Path(contrast), Path(__file__).parents[1]
    local = path if path.exists() else Path(contrast.rpartition(":")[0])
    state = user_state.folder()
    found = [] if not local.is_absolute() or package in local.parents else [local.parent / NAME]
    return [*found, *([state / NAME] if state else []), run / NAME]


def of_edits(run: Path) -> Path:
    """Return where the verdicts on every edit are kept with the user, wherever runs and pairs lie; else in the run."""
    return (user_state.folder() or run) / _OF_EDITS


def on_edit(adapter: str, entries: Iterable[Entry]) -> list[Entry]:
    """Return the verdicts on an edit, the same one once."""
    found = {_line(entry): entry for entry in entries if entry.adapter == adapter}
    return sorted(found.values(), key=lambda entry: entry.finished)


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of an edit, and of the prompts that it is judged on.

    Attributes:
        told: verdicts on the edit in its run and beside the pairs.
        verdicts: these, and what the user's own ledger holds of it.
        beside: verdicts on any edit in the ledgers of these pairs.
    """

    told: tuple[Entry, ...]
    verdicts: tuple[Entry, ...]
    beside: tuple[Entry, ...]


def past(adapter: str, contrast: str, run: Path, history: Path) -> Past:
    """Read what is remembered of an edit: a copy of the run, or of the edit, has the same past."""
    here = read(history)
    beside = [entry for file in places(contrast, run) for entry in read(file)]
    return Past(
        told=tuple(on_edit(adapter, [*here, *beside])),
        verdicts=tuple(on_edit(adapter, [*here, *beside, *read(of_edits(run))])),
        beside=tuple(beside),
    )


def append(files: Iterable[Path], entry: Entry) -> Path:
    """Add an entry to the first of the files that can be written, and return which one.

    Raises:
        OSError: none can.
    """
    problem: OSError | None = None
    for file in files:
        try:
            with named_errors(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                append_line(file, _line(entry))
            return file
        except OSError as error:
            problem = problem or error
    raise problem or OSError("no place for the ledger of verdicts")


def _line(entry: Entry) -> str:
    return json.dumps(to_json(entry), sort_keys=True)


def read(file: Path) -> list[Entry]:
    """Read the entries of a file, none if it is not there; a line that was torn by a kill is left out.

    Raises:
        RunError: it is no plain file, or a whole line is none of ours.
    """
    if not os.path.lexists(file):
        return []
    if not stat.S_ISREG(file.lstat().st_mode):
        raise RunError(f"{file}: not a plain file; the ledger of verdicts is kept there, so move it away")
    entries = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # torn; it was never counted, and `verify` writes it anew
        try:
            entries.append(from_json(Entry, value))
        except Mismatch as error:
            remedy = "restore it: it counts how often these prompts were used"
            raise RunError(f"{file}: line {number}: {error}; {remedy}") from error
    return entries
