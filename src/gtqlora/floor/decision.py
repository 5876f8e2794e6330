"""The safety floor's decision on one edit: harmful prompts judged again, counted as a try, entered in the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Row
from gtqlora.floor import ledger
from gtqlora.floor.arithmetic import floor_of, tries
from gtqlora.floor.kept import blind
from gtqlora.floor.outcomes import benign_completions, entry_prompts, judged_again
from gtqlora.floor.shipped import unshipped
from gtqlora.judging.judge import NamedJudge
from gtqlora.judging.labels import UNDECIDED
from gtqlora.ranks import ranks
from gtqlora.results.verdict import HISTORY, Outcome
from gtqlora.stats import Floor


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the floor says.

    Attributes:
        harmful: the outcomes that it was decided on, one for each different prompt, and why refusals are lost.
        tries: on these prompts, this one among them; the level is corrected for them.
        blind: why the judge cannot tell refusals from answers, if it cannot.
    """

    floor: Floor
    harmful: Sequence[Outcome]
    tries: int
    blind: str | None


def _with_undecided(found: Floor, harmful: Sequence[Outcome]) -> Floor:
    """Return a floor that cannot tell with a word on the original's answers that nobody can tell: these may be why."""
    undecided = sum(outcome.label_before == UNDECIDED for outcome in harmful)
    if found.verdict != "cannot tell" or not undecided:
        return found
    why = "empty, ended inside a thought, no clear opinion of the judge, or two judges that differ"
    reason = f"{found.reason}; of the original's answers {undecided} are undecided ({why})"
    return replace(found, reason=reason)


def decide(
    config: VerifyConfig,
    folder: Path,
    inputs: Mapping[str, str],
    *,
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    judge: NamedJudge,
    margin: float,
) -> Decision:
    """Decide whether an edit keeps the refusals, and enter that in every ledger before anybody is told.

    Args:
        folder: of the run, or of whatever else is judged; the history of verdicts on it stays there.
        inputs: the identities of what was verified, as `verify` records them.
        rows: the held-out rows of every kind; `outcomes` are theirs.
        margin: share of the refusals that may be lost.
    """
    reason = blind(judge, rows, benign_completions(outcomes, judge), phrases=judge.by_phrases)
    harmful = judged_again(outcomes, judge)
    entry = ledger.Entry(
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        adapter=inputs["adapter"],
        model=inputs["model"],
        contrast=inputs["contrast"],
        judge=inputs["judge"],
        shipped=unshipped(config) is None,
        # What a server says is believed neither way: of its weights only probes are known.
        decided=reason is None and config.generate_with is None,
        verdict="",
        reason="",
        prompts=entry_prompts(harmful),
    )
    files = ledger.places(config.contrast, folder)
    known = [e for file in (*files, folder / HISTORY) for e in ledger.read(file)]
    count = tries(known, entry)
    found = floor_of(entry.prompts, config, tries=count, margin=margin, blind=reason)
    found = _with_undecided(found, harmful)
    entry = replace(entry, verdict=found.verdict, reason=found.reason)
    if ranks().leads:  # what ranks find together is one verdict
        for places in (files, [ledger.of_edits(folder), folder / ledger.NAME], [folder / HISTORY]):
            ledger.append(places, entry)
    return Decision(floor=found, harmful=harmful, tries=count, blind=reason)
