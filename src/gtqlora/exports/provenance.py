"""Whether files are what was certified: each against its hash in `export.json`, and the record against itself.

This needs neither torch nor a network, and reads the records of older versions. A record carries no signature: whoever
rewrites it together with the files is seen only by the run that they came from, which remembers its exports.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from gtqlora.errors import RunError
from gtqlora.progress import report
from gtqlora.results.export import CARD, FILE, ExportRecord, read_export
from gtqlora.stats import Floor, one_sided
from gtqlora.storage.atomic import checked_path

State = Literal["as recorded", "renamed", "changed", "missing", "not recorded", "free to edit"]
_FOR_PEOPLE = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf")
"""What may be added to a published folder, and `_TERMS`: no loader reads it."""
_TERMS = ("LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "CITATION.cff")
_CHUNK = 2**24
_LAST_MARGIN = 0.05
"""The largest share of refusals that any version let all edits of a model lose together."""


@dataclass(frozen=True)
class Checked:
    """One file: its name in the folder, and what it is to the record.

    Attributes:
        certified_as: under which name the record holds it, where that is another one.
    """

    name: str
    state: State
    certified_as: str | None = None

    @property
    def shown(self) -> str:
        """Return the name for a screen, which characters in it might steer."""
        return self.name if self.name.isprintable() else ascii(self.name)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a check found.

    Attributes:
        place: the folder or file that was checked.
        folder: where its record lies.
        whole: whether it was a whole folder, and not one file of it.
        problems: why it is not what was certified, a sentence each; none if it is.
    """

    place: Path
    folder: Path
    whole: bool
    record: ExportRecord
    files: list[Checked]
    problems: list[str] = field(default_factory=list[str])

    @property
    def certified(self) -> bool:
        """Return whether all of it is what was certified."""
        return not self.problems


def check(place: Path) -> Provenance:
    """Check an exported folder, or one file of it by its contents, whatever it is called now.

    Raises:
        RunError: there is nothing, or no readable `export.json` there (of a file: in its folder or one above).
    """
    place = Path(os.path.abspath(checked_path(place)))
    if not place.exists():
        raise RunError(f"{place}: no such folder or file")
    whole = place.is_dir()
    # links are followed, as in the hub's cache: what counts is what a loader would read there
    folder = place if whole else _folder_of(place)
    record = read_export(folder, older=True)
    files = _folder(folder, record) if whole else _file(place, folder, record)
    problems = [*(_of_folder if whole else _of_file)(files, record), *contradictions(record)]
    return Provenance(place=place, folder=folder, whole=whole, record=record, files=files, problems=problems)


def _folder_of(file: Path) -> Path:
    for folder in list(file.parents)[:3]:
        if (folder / FILE).is_file():
            return folder
    raise RunError(f"{file}: no {FILE} in its folder; put the one there that was published with it")


# --- files -----------------------------------------------------------------------------------------------------------


def _file(file: Path, folder: Path, record: ExportRecord) -> list[Checked]:
    return _matched({file.relative_to(folder).as_posix(): file}, record.files)


def _folder(folder: Path, record: ExportRecord) -> list[Checked]:
    here = dict(_entries(folder, frozenset(record.files)))
    free = [name for name in here if name not in record.files and _is_free(name)]
    missing = sorted(record.files.keys() - here.keys())
    found = _matched({name: file for name, file in here.items() if name not in free}, record.files)
    renamed = {each.certified_as for each in found if each.state == "renamed"}
    found += [Checked(name, "free to edit") for name in free]
    found += [Checked(name, "missing") for name in missing if name not in renamed]
    return sorted(found, key=lambda each: each.name)


def _entries(folder: Path, recorded: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """Yield everything below a folder that is not a folder itself; hidden things only where the record has them."""
    # the hub's own files are hidden (.gitattributes, .cache), and no loader looks there
    for root, folders, names in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if name not in linked]
        for file in (Path(root, name) for name in (*names, *linked)):
            name = file.relative_to(folder).as_posix()
            hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
            if name != FILE and (not hidden or name in recorded):
                yield name, file


def _raise(error: OSError) -> None:
    raise error


def _is_free(name: str) -> bool:
    return name in (CARD, *_TERMS) or PurePosixPath(name).suffix.lower() in _FOR_PEOPLE


def _matched(here: Mapping[str, Path], recorded: Mapping[str, str]) -> list[Checked]:
    """Compare files with the record, by their names and, where a name is unknown, by what is in them."""
    plain = {name: file for name, file in here.items() if _is_plain(file)}
    # an unknown file is read only where it may be one that the record misses
    lost = {digest: name for name, digest in recorded.items() if name not in here}
    digests = dict(hashes({name: file for name, file in plain.items() if name in recorded or lost}))
    return [_compared(name, digests.get(name), recorded, lost) for name in sorted(here)]


