"""Spoilt models, pairs and runs through the verbs that read them.

Each input has to end within ten seconds, with a documented exit code and no traceback; where it is accepted, an oracle
that shares no code with the verb looks whether that was right. A case is a function of the seed and its number alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gtqlora import cli
from tests import helpers, models
from tests.chaos import forks, mutations, scenes
from tests.chaos.mutations import Draw

CODES = (0, 2, 3, 4)
_WRONG = 77
_JUDGE = ("--set", f"judge={helpers.JUDGE}")


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


@dataclass
class World:
    """Good files to start from, and what comes of them."""

    folder: Path
    exported: dict[str, str]
    adapter: dict[str, str]
    verdict: dict[str, Any]

    @property
    def good(self) -> Path:
        return self.folder / "good"

    @property
    def trial(self) -> Path:
        return self.folder / "trial"

    @classmethod
    def build(cls, folder: Path) -> World:
        """A model, a sharded one, pairs in both forms, a certified run; every verb is played once in this process."""
        scenes.quiet()
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        world, good = cls(folder, {}, {}, {}), folder / "trial"
        good.mkdir(parents=True)
        scenes.first_folder(good)
        models.save_tiny(good / "sharded", "qwen3_moe", num_hidden_layers=2, max_shard_size="20KB")
        (good / "sharded" / "model.safetensors.index.json").stat()
        rows = [json.loads(line) for line in (good / "pairs.jsonl").read_text().splitlines()]
        helpers.write_rows(good / "few.jsonl", [row for row in rows if row["split"] == "train"])
        pq.write_table(pa.Table.from_pylist([_flat(row) for row in rows]), good / "pairs.parquet")
        with contextlib.chdir(good):
            world._play()
        return world

    def _play(self) -> None:
        steps = {scene.name: scene.command for scene in scenes.scenes()}
        for command in (
            *(steps["train"], steps["verify"], steps["export"], ("report", "run"), ("inspect", "model", "--json")),
            *(("contrast", "check", "pairs.parquet", "--model", "model", "--judge", helpers.JUDGE), _TRAIN_SHARDED),
        ):
            scenes.in_process(command)
        self.exported = scenes.contents(self.trial, ("out",))
        self.adapter = scenes.contents(self.trial, ("run/adapter/edit.safetensors",))
        self.verdict = json.loads(Path("run/verdict.json").read_text())
        for name in ("out", "fresh"):
            shutil.rmtree(name)
        shutil.copytree(self.trial, self.good)

    @contextlib.contextmanager
    def laid_out(self) -> Iterator[None]:
        """The good files as working directory, to be spoilt."""
        shutil.rmtree(self.trial, ignore_errors=True)
        shutil.copytree(self.good, self.trial)
        with contextlib.chdir(self.trial):
            yield


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()}


# --- oracles ---------------------------------------------------------------------------------------------------------


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _numbers(entry)
    elif isinstance(value, int | float):
        yield value


def inspected(world: World, command: tuple[str, ...], out: str) -> str | None:
    """The numbers are finite and those of a model that plain transformers builds from this config."""
    found = json.loads(out)
    if not all(math.isfinite(number) for number in _numbers(found)):
        return "a number is not finite"
    config = json.loads(Path("model/config.json").read_text())
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    count = sum(p.numel() for p in model.parameters())
    if found["text_parameters"] != count:
        return f"{found['text_parameters']} parameters, but the model has {count}"
    if not 1 <= found["top_k"] <= found["experts"]:
        return f"top {found['top_k']} of {found['experts']} experts"
    return None


def rendered(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Different prompts become different tokens, all of them of the model's vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    vocabulary = json.loads(Path("model/config.json").read_text())["vocab_size"]
    prompts = [json.loads(line)["prompt"] for line in Path("few.jsonl").read_text().splitlines()][:4]
    seen = [tuple(_ids(tokenizer, prompt)) for prompt in prompts]
    if any(not ids for ids in seen):
        return "a prompt renders to nothing"
    if len(set(seen)) < len(set(map(str, prompts))):
        return "different prompts render alike"
    if max(max(ids) for ids in seen) >= vocabulary:
        return "a token beyond the vocabulary"
    return None


def _ids(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def generates(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Every special token named is a token."""
    vocabulary = json.loads(Path("model/config.json").read_text())["vocab_size"]
    settings = GenerationConfig.from_pretrained("model").to_dict()
    for key in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = settings.get(key)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and 0 <= token < vocabulary):
                return f"{key} is {token!r}"
    return None


