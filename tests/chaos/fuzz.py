"""Spoilt models, pairs and runs through the verbs that read them.

Each input has to end within ten seconds, with a documented exit code and no traceback; where it is accepted, an oracle
that shares no code with the verb looks whether that was right. A case is a function of the seed and its number alone.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gtqlora.cli import app
from tests import helpers
from tests.chaos import forks, mutations, oracles, scenes
from tests.chaos.mutations import Draw
from tests.chaos.world import CHECK, JUDGE, TRAIN, TRAIN_SHARDED, World

CODES = (0, 2, 3, 4)
_WRONG = 77


@dataclass(frozen=True)
class Group:
    """Inputs of one kind.

    Attributes:
        files: one of which is spoilt, in the trial's folder; a pattern may stand for several.
        spoil: (bytes of the file, draw) -> other bytes.
        commands: of which one reads it.
        oracle: what is wrong with what was accepted; it gets the command and its standard output.
    """

    name: str
    files: tuple[str, ...]
    spoil: Callable[[bytes, Draw], bytes]
    commands: tuple[tuple[str, ...], ...]
    oracle: Callable[[World, tuple[str, ...], str], str | None]


# --- groups ----------------------------------------------------------------------------------------------------------


def as_json(data: bytes, draw: Draw) -> bytes:
    if draw.random() < 0.12:
        return mutations.spoilt_bytes(data, draw)
    return mutations.spoilt_json(data.decode(), draw).encode(errors="surrogatepass")


def as_lines(data: bytes, draw: Draw) -> bytes:
    lines = data.decode().splitlines()
    match draw.randrange(8):
        case 0:
            return mutations.spoilt_bytes(data, draw)
        case 1:
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
        case 2:
            lines.insert(
                draw.randrange(len(lines) + 1), draw.choice(("", "{}", "[]", "null", "1", "x", "\u2028", " \t"))
            )
        case _:
            at = draw.randrange(len(lines))
            lines[at] = mutations.spoilt_json(lines[at], draw)
    return "\n".join(lines).encode(errors="surrogatepass")


def as_parquet(data: bytes, draw: Draw) -> bytes:
    """Rows or columns of a table spoilt; now and then its bytes."""
    if draw.random() < 0.25:
        return mutations.spoilt_bytes(data, draw)
    table = pq.read_table(io.BytesIO(data))
    name = draw.choice(table.column_names)
    at = table.column_names.index(name)
    count = table.num_rows
    column = draw.choice(
        (
            *(
                pa.nulls(count),
                pa.array(list(range(count))),
                pa.array([float("nan")] * count),
                pa.array([["x"]] * count),
            ),
            *(pa.array([b"\xff"] * count), pa.array([10**18] * count, pa.timestamp("us")), pa.array(["x"] * count)),
            *(pa.array([True] * count), pa.array(["<script>alert(1)</script>"] * count), pa.array([""] * count)),
        )
    )
    table = draw.choice(
        (
            lambda: table.set_column(at, name, column),
            lambda: table.set_column(at, name, table.column(draw.choice(table.column_names))),
            lambda: table.drop_columns([name]),
            lambda: table.append_column("more", column),
            lambda: table.slice(0, draw.randrange(count)),
            lambda: pa.concat_tables([table, table.slice(0, 1 + draw.randrange(count))]),
            lambda: table.take(pa.array([draw.randrange(count)] * count)),
        )
    )()
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def as_any(data: bytes, draw: Draw) -> bytes:
    """Whatever it looks like."""
    if data[:4] == b"PAR1":
        return as_parquet(data, draw)
    if data[8:9] == b"{" and data[:1] != b"{":
        return mutations.spoilt_safetensors(data, draw)
    with contextlib.suppress(ValueError, IndexError):
        return as_json(data, draw) if data.count(b"\n{") == 0 else as_lines(data, draw)
    return mutations.spoilt_bytes(data, draw)


def as_template(data: bytes, draw: Draw) -> bytes:
    if draw.random() < 0.1:
        return mutations.spoilt_bytes(data, draw)
    return mutations.spoilt_template(data.decode(), draw).encode(errors="surrogatepass")


_GO_ON = next(scene.command for scene in scenes.scenes() if scene.name == "train")
_VERIFY = next(scene.command for scene in scenes.scenes() if scene.name == "verify")
_EXPORT, _REPORT = ("export", "run", "out", *JUDGE), ("report", "run")

GROUPS = (
    Group("config", ("model/config.json",), as_json, (("inspect", "model", "--json"),), oracles.inspected),
    Group("weights", ("model/model.safetensors",), mutations.spoilt_safetensors, (TRAIN,), oracles.trained),
    Group("index", ("sharded/model.safetensors.index.json",), as_json, (TRAIN_SHARDED,), oracles.trained),
    Group("template", ("model/chat_template.jinja",), as_template, (CHECK,), oracles.rendered),
    Group("tokenizer", ("model/tokenizer.json", "model/tokenizer_config.json"), as_json, (CHECK,), oracles.rendered),
    Group(
        "generation",
        ("model/generation_config.json",),
        as_json,
        (("inspect", "model", "--json"), CHECK),
        oracles.generates,
    ),
    Group(
        "pairs",
        ("pairs.jsonl",),
        as_lines,
        (("contrast", "check", "pairs.jsonl", "--judge", helpers.JUDGE),),
        oracles.checked,
    ),
    Group(
        "table",
        ("pairs.parquet",),
        as_parquet,
        (("contrast", "check", "pairs.parquet", "--judge", helpers.JUDGE),),
        oracles.checked,
    ),
    Group(
        "run",
        (
            *("run/manifest.json", "run/verdict.json", "run/verdicts.jsonl", "run/scores.parquet", "run/metrics.jsonl"),
            *("run/adapter/adapter_config.json", "run/adapter/gtqlora.json", "run/adapter/edit.safetensors"),
            *("run/contrast.parquet", "gtqlora-ledger.jsonl"),
        ),
        as_any,
        (_REPORT, _EXPORT, _VERIFY, (*_VERIFY, "--again")),
        oracles.ran,
    ),
    Group(
        "checkpoint",
        ("run/checkpoints/checkpoint-2/*", "run/checkpoints/metrics.jsonl"),
        as_any,
        (_GO_ON,),
        oracles.resumed,
    ),
)


# --- a case ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One input and what became of it; `fault` says what is wrong with that."""

    number: int
    group: str
    file: str
    command: tuple[str, ...]
    outcome: str
    fault: str | None = None
    said: str = ""