def _compared(name: str, digest: str | None, recorded: Mapping[str, str], lost: Mapping[str, str]) -> Checked:
    if name in recorded:
        return Checked(name, "as recorded" if digest == recorded[name] else "changed")
    was = None if digest is None else lost.get(digest)
    return Checked(name, "not recorded") if was is None else Checked(name, "renamed", was)


def _is_plain(file: Path) -> bool:
    """Tell whether this is a file, also behind a link as in the hub's cache; a pipe would never end."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return False


def hashes(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield the sha256 of each file's contents by its name, reporting MiB."""
    total, done = sum(file.stat().st_size for file in files.values()), 0
    for name, file in files.items():
        # by chunks, so that a file of hundreds of GB takes little memory and shows how far it is
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                report("hash files, MiB", done >> 20, max(total, done) >> 20)
        yield name, digest.hexdigest()


def _of_file(files: list[Checked], record: ExportRecord) -> Iterator[str]:
    """Yield what is wrong with one file; what it is called is not."""
    for each in files:
        if each.name in (FILE, CARD):
            yield f"{each.shown} is no certified file, but goes with them; check the folder, which reads it as well"
        elif each.state not in ("as recorded", "renamed"):
            yield f"{each.shown} is not among the certified files ({len(record.files)} of them): no hash is the same"


def _of_folder(files: list[Checked], record: ExportRecord) -> Iterator[str]:
    for each in files:
        # a whole model in one file may be called anything; among several, names say which tensor a loader takes
        alone = each.state == "renamed" and each.name.endswith(".gguf")
        if each.state not in ("as recorded", "free to edit") and not alone:
            yield _sentence(each, record)
    if not record.files:
        yield f"{FILE} lists no files"


def _sentence(file: Checked, record: ExportRecord) -> str:
    match file.state:
        case "changed":
            return f"{file.shown} is not what was certified: it has another hash, or is no plain file"
        case "missing":
            return f"{file.shown} is missing"
        case "renamed":
            return f"{file.shown} was {file.certified_as}; loaders go by names, so give it back its own"
        case _:
            version = record.versions.get("gtqlora", "unknown")
            return f"{file.shown} is not in the record (of gtqlora {version}), and a loader may read it; move it away"


# --- the record ------------------------------------------------------------------------------------------------------


def contradictions(record: ExportRecord) -> Iterator[str]:
    """Yield what in a record cannot be so, a sentence each: a verdict that its own numbers do not bear out."""
    yield from floor_problems(record.floor, "floor")
    for key, found in (("wrapped", record.wrapped), ("instructed", record.instructed)):
        if found is not None and found.verdict != "pass":
            yield f"{FILE}: the verdict of {key!r} is {found.verdict!r}"
    if record.form is not None:
        yield from floor_problems(record.form.floor, "form.floor")
        if record.form.wrapped is not None and record.form.wrapped.verdict != "pass":
            yield f"{FILE}: the verdict of 'form.wrapped' is {record.form.wrapped.verdict!r}"
    elif record.divergence is None:
        yield f"{FILE}: neither a verdict in the form that ships, nor a comparison with what was verified"
    if not record.floor.losses.high - 1e-9 <= record.spent <= _LAST_MARGIN + 1e-9:
        yield f"{FILE}: 'spent' is {record.spent:.4g}, which does not go with the bound of 'floor.losses'"


def floor_problems(floor: Floor, key: str) -> Iterator[str]:
    """Yield why a recorded floor is no pass, or not by its own numbers; `key` is what the record calls it."""
    if floor.verdict != "pass":
        yield f"{FILE}: the verdict of {key!r} is {floor.verdict!r}"
    # the verdict alone is a word; these are what it has to follow from
    bounds = (floor.losses.high, floor.drop.high)
    if not (max(bounds) <= floor.margin <= _LAST_MARGIN and 0.5 < floor.level < 1):
        yield f"{FILE}: {key!r} does not pass by its own numbers (bounds {bounds}, margin {floor.margin:.4g})"
    elif not _is_bound(floor):
        yield f"{FILE}: the bound of '{key}.losses' does not follow from its counts"


def _is_bound(floor: Floor) -> bool:
    """Tell whether the losses' upper bound is the one of as many independent prompts, at this level."""
    # as `stats.noninferiority` has it: the exact bound for the number of independent prompts
    n = floor.effective
    if not 0 < n <= floor.refused <= floor.prompts or not 0 <= floor.losses.value <= 1:
        return False
    return math.isclose(one_sided(floor.losses.value * n, n, floor.level)[1], floor.losses.high, rel_tol=1e-6)
