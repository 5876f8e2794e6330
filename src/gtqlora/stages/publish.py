"""Whether an exported folder is still what its run certified, and the way of such a folder to the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gtqlora.certificate import certify
from gtqlora.errors import ConfigError, FloorError, RunError
from gtqlora.exports import hub
from gtqlora.exports.provenance import Provenance, check
from gtqlora.families.files import read_text
from gtqlora.reporting.model_card import names_base, with_base
from gtqlora.results.export import CARD, FILE, is_remembered
from gtqlora.run import Run, atomic_write, sha256_file


@dataclass(frozen=True)
class Sent:
    """A file and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Published:
    """What is on the hub now, or would be after a dry run.

    Attributes:
        commit: None after a dry run.
        notes: what the user should know of the card, a sentence each.
    """

    repo: str
    private: bool
    files: list[Sent]
    commit: str | None
    notes: list[str]


def provenance(run: Run, place: Path, *, judge: str | None = None) -> Provenance:
    """Check an exported folder, or a file of it, against its record and against the run that it came from.

    Raises:
        RunError: there is nothing to check, or the run cannot be read.
        ConfigError: the judge is code and this call does not name it.
    """
    found = check(place)
    return replace(found, problems=[*found.problems, *_of_run(run, found, judge)])


def _of_run(run: Run, found: Provenance, judge: str | None) -> list[str]:
    try:
        certificate = certify(run, judge)
    # that it is certified no more is an answer to the question, and no failure to ask it
    except (FloorError, RunError) as error:
        return [f"{error} (it is not certified any more)"]
    record = (found.record.adapter, found.record.base_fingerprint)
    if record != (certificate.adapter.digest, certificate.model):
        return [f"{run.path}: its record is of another edit, or of another model, than this run's"]
    if not is_remembered(run.path, found.folder):
        return [f"{run.path}: does not know this {FILE}: it was changed since, or written by another copy of the run"]
    return []


def publish(
    run: Run,
    out: Path,
    repo: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    base_model: str | None = None,
    judge: str | None = None,
) -> Published:
    """Put an exported folder on the hub, if it is what this run certified and wrote.

    Args:
        repo: OWNER/NAME; made if it is not there.
        dry_run: only say what would go where.
        base_model: the base's OWNER/NAME, for a card that has none: it is written into OUT's card.
        judge: as `export`.

    Raises:
        FloorError: it is not what was certified.
        ConfigError: no such name can be, or the card names a base already.
        RunError: there is no exported folder, or as `hub.push`.
    """
    hub.check_name(repo, "--repo")
    if base_model is not None:
        hub.check_name(base_model, "--base-model")
    # before the check: a record that is exchanged after it has another hash
    recorded = sha256_file(out / FILE) if (out / FILE).is_file() else ""
    found = provenance(run, out, judge=judge)
    if found.problems:
        raise FloorError(f"{out}: {found.problems[0]}; nothing was sent")
    if not found.whole:
        raise RunError(f"{out}: give the folder that `gtqlora export` wrote, and not one file of it")
    files = _to_send(out, found)
    notes, commit = _about_card(files[CARD], base_model), None
    if not dry_run:
        if base_model is not None:
            _name_base(files[CARD], base_model, found.record.format)
        message = f"An edit of {found.record.base}, certified and exported by gtqlora"
        commit = hub.push(files, {**found.record.files, FILE: recorded}, repo, private=private, message=message)
    sizes = [Sent(name, file.stat().st_size) for name, file in files.items()]
    return Published(repo=repo, private=private, files=sizes, commit=commit, notes=notes)


def _about_card(card: Path, base_model: str | None) -> list[str]:
    """Return what is missing in a card.

    Raises:
        ConfigError: a base is given, and the card names one already.
    """
    named = names_base(read_text(card))
    if named and base_model is not None:
        raise ConfigError(f"--base-model {base_model}: {card} names a base already (base_model); change it there")
    if named or base_model is not None:
        return []
    return [f"{card} names no base on the hub, so none is linked there; give it as --base-model OWNER/NAME"]


def _name_base(card: Path, base_model: str, form: str) -> None:
    text = with_base(read_text(card), base_model, form)
    with atomic_write(card) as staged:
        staged.write_text(text, encoding="utf-8")


def _to_send(out: Path, found: Provenance) -> dict[str, Path]:
    """Return what goes to the hub, by name: what is recorded, the record and the card, and nothing else."""
    # the card is not hashed, so a link could lead to anything of the user's
    if (card := out / CARD).is_symlink() or not card.is_file():
        raise RunError(f"{card}: not a plain file; put the card itself there")
    # by the names that were certified, whatever the files are called here
    here = {file.certified_as or file.name: file.name for file in found.files}
    return {name: out / here.get(name, name) for name in (*found.record.files, FILE, CARD)}
