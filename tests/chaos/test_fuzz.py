"""A few hundred spoilt inputs and all that once failed; `python -m tests.chaos fuzz` plays thousands."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gtqlora.families import rendering
from tests.chaos import corpus, forks, fuzz, mutations
from tests.chaos.corpus import Known
from tests.chaos.forks import Child
from tests.chaos.fuzz import Group
from tests.chaos.world import World

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="children are forked, which CUDA does not survive")
INPUTS = {
    **{"config": 60, "template": 20, "tokenizer": 15, "generation": 20, "pairs": 40, "table": 25},
    **{"index": 15, "weights": 15, "run": 15, "checkpoint": 6},
}
GROUPS = {group.name: group for group in fuzz.GROUPS}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    state, limit, seconds = os.environ["XDG_STATE_HOME"], forks.LIMIT, rendering.SECONDS
    forks.LIMIT = 3 * limit  # the machine may be busy with other tests
    rendering.SECONDS = 1.0  # of processor time, after which a template without end is refused
    yield World.build(tmp_path_factory.mktemp("fuzz"))
    os.environ["XDG_STATE_HOME"], forks.LIMIT, rendering.SECONDS = state, limit, seconds


@pytest.fixture(scope="module")
def reader(world: World) -> Iterator[Child]:
    child = fuzz.reader(world)
    yield child
    child.close()


@pytest.mark.parametrize("name", INPUTS)
def test_spoilt_inputs(world: World, reader: Child, name: str) -> None:
    @settings(
        max_examples=INPUTS[name],
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(seed=st.integers(0, 2**32))
    def spoilt(seed: int) -> None:
        found = fuzz.case(world, reader, GROUPS[name], random.Random(seed))
        assert found.fault is None, found

    spoilt()


@pytest.fixture(scope="module")
def commands(world: World) -> Iterator[Child]:
    child = Child(fuzz.app.main, world.trial)
    yield child
    child.close()


@pytest.mark.parametrize("known", corpus.KNOWN, ids=lambda known: known.name)
def test_what_once_failed_is_one_line(world: World, commands: Child, known: Known) -> None:
    with world.laid_out():
        file = Path(known.file)
        file.write_bytes(known.change(file.read_bytes()))
        ended = commands(known.command, forks.LIMIT)
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert ended.code in (known.code, 4 if known.command[0] == "export" else known.code), ended
    assert len(errors) == 1 and not ended.traceback, ended


# --- the instrument itself: it must see what it is there for -------------------------------------------------------


def test_every_group_is_played() -> None:
    assert set(INPUTS) == set(GROUPS)


def test_good_files_are_accepted_by_verb_and_oracle(world: World, reader: Child) -> None:
    for group in fuzz.GROUPS:
        for command in group.commands:
            with world.laid_out():
                ended = reader((group.name, *command))
                found = fuzz.seen(world, group, Path(group.files[0]), command, ended)
            assert (found.outcome, found.fault) == ("0", None), found


def test_the_same_seed_spoils_in_the_same_way(world: World) -> None:
    file = world.good / "run" / "manifest.json"
    first, second = (fuzz.as_any(file.read_bytes(), random.Random(7)) for _ in range(2))
    assert first == second != file.read_bytes()
    assert len({mutations.spoilt_json(file.read_text(), random.Random(n)) for n in range(50)}) > 40


def _group(work: object, oracle: object) -> Group:
    return Group("x", ("few.jsonl",), lambda data, draw: data, (("x",),), oracle)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("behaves", "outcome"), [("hangs", "hang"), ("raises", "traceback"), ("takes", "accepted wrongly"), ("odd", "9")]
)
def test_faults_are_seen(world: World, behaves: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(arguments: list[str]) -> int:
        if behaves == "hangs":
            while True:
                pass
        if behaves == "raises":
            raise ValueError("no")
        return 0 if behaves == "takes" else 9

    monkeypatch.setattr(fuzz.app, "main", main)
    group = _group(main, lambda *_: "wrong")
    child = Child(lambda words: fuzz.judged(world, group, tuple(words)), world.trial)
    for _ in range(2):  # the second may be in the place of one that hung
        with world.laid_out():
            found = fuzz.seen(world, group, Path("few.jsonl"), ("x",), child(("x",), 0.5))
        assert found.outcome == outcome and found.fault
    child.close()


def test_a_child_works_again_and_again_until_it_dies(tmp_path: Path) -> None:
    def work(words: list[str]) -> int:
        Path(words[0]).write_text("")
        sys.stdout.write(f"{os.getpid()} {os.getcwd()} {words[0]}")
        if words[0] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return len(words)

    child = Child(work, tmp_path)
    first, second, dead, after = (child(words) for words in (("a",), ("b", "c"), ("dies",), ("d",)))
    assert [first.code, second.code, dead.code, after.code] == [1, 2, -signal.SIGKILL, 1]
    pids = [ended.output.split()[0] for ended in (first, second, after)]
    assert pids[0] == pids[1] != pids[2]
    assert [ended.output.split()[1:] for ended in (first, second)] == [[str(tmp_path), "a"], [str(tmp_path), "b"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d", "dies"]
    child.close()