def checked(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Every row has its parts, a harmful one refuses, and nothing is there twice."""
    rows = _rows(Path(command[2]))
    keys: set[str] = set()
    for row in rows:
        if row["kind"] not in ("benign", "lookalike", "harmful"):
            return f"kind {row['kind']!r}"
        chosen, rejected = _text(row["chosen"]), _text(row["rejected"])
        if not chosen.strip() or not rejected.strip():
            return "an answer is empty"
        if row["kind"] == "harmful" and not helpers.refuses(chosen):
            return "a harmful row's chosen does not refuse"
        if (key := json.dumps([row["prompt"], chosen, rejected])) in keys:
            return "a row is there twice"
        keys.add(key)
    return None if rows else "no rows"


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else value[0]["content"]


def trained(world: World, command: tuple[str, ...], out: str) -> str | None:
    """What was trained is finite, and the weights it was trained on were floats and finite."""
    edit = load_file(next(Path().glob("*/adapter/edit.safetensors")))
    if not all(tensor.isfinite().all() for tensor in edit.values()):
        return "the edit is not finite"
    for file in Path(command[1]).glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                return f"{name} is {tensor.dtype}, or not finite"
    return None


def resumed(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Whatever the run's files say, the edit is the one that training makes, bit for bit."""
    found = scenes.contents(world.trial, ("run/adapter/edit.safetensors",))
    return None if found == world.adapter else "another edit than an undisturbed training's"


def ran(world: World, command: tuple[str, ...], out: str) -> str | None:
    """Of a run: exported weights are the certified ones, a passed verdict is of the edit that was trained."""
    match command[0]:
        case "export":
            found = {n: h for n, h in scenes.contents(world.trial, ("out",)).items() if n.endswith(".safetensors")}
            wanted = {n: h for n, h in world.exported.items() if n.endswith(".safetensors")}
            return None if found == wanted else "exported other weights than the certified ones"
        case "verify":
            verdict = json.loads(Path("run/verdict.json").read_text())
            same = all(verdict[key] == world.verdict[key] for key in ("adapter", "table", "lost"))
            return None if same else "passed something else than what was trained"
        case "train":
            return resumed(world, command, out)
        case _:
            page = Path("run/report.html").read_text()
            return "the report is not whole" if not page.rstrip().endswith("</html>") else _odd_words(page)


def _odd_words(page: str) -> str | None:
    if "<script>alert(1)" in page:
        return "markup goes into the report as it is"
    found = re.search(r">[^<]*\b(nan|NaN|inf)\b ?%?[^<]*<", page)
    return f"the report says {found.group(0)[:80]!r}" if found else None


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
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(("", "{}", "[]", "null", "1", "x", "\u2028", " \t")))
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
            *(pa.nulls(count), pa.array(list(range(count))), pa.array([float("nan")] * count), pa.array([["x"]] * count)),
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


_QUICK = tuple(word for key in ("steps=1", "batch_size=4", "rank=2", "alpha=4") for word in ("--set", key))
_TRAIN = ("train", "model", "--contrast", "few.jsonl", "--run", "fresh", *_JUDGE, *_QUICK)
_TRAIN_SHARDED = ("train", "sharded", *_TRAIN[2:])
_CHECK = ("contrast", "check", "few.jsonl", "--judge", helpers.JUDGE, "--model", "model")
_GO_ON = next(scene.command for scene in scenes.scenes() if scene.name == "train")
_VERIFY = next(scene.command for scene in scenes.scenes() if scene.name == "verify")
_EXPORT, _REPORT = ("export", "run", "out", *_JUDGE), ("report", "run")