def reader(world: World) -> forks.Child:
    """A child that is told a group and a command of it, and plays them."""
    groups = {group.name: group for group in GROUPS}
    return forks.Child(lambda words: judged(world, groups[words[0]], tuple(words[1:])), world.trial)


def case(world: World, reader: forks.Child, group: Group, draw: Draw, number: int = 0) -> Case:
    """Spoil one file of a group and let a verb read it."""
    with world.laid_out():
        pattern = draw.choice(group.files)
        file = draw.choice(sorted(p for p in Path().glob(pattern) if p.is_file()))
        file.write_bytes(group.spoil(file.read_bytes(), draw))
        command = draw.choice(group.commands)
        if group.name == "checkpoint":  # as if it had been killed before the edit was whole
            shutil.rmtree("run/adapter")
        ended = reader((group.name, *command), forks.LIMIT)
        return seen(world, group, file, command, ended, number)


def seen(world: World, group: Group, file: Path, command: tuple[str, ...], ended: forks.Ended, number: int = 0) -> Case:
    """What came of it."""
    outcome, fault = str(ended.code), None
    if ended.code == forks.HUNG:
        outcome, fault = "hang", f"no end after {forks.LIMIT:.0f} s"
    elif ended.traceback:
        outcome, fault = "traceback", ended.last_line
    elif ended.code == _WRONG:
        outcome, fault = "accepted wrongly", ended.last_line
    elif ended.code not in CODES:
        fault = f"exit code {ended.code}"
    elif ended.code != 0 and "error: " not in ended.output and ended.code == 2:
        fault = "no error was said"
    elif staged := [p.name for p in world.trial.rglob("*.gtqlora-staging")]:
        fault = f"left {staged[0]}"
    return Case(number, group.name, str(file), command, outcome, fault, ended.output[-1500:] if fault else "")


def judged(world: World, group: Group, command: tuple[str, ...]) -> int:
    """In the child: the verb, then the oracle if it was accepted."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = app.main(list(command))
    if code == 0:
        try:
            wrong = group.oracle(world, command, out.getvalue())
        except Exception as error:  # plain libraries cannot read what was accepted, or build it
            wrong = f"accepted, but {type(error).__name__}: {str(error)[:300]}"
        if wrong is not None:
            sys.stderr.write(f"\nORACLE: {wrong}\n")
            return _WRONG
    return code


# --- the campaign ----------------------------------------------------------------------------------------------------


def numbered(world: World, reader: forks.Child, seed: int, number: int, only: str | None = None) -> Case:
    groups = [group for group in GROUPS if only in (None, group.name)]
    return case(world, reader, groups[number % len(groups)], random.Random(f"{seed} {number}"), number)


Share = tuple[int, int, int, int, str | None, float | None]
"""Of one worker: its first number, the step to its next, where numbers end, the seed, the only group, until when."""


def campaign(
    count: int, jobs: int, seed: int, only: str | None = None, *, until: float | None = None
) -> dict[str, Any]:
    shares: list[Share] = [(number, jobs, count, seed, only, until) for number in range(jobs)]
    if jobs == 1:
        found = work(shares[0])
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            found = [one for part in pool.imap_unordered(work, shares) for one in part]
    return summary(found, seed, only)


def work(share: Share) -> list[Case]:
    first, jobs, count, seed, only, until = share
    cases, here = [], os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        world = World.build(Path(folder))
        child = reader(world)
        for number in range(first, count, jobs):
            if until is not None and time.time() > until:
                break
            cases.append(numbered(world, child, seed, number, only))
            if cases[-1].fault or len(cases) % 50 == 0:
                sys.stderr.write(f"[{first}] {number}/{count} {cases[-1].group}: {cases[-1].fault or 'ok'}\n"[:500])
        child.close()
        os.chdir(here)
    return cases


def one(number: int, seed: int, only: str | None) -> dict[str, Any]:
    """One case anew."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.build(Path(folder))
        child = reader(world)
        found = numbered(world, child, seed, number, only)
        child.close()
        return summary([found], seed, only)


def summary(cases: list[Case], seed: int, only: str | None) -> dict[str, Any]:
    groups: dict[str, Counter[str]] = {}
    for each in cases:
        groups.setdefault(each.group, Counter())[each.outcome] += 1
    again = f"python -m tests.chaos fuzz --seed {seed}" + (f" --only {only}" if only else "")
    return {
        "inputs": len(cases),
        "by_group": {name: dict(counts) for name, counts in groups.items()},
        "by_outcome": dict(Counter(each.outcome for each in cases)),
        "faults": dict(Counter(f"{each.group}: {each.outcome}" for each in cases if each.fault)),
        "failures": [
            {
                "reproduce": f"{again} --case {each.number}",
                "file": each.file,
                "command": " ".join(each.command[:3]),
                "fault": each.fault,
                "said": each.said,
            }
            for each in sorted(cases, key=lambda c: c.number)
            if each.fault
        ],
    }
