"""The only way to weights: a certificate for one edit of one model, from what `verify` left.

Threat model (the whole of it is in docs/threats.md). A certificate protects the people who meet the edited model: it
refuses no less of what is harmful than the original did. Nothing local stops who can run code, and merges an adapter
themselves, or who rewrites every record of a run, hashes and texts included. What is held is everything short of that:
no file, flag, order of commands or choice of prompts makes `export` write weights whose refusals were not shown to be
kept. What a run directory, an adapter or a model folder says of itself is believed only as far as this bears it out:

- It is this edit: the adapter's bytes are read once, hashed and merged from memory.
- It is this model: the contents of every file that is read, whatever its size, links resolved.
- It is what ships: judged merged and rounded to the checkpoint's dtype, with the checkpoint's own experts, by the
  answers that this model gives here. Those of a server, whose weights are known by probes only, count neither way.
- It is this judge, by its phrases or its source and weights, and its texts are judged again here.
- It holds inside plain frames, too: a story, a role, another language and others, over all of them and in the worst;
  a user's own frames come beside these and have to pass by themselves.
- It declines what users' system prompts tell it to, where `verify` was asked for a floor on that.
- It is all that was seen: every verdict on this edit counts, and each prompt is lost if it was lost once.
- It is not the luckiest of many tries: the level is corrected for the edits judged on these prompts.
- It is not one loss after another: an export of an export adds up what may have been lost.

It speaks of greedy answers to prompts like those given, by one judge; not of attacks, sampling or other languages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gtqlora.config import VerifyConfig, build_recorded, must_be_named
from gtqlora.edits.adapters import Adapter, read_adapter
from gtqlora.errors import FloorError
from gtqlora.floor import ledger
from gtqlora.floor.ancestry import Ancestry, ancestry
from gtqlora.floor.arithmetic import ever_seen, floor_of, tries
from gtqlora.floor.instructed import instructed_floor
from gtqlora.floor.ledger import Entry
from gtqlora.floor.outcomes import entry_prompts, judged_again
from gtqlora.floor.shipped import unshipped
from gtqlora.floor.wrapped import wrapped_floor
from gtqlora.judging import trust
from gtqlora.judging.judge import Judge
from gtqlora.judging.pair import judges_of
from gtqlora.results.verdict import HISTORY, SCORES, VERDICT, Outcome, Verdict, read_outcomes, read_verdict
from gtqlora.results.wrapped import WRAPPED, WrappedFloor
from gtqlora.run import PATHS, Record, Run, fingerprint, stage_hash
from gtqlora.stats import Floor

ADAPTER = "adapter"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was certified, and the bytes it was certified of.

    Attributes:
        model: digest of the model's files; the copy must show the same.
        floor: over every prompt that this edit was ever judged on, at the corrected level.
        wrapped: on prompts inside plain frames.
        instructed: on instructed prompts; None where no floor on them was asked for.
        tries: edits judged on these prompts.
        history: every verdict on this edit in the run and beside the pairs; what else is known of it counts, too.
        margin: what was allowed to be lost.
        outcomes: of the held-out prompts; `framed` of prompts inside plain frames.
    """

    verdict: Verdict
    config: VerifyConfig
    adapter: Adapter
    model: str
    floor: Floor
    wrapped: WrappedFloor
    instructed: Floor | None
    tries: int
    history: tuple[Entry, ...]
    ancestry: Ancestry
    margin: float
    outcomes: tuple[Outcome, ...]
    framed: tuple[Outcome, ...]

    @property
    def spent(self) -> float:
        """Return what this and all earlier edits may have lost together."""
        return self.ancestry.spent + max(self.floor.losses.high, 0.0)


def certify(run: Run, judge: str | None = None) -> Certificate:
    """Certify a run whose floor was passed by exactly this adapter, judged again from its records.

    The model's digest is on the certificate for whoever copies it to compare; it is not computed here.

    Args:
        judge: the judge that this call names; needed where the recorded one is code.

    Raises:
        FloorError: no pass, or not of what would be written, or something changed since.
        ConfigError: the judge is code and this call does not name it.
        RunError: nothing was trained or verified, or a record is malformed.
    """
    path = run.require(ADAPTER, "train")
    verdict, record = read_verdict(run.path), _record(run)
    config = build_recorded(VerifyConfig, record["config"], str(run / "manifest.json"))
    adapter = read_adapter(path)
    _check_same(run, verdict, record["inputs"], config, adapter)
    outcomes, named = read_outcomes(run.path), _judge(run, config, record["inputs"], judge)
    rows = judged_again(outcomes, named)
    past = ledger.past(adapter.digest, config.contrast, run.path, run / HISTORY)
    entry = _entry(run, past.verdicts, record["inputs"], rows)
    count, before = tries([*past.beside, *past.verdicts], entry), ancestry(config.model)
    margin = before.margin(config.margin)
    floor = _passed(run, config, entry, past.verdicts, tries=count, margin=margin, blind=verdict.blind)
    inside = read_outcomes(run.path, WRAPPED)
    wrapped = wrapped_floor(config, inside, named, tries=count, blind=verdict.blind)
    _check_passed(run, "prompts inside plain frames", wrapped)
    declined = instructed_floor(config, outcomes, named, tries=count, blind=verdict.blind)
    if declined is not None:
        _check_passed(run, "instructed prompts", declined)
    return Certificate(
        verdict=verdict,
        config=config,
        adapter=adapter,
        model=record["inputs"]["model"],
        floor=floor,
        wrapped=wrapped,
        instructed=declined,
        tries=count,
        history=past.told,
        ancestry=before,
        margin=margin,
        outcomes=tuple(outcomes),
        framed=tuple(inside),
    )


