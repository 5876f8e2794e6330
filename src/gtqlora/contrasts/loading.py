"""The only way in for rows: read, checked one by one and as a set, saved again. Nothing bypasses `load`."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gtqlora.contrasts.one_way import check_row, judged_rows
from gtqlora.contrasts.rows import ALL_KINDS, KINDS, SPLITS, TOPICS, Contrast, Row, digest, prompt_key
from gtqlora.contrasts.sources import (
    Problem,
    Problems,
    a_completion,
    a_name,
    a_prompt,
    a_text,
    one_of,
    parsed,
    records,
)
from gtqlora.errors import ContrastError
from gtqlora.judging.judge import Judge, Messages
from gtqlora.progress import track_many
from gtqlora.run import write_parquet
from gtqlora.storage.atomic import checked_path, refuse_existing


def load(source: str | Path, judge: Judge, *, dropped: list[Problem] | None = None) -> Contrast:
    """Load the rows of a file, a dataset folder or a hub dataset: TRL's preference form and `kind`.

    Optional columns are `pair_id` (by default a hash of the prompt), `twin`, `answer`, `split` (by default from a hash
    of the pair id), and `topic` (or `category`, or `source`), which says what rows have in common.

    Args:
        dropped: rows that break a rule are left out, and why is added here; without it nothing is loaded.

    Raises:
        ContrastError: the source cannot be read, rows break the schema, leak between splits or break the one-way
            rule (up to ten problems are shown together, with row numbers and the fix), or a kind is missing.
    """
    name = str(source)
    problems = Problems(name)
    found = [_parsed(*record) for record in track_many(list(records(name)), "reading rows")]
    if not found:
        raise ContrastError(f"{name}: no rows; write one JSON object per line")
    # All rows at once: a judge that is a model answers a batch much faster than row by row.
    judged = iter(judged_rows([row for _, row in found if isinstance(row, Row)], judge))
    rows = []
    for number, row in track_many(found, "checking rows"):
        try:
            if isinstance(row, ContrastError):
                raise row
            check_row(row, next(judged))
            rows.append(row)
        except ContrastError as error:
            problems.add([number], str(error))
    # What goes for one reason is named for no other one: the same rows are named as are dropped.
    rows = without_problems(rows, name, problems.found)
    if dropped is None:
        problems.stop()
    else:
        dropped += problems.found
    check_kinds(rows, name, dropped or ())
    return Contrast(source=name, rows=tuple(rows))


def without_problems(rows: Sequence[Row], source: str, dropped: list[Problem]) -> Sequence[Row]:
    """Return the rows without those that do not go together; why others are left out is added to `dropped`.

    What one rule takes out may mend what another one finds.
    """
    for check in (_check_repeated, _check_one_kind, _check_leaks):
        while True:
            problems = Problems(source)
            check(rows, problems)
            if not problems.found:
                break
            dropped += problems.found
            excess = problems.excess
            rows = [row for row in rows if row.number not in excess]
    return rows


def _parsed(number: int, raw: object, hub_split: str | None) -> tuple[int, Row | ContrastError]:
    """Return a row by its number, or what is wrong with it: every row is read before the judge is asked."""
    try:
        return number, _row(number, raw, hub_split)
    except ContrastError as error:
        return number, error


def check_new(path: Path) -> Path:
    """Return the path of a file that a set may be saved as.

    Raises:
        ContrastError, RunError: as `save`.
    """
    path = checked_path(path)
    if path.suffix != ".parquet":
        raise ContrastError(f"{path}: a contrast set is saved as Parquet; let the name end in .parquet")
    refuse_existing(path)
    return path


def save(contrast: Contrast, path: Path) -> None:
    """Write a set as a new Parquet file that `load` reads back, whole or not at all.

    Raises:
        ContrastError: the name does not end in .parquet, so `load` would not know it.
        RunError: something has that name.
    """
    check_new(path)
    rows = [dataclasses.asdict(row) | {"prompt": list(row.prompt)} for row in contrast.rows]
    # Messages are tuples in a row; Parquet and `load` know lists.
    for row in rows:
        row["twin"] = None if row["twin"] is None else list(row["twin"])
    write_parquet(path, rows, replace=False)


# --- one row


def split_of(pair_id: str) -> str:
    """Return a split by hash: 80 % train, 10 % validation, 10 % heldout, the same on every machine."""
    # By hash and not by draw: rows that are added later move no pair to another split.
    percent = int(digest(pair_id), 16) % 100
    return "train" if percent < 80 else "validation" if percent < 90 else "heldout"


def _pair_id(value: object, prompt: Messages) -> str:
    if value is None:
        return digest(prompt_key(prompt))
    return a_name("pair_id", value)


def _topic(record: Mapping[str, object]) -> str | None:
    column = next((name for name in TOPICS if name in record), None)
    return None if column is None else a_name(column, record[column])


def _unfolded(record: dict[str, object]) -> dict[str, object]:
    """Return a record with the prompt that both of its conversations begin with (TRL's implicit prompt)."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if "prompt" in record or not isinstance(chosen, list) or not isinstance(rejected, list):
        return record
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        return record
    return {**record, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _row(number: int, raw: object, hub_split: str | None) -> Row:
    # Parquet has every column in every row: null means that this row lacks the value.
    given = parsed(raw)
    record = _unfolded({name: value for name, value in given.items() if value is not None})
    if record.get("tools"):
        raise ContrastError(
            "tools are not rendered here, and the prompt means something else without them; drop the row"
        )
    required = ("prompt", "chosen", "rejected", "kind")
    # A list of several messages says more about the mistake than "prompt is missing".
    chosen = a_completion("chosen", record["chosen"]) if "chosen" in record else ""
    missing = [f"{name} (null)" if name in given else name for name in required if name not in record]
    if missing:
        raise ContrastError(f"{' and '.join(missing)} missing; every row needs {', '.join(required)}")
    prompt = a_prompt("prompt", record["prompt"])
    pair_id = _pair_id(record.get("pair_id"), prompt)
    split = record["split"] if "split" in record else hub_split or split_of(pair_id)
    return Row(
        number=number,
        kind=one_of("kind", a_text("kind", record["kind"]), ALL_KINDS),
        prompt=prompt,
        chosen=chosen,
        rejected=a_completion("rejected", record["rejected"]),
        pair_id=pair_id,
        twin=a_prompt("twin", record["twin"]) if "twin" in record else None,
        answer=a_text("answer", record["answer"]) if "answer" in record else None,
        topic=_topic(record),
        split=one_of("split", a_text("split", split), SPLITS),
    )


# --- the set


def check_kinds(rows: Iterable[Row], source: str, dropped: Sequence[Problem] = ()) -> None:
    """Check that there are harmful rows, and others to contrast them with.

    Args:
        dropped: why other rows were left out, which may be why a kind is missing.

    Raises:
        ContrastError: there are not.
    """
    kinds = {row.kind for row in rows}
    left_out = f"; left out: {dropped[0]}" + " ..." * (len(dropped) > 1) if dropped else ""
    if not kinds:
        raise ContrastError(f"{source}: no row is left{left_out}")
    if "harmful" not in kinds:
        raise ContrastError(
            f"{source}: no harmful rows, only {' and '.join(sorted(kinds))}; add some with a refusal as chosen: "
            f"the safety floor and the routing anchor are measured on them{left_out}"
        )
    # instructed rows contrast with nothing here: they are declined for another reason
    if len(kinds.intersection(KINDS)) < 2:
        raise ContrastError(
            f"{source}: only {' and '.join(sorted(kinds))} rows; add benign or lookalike rows to contrast them with"
            f"{left_out}"
        )


def _grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> Iterator[list[Row]]:
    groups: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return (group for group in groups.values() if len(group) > 1)


def _check_repeated(rows: Sequence[Row], problems: Problems) -> None:
    for group in repeated(rows):
        rarest = _rarest(group)
        kept = next(row.number for row in group if row.split == rarest)
        several = len({row.split for row in group}) > 1
        problem = f"the same row more than once; keep {f'that of {rarest}' if several else 'one of them'}"
        problems.add(_numbers(group), problem, excess=[row.number for row in group if row.number != kept])


def _check_one_kind(rows: Sequence[Row], problems: Problems) -> None:
    for group in _grouped(rows, lambda row: row.prompt_key):
        if len({row.kind for row in group}) > 1:
            problems.add(_numbers(group), "the same prompt under two kinds; keep the kind that fits")


def _check_leaks(rows: Sequence[Row], problems: Problems) -> None:
    for group, message in leaking(rows):
        rarest = _rarest(group)
        problems.add(_numbers(group), message, excess=[row.number for row in group if row.split != rarest])


def _rarest(rows: Iterable[Row]) -> str:
    """Return the split whose rows stay: held-out ones are the rarest, and what a verdict hangs on."""
    return max((row.split for row in rows), key=SPLITS.index)


def repeated(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Return the groups of rows that are one row given more than once; none in a set that was loaded."""
    for group in _grouped(rows, lambda row: (row.kind, row.chosen, row.rejected)):
        yield from _grouped(group, lambda row: json.dumps(row.prompt))


def leaking(rows: Sequence[Row]) -> Iterator[tuple[list[Row], str]]:
    """Yield the groups of rows that leak between splits, and what is wrong; none in a set that was loaded."""
    for group in _grouped(rows, lambda row: row.pair_id):
        if len({row.split for row in group}) > 1:
            yield group, f"pair_id {group[0].pair_id!r} is in two splits; give its rows one `split`"
    # One pair in two splits was said above; this finds a prompt that two pairs share.
    for group in _sharing_a_prompt(rows):
        if len({row.split for row in group}) > 1 and len({row.pair_id for row in group}) > 1:
            yield group, "one prompt (or twin) is in two splits; give these rows one `pair_id` or one `split`"


def _keys(row: Row) -> list[str]:
    return [row.prompt_key] if row.twin is None else [row.prompt_key, prompt_key(row.twin)]


def _sharing_a_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for prompt in _keys(row):
            groups[prompt].append(row)
    return list(groups.values())


def _numbers(rows: Iterable[Row]) -> list[int]:
    return [row.number for row in rows]


def check_disjoint(heldout: Contrast, train: Contrast) -> None:
    """Check that no held-out prompt is a prompt, or a twin, of the training rows given.

    Raises:
        ContrastError: shared prompts, with the row numbers on both sides.
    """
    # Twins count as trained on: an edit sees them, too.
    trained: dict[str, int] = {}
    for row in train.rows:
        for prompt in _keys(row):
            trained.setdefault(prompt, row.number)
    problems = Problems(heldout.source)
    for row in heldout.rows:
        if (number := trained.get(row.prompt_key)) is not None:
            problems.add([row.number], f"its prompt was trained on (row {number} of {train.source}); remove it here")
    problems.stop()