GROUPS = (
    Group("config", ("model/config.json",), as_json, (("inspect", "model", "--json"),), inspected),
    Group("weights", ("model/model.safetensors",), mutations.spoilt_safetensors, (_TRAIN,), trained),
    Group("index", ("sharded/model.safetensors.index.json",), as_json, (_TRAIN_SHARDED,), trained),
    Group("template", ("model/chat_template.jinja",), as_template, (_CHECK,), rendered),
    Group("tokenizer", ("model/tokenizer.json", "model/tokenizer_config.json"), as_json, (_CHECK,), rendered),
    Group("generation", ("model/generation_config.json",), as_json, (("inspect", "model", "--json"), _CHECK), generates),
    Group("pairs", ("pairs.jsonl",), as_lines, (("contrast", "check", "pairs.jsonl", "--judge", helpers.JUDGE),), checked),
    Group("table", ("pairs.parquet",), as_parquet, (("contrast", "check", "pairs.parquet", "--judge", helpers.JUDGE),), checked),
    Group(
        "run",
        (
            *("run/manifest.json", "run/verdict.json", "run/verdicts.jsonl", "run/scores.parquet", "run/metrics.jsonl"),
            *("run/adapter/adapter_config.json", "run/adapter/gtqlora.json", "run/adapter/edit.safetensors"),
            *("run/contrast.parquet", "gtqlora-ledger.jsonl"),
        ),
        as_any,
        (_REPORT, _EXPORT, _VERIFY, (*_VERIFY, "--again")),
        ran,
    ),
    Group("checkpoint", ("run/checkpoints/checkpoint-2/*", "run/checkpoints/metrics.jsonl"), as_any, (_GO_ON,), resumed),
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


def case(world: World, group: Group, draw: Draw, number: int = 0) -> Case:
    """Spoil one file of a group and let a verb read it."""
    with world.laid_out():
        pattern = draw.choice(group.files)
        file = draw.choice(sorted(p for p in Path().glob(pattern) if p.is_file()))
        file.write_bytes(group.spoil(file.read_bytes(), draw))
        command = draw.choice(group.commands)
        if group.name == "checkpoint":  # as if it had been killed before the edit was whole
            shutil.rmtree("run/adapter")
        return _played(world, group, file, command, number)


def _played(world: World, group: Group, file: Path, command: tuple[str, ...], number: int) -> Case:
    ended = forks.forked(lambda: judged(world, group, command), world.trial, timeout=forks.LIMIT)
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
        code = cli.main(list(command))
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


def numbered(world: World, seed: int, number: int, only: str | None = None) -> Case:
    groups = [group for group in GROUPS if only in (None, group.name)]
    return case(world, groups[number % len(groups)], random.Random(f"{seed} {number}"), number)


def campaign(count: int, jobs: int, seed: int, only: str | None = None) -> dict[str, Any]:
    shares = [(number, jobs, count, seed, only) for number in range(jobs)]
    if jobs == 1:
        found = work(shares[0])
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            found = [one for part in pool.imap_unordered(work, shares) for one in part]
    return summary(found, seed, only)


def work(share: tuple[int, int, int, int, str | None]) -> list[Case]:
    first, jobs, count, seed, only = share
    cases, here = [], os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        world = World.build(Path(folder))
        for number in range(first, count, jobs):
            cases.append(numbered(world, seed, number, only))
            if cases[-1].fault or len(cases) % 50 == 0:
                sys.stderr.write(f"[{first}] {number}/{count} {cases[-1].group}: {cases[-1].fault or 'ok'}\n"[:500])
        os.chdir(here)
    return cases


def one(number: int, seed: int, only: str | None) -> dict[str, Any]:
    """One case anew."""
    with tempfile.TemporaryDirectory() as folder:
        return summary([numbered(World.build(Path(folder)), seed, number, only)], seed, only)


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