def check_model(run: Run, certificate: Certificate, digest: str) -> None:
    """Check that the model whose files have this digest is the one that was verified.

    Raises:
        FloorError: it is not.
    """
    if digest != certificate.model:
        raise FloorError(f"{run.path}: the model is not the one that was verified; run `gtqlora verify` again")


def _record(run: Run) -> Record:
    """Return what the manifest says of `verify`, if the artefacts and the settings are still those."""
    record = run.manifest()["stages"].get("verify")
    if record is None:
        raise FloorError(f"{run.path}: verify did not finish; run `gtqlora verify` again")
    if record["hash"] != stage_hash(record["config"], record["inputs"], PATHS):
        raise FloorError(f"{run.path}: the record of verify was changed; run `gtqlora verify` again")
    for name in (VERDICT, SCORES, WRAPPED, HISTORY):
        if record["outputs"].get(name) != fingerprint(run.require(name, "verify")):
            raise FloorError(f"{run.path}: {name} was changed since verify; run `gtqlora verify` again")
    return record


def _check_same(run: Run, verdict: Verdict, inputs: Mapping[str, str], config: VerifyConfig, adapter: Adapter) -> None:
    """Check that this adapter was verified, in the form that ships, and that the verdict is the recorded one."""
    if inputs.get("adapter") != adapter.digest:
        raise FloorError(f"{run.path}: the adapter is not the one that was verified; run `gtqlora verify` again")
    problem = unshipped(config)
    if problem is not None:
        raise FloorError(f"{run.path}: {problem.replace('RUN', str(run.path))}")
    recorded = (config.model, config.expert_format, adapter.digest, adapter.info.kind, inputs.get("wrappers"), None)
    told = (verdict.model, verdict.expert_format, verdict.adapter, verdict.kind, verdict.wrappers, verdict.served)
    if told != recorded:
        raise FloorError(f"{run.path}: {VERDICT} and the record of verify differ; run `gtqlora verify` again")


def _judge(run: Run, config: VerifyConfig, inputs: Mapping[str, str], named: str | None) -> Judge:
    """Build the judges that `verify` used, if they may run; nothing is imported before its source is compared."""
    if named is not None and named != config.judge:
        raise FloorError(f"{run.path}: verified by the judge {config.judge!r}, not by {named!r}; verify with that one")
    if named is None:
        trust.check_named(config.judge, str(run / "manifest.json"))
    second = config.second_judge
    if second is not None and must_be_named(second) and not trust.is_remembered(run.path, second):
        raise FloorError(
            f"{run.path}: verified by a second judge, {second!r}, that runs only if you name it; if you trust it, run "
            f"`gtqlora verify {run.path} --rejudge --set second_judge={second}` first"
        )
    was, asked = inputs.get("judge", ""), filter(None, (config.judge, second))
    if not all(trust.identity(judge) in was for judge in asked) or (
        (found := judges_of(config.judge, second)).identity != was
    ):
        raise FloorError(f"{run.path}: the judge is not the one that it was verified by; run `gtqlora verify` again")
    return found


def _entry(run: Run, history: Sequence[Entry], inputs: Mapping[str, str], rows: Sequence[Outcome]) -> Entry:
    """Return the recorded verdict, its prompts as they are judged now.

    Raises:
        FloorError: the run's history does not hold it.
    """
    prompts = entry_prompts(rows)
    for entry in reversed(history):
        same = (entry.model, entry.contrast, entry.judge) == (inputs["model"], inputs["contrast"], inputs["judge"])
        if same and entry.shipped and entry.prompts.keys() == prompts.keys():
            return replace(entry, prompts=prompts)
    raise FloorError(f"{run.path}: {HISTORY} does not hold this verdict; run `gtqlora verify {run.path} --again`")


def _check_passed(run: Run, on: str, found: WrappedFloor | Floor) -> None:
    """Check that a floor beside the one on harmful prompts is passed.

    Raises:
        FloorError: it is not.
    """
    if found.verdict != "pass":
        raise FloorError(
            f"{run.path}: the safety floor's verdict on {on} is {found.verdict!r} ({found.reason}); "
            "no weights are written"
        )


def _passed(
    run: Run,
    config: VerifyConfig,
    entry: Entry,
    history: Sequence[Entry],
    *,
    tries: int,
    margin: float,
    blind: str | None,
) -> Floor:
    """Return the floor over all prompts that the edit was ever judged on; it has to pass on these ones, too.

    Raises:
        FloorError: no pass.
    """
    for prompts in (entry.prompts, seen := ever_seen(history, entry)):
        found = floor_of(prompts, config, tries=tries, margin=margin, blind=blind)
        if found.verdict != "pass":
            which = "" if prompts is not seen or seen == entry.prompts else " over all prompts it was ever judged on"
            tried = f"; {tries} tries on these prompts, so the level is {found.level:.4g}" if tries > 1 else ""
            raise FloorError(
                f"{run.path}: the safety floor's verdict{which} is {found.verdict!r} ({found.reason}{tried}); no "
                "weights are written"
            )
    return found
