"""What a verb takes over from a run: settings of its edit or of its last verdict, and judges that were named for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from gtqlora.cli.console import remark
from gtqlora.cli.settings import say_what_judges, set_by
from gtqlora.errors import RunError

if TYPE_CHECKING:
    from gtqlora.run import Run


def as_edited(run: Run, overrides: Sequence[str] | None) -> dict[str, object]:
    """Return what `verify` takes over from the settings that made the adapter.

    They stand in the adapter itself: the manifest may still know an older stage, if the last one was killed.

    Args:
        overrides: what this call sets; a judge that it does not name is taken over.

    Raises:
        RunError: there is no adapter.
        ConfigError: the recorded judge is code that this user did not name for this run before.
    """
    from gtqlora.config import of_the_edit
    from gtqlora.results.adapter import INFO, read_info

    adapter = run.require("adapter", "train")
    info = read_info(adapter)
    given = _with_judges_named(run, of_the_edit(info.config), str(adapter / INFO), overrides)
    return {**given, "model": info.model}  # pinned to the commit that was edited


def _with_judges_named(
    run: Run, recorded: Mapping[str, object], where: str, overrides: Sequence[str] | None
) -> dict[str, object]:
    """Return recorded settings without those that this call sets; judges among the others must not need naming.

    Raises:
        ConfigError: a recorded judge is code that this user did not name for this run before.
    """
    from gtqlora.config import JUDGE_KEYS
    from gtqlora.judging import trust

    given = {key: value for key, value in recorded.items() if key not in set_by(overrides)}
    for key in JUDGE_KEYS:
        judge = given.get(key)
        if judge is not None and not _is_remembered(run, str(judge)):
            trust.check_named(str(judge), where, key=key)
    return given


_TOLD = ("judge", "second_judge", "margin", "level", "min_refused", "wrapped_margin", "instructed_margin")
"""Settings by which a verdict is decided."""


def _is_remembered(run: Run, judge: str) -> bool:
    from gtqlora.judging import trust
    from gtqlora.ranks import by_leader

    return by_leader(lambda: trust.is_remembered(run.home, judge))


def as_verified(run: Run, overrides: Sequence[str] | None) -> dict[str, object]:
    """Return the settings of the last `verify`, which `--rejudge` keeps; arguments and errors as of `as_edited`.

    Those by which it is decided are told on stderr.
    """
    from gtqlora.config import VerifyConfig

    record = run.manifest()["stages"].get("verify")
    if record is None:
        return as_edited(run, overrides)
    given = _with_judges_named(run, record["config"], str(run / "manifest.json"), overrides)
    usual = {field.name: field.default for field in fields(VerifyConfig)}
    told = [key for key in _TOLD if key in given and (key in ("judge", "margin") or given[key] != usual[key])]
    if told:
        remark(f"as the last verdict: {', '.join(f'{key} = {given[key]}' for key in told)}; --set changes it")
    return given


def judge_of_verdict(run: Run, named: str | None) -> str | None:
    """Return the judge that this call names, or the recorded one if it is code that was named for this run before."""
    from gtqlora.judging import trust

    record = run.manifest()["stages"].get("verify")
    recorded = record["config"].get("judge") if record and isinstance(record["config"], dict) else None
    if named is None and isinstance(recorded, str) and trust.is_remembered(run.path, recorded):
        named = recorded
    if named is not None:
        say_what_judges(named)
    return named


def existing_run(run: Path) -> Path:
    """Return a run directory that is there already: a mistyped name must not leave an empty one behind.

    Raises:
        RunError: there is none, or it is some other folder.
    """
    from gtqlora.run import MANIFEST
    from gtqlora.storage.atomic import checked_path

    # Before the run is opened for writing, which would make the folder.
    run = checked_path(run)
    if not run.is_dir():
        raise RunError(f"{run}: no such run directory; `gtqlora train MODEL --run {run}` makes one")
    if not (run / MANIFEST).exists():
        raise RunError(f"{run}: not a run directory (no {MANIFEST} in it); name the one that `gtqlora train` made")
    return run
