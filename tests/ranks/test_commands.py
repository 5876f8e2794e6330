"""The command line on ranks: what they compute, who speaks, and what they say to bad input."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from gtqlora.config import TrainConfig
from gtqlora.edits.checkpoint_files import usable
from gtqlora.storage.locks import LOCK, hold
from tests import helpers, warm

CODE = "import sys\nfrom gtqlora.cli import main\nsys.exit(main(sys.argv[1:]))"
Ended = CompletedProcess[str]


def ranks(*command: object, count: int = 2, code: str = CODE, **more: Any) -> list[Ended]:
    return warm.ranks(code, *command, count=count, **more)


def spoken(ended: Sequence[Ended], code: int = 2) -> str:
    """Return the one line with which one of the ranks said why all ended; the leader may have said something before."""
    assert all(one.returncode for one in ended), ended
    assert code in {one.returncode for one in ended}
    assert not any(one.stdout for one in ended)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for one in ended for line in one.stderr.splitlines()]
    said = [line for line in lines if "error:" in line]
    assert len(said) == 1 and lines[-1] == said[0] and "Traceback" not in "".join(lines), lines
    return said[0]


def settings_of(config: TrainConfig) -> list[str]:
    left = {key: value for key, value in asdict(config).items() if key not in ("model", "template")}
    usual = asdict(TrainConfig(model=config.model, contrast=config.contrast))
    return [
        word for key, value in left.items() if value not in (usual[key], None) for word in ("--set", f"{key}={value}")
    ]


@pytest.fixture(scope="module")
def train(toy: helpers.Toy) -> list[str]:
    """A command that trains, without its run directory."""
    config = toy.train_config(toy.model("qwen3_moe"), expert_format="nf4", save_steps=1)
    return ["train", config.model, "--contrast", config.contrast, *settings_of(config)]


def with_pairs(command: list[str], contrast: Path) -> list[str]:
    return [*command[:3], str(contrast), *command[4:]]


# --- bad input


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            ["--set", "batch_size=3"],
            "batch_size = 3 cannot be shared by 2 ranks, which run as many rows each; set 2 or 4",
        ),
        (["--set", "device=cuda"], "device = 'cuda': this machine or this PyTorch has no CUDA device"),
        (["--set", "device=cuda:1"], "device = 'cuda:1': every rank has a GPU of its own; set device = 'cuda'"),
        (["--set", "judge=string:|"], "no phrase after the colon"),
        (["--set", "nothing=1"], "nothing"),
    ],
)
def test_what_all_ranks_refuse_the_leader_says(train: list[str], tmp_path: Path, changed: list[str], said: str) -> None:
    ended = ranks(*train, *changed, "--run", tmp_path / "run", CUDA_VISIBLE_DEVICES="")
    line = spoken(ended)
    assert said in line and line.startswith("error:")
    assert ended[0].stderr


def test_a_command_for_one_process_is_refused(tmp_path: Path) -> None:
    for command in (["export", str(tmp_path), str(tmp_path / "out")], ["demo"], []):
        assert "only diagnose, train, verify can be run by several processes" in spoken(ranks(*command))


def test_ranks_with_another_command_or_other_settings_are_named(train: list[str], tmp_path: Path) -> None:
    train = [*train, "--run", str(tmp_path / "run")]
    line = spoken(ranks(*train, "--set", "seed=3", own={1: [*train, "--set", "seed=7"]}))
    assert "rank 1 has seed = 7, and rank 0 has 3; start all ranks with the same command, files and versions" in line
    assert "rank 1 has command = 'verify', and rank 0 has 'train'" in spoken(
        ranks(*train, own={1: ["verify", str(tmp_path / "run")]})
    )
    assert "rank 1 has options = " in spoken(ranks(*train, own={1: [*train, "--again"]}))
    (tmp_path / "fewer.jsonl").write_text("\n".join(Path(train[3]).read_text().splitlines()[1:]))
    assert "rank 1 has contrast = " in spoken(ranks(*train, own={1: with_pairs(train, tmp_path / "fewer.jsonl")}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_ranks_with_other_versions_are_named(train: list[str], tmp_path: Path) -> None:
    other = "import os\nfrom gtqlora.storage import manifest\nhere = manifest.version\n"
    other += "manifest.version = lambda name: '0.1' if (name, os.environ['RANK']) == ('trl', '1') else here(name)\n"
    line = spoken(ranks(*train, "--run", tmp_path / "run", code=other + CODE))
    assert "rank 1 has trl = '0.1', and rank 0 has" in line


def test_more_ranks_than_experts(train: list[str], toy: helpers.Toy, tmp_path: Path) -> None:
    few = toy.model("qwen3_moe", num_experts=3)
    command = ["train", str(few), *train[2:], "--run", str(tmp_path / "run")]
    assert "the model has 3 experts a layer" in spoken(ranks(*command, count=4))


def test_the_run_directory(train: list[str], tmp_path: Path) -> None:
    held, mine = tmp_path / "held", [*train, "--run", str(tmp_path / "mine")]
    held.mkdir()
    with hold(held / LOCK) or pytest.fail("the lock is free"):
        assert "another process is working in this run directory" in spoken(ranks(*train, "--run", held))
    line = spoken(ranks(*mine, own={1: [*train, "--run", str(tmp_path / "elsewhere")]}))
    assert line == f"rank 1: error: {tmp_path}/elsewhere: rank 1 cannot see it; every machine needs the run directory"
    assert not (tmp_path / "elsewhere").exists()


def test_one_rank_alone_cannot_go_on(train: list[str], tmp_path: Path) -> None:
    train = [*train, "--run", str(tmp_path / "run")]
    line = spoken(ranks(*train, own={1: [train[0], str(tmp_path / "gone"), *train[2:]]}))
    assert line.startswith("rank 1: error:") and f"{tmp_path}/gone" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "WORLD_SIZE = 2, but MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "one"}, "RANK = 'one' in the environment: must be a number; start ranks with torchrun"),
        ({"RANK": 2}, "RANK = 2, WORLD_SIZE = 2, LOCAL_RANK = 0, LOCAL_WORLD_SIZE = 2: no such rank"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http' in the environment: must be a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: must be a number"),
    ],
)
def test_an_environment_of_no_rank(more: dict[str, Any], said: str) -> None:
    """Such a process never meets the others, and says so itself."""
    (ended,) = ranks("train", "model", "--run", "run", count=1, **{"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, **more})
    assert said in spoken([ended])


def test_a_rank_that_was_started_twice() -> None:
    """The second one says so; the others never knew of it, and end as they would have."""
    code = "import os, time\nwho = int(os.environ['RANK'])\ntime.sleep(who / 2)\nos.environ['RANK'] = '0112'[who]\n"
    ended = ranks("demo", count=4, code=code + CODE, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, LOCAL_RANK=0)
    said = "".join(one.stderr for one in ended)
    assert said.count("rank 1 was started twice; give every process a RANK of its own") == 1
    assert said.count("error:") == 2 and all(one.returncode == 2 for one in ended)


def test_one_process_that_a_launcher_started_is_one_process(train: list[str], tmp_path: Path) -> None:
    (ended,) = ranks(*train, "--run", tmp_path / "run", count=1)
    assert ended.returncode == 0 and "the new weights" not in ended.stderr, ended.stderr
    assert (tmp_path / "run" / "adapter" / "edit.safetensors").exists()


# --- what ends ranks in the middle

SIGNALLED = """
import os, threading, time
from pathlib import Path

def send(file, how):
    while not Path(file).exists():
        time.sleep(0.002)
    os.kill(os.getpid(), how)

if os.environ["RANK"] in RANKS:
    threading.Thread(target=send, args=(FILE, HOW), daemon=True).start()
"""
"""Sends the process a signal as soon as a file is there."""


@pytest.mark.parametrize(
    ("who", "how"), [("1", signal.SIGKILL), ("0", signal.SIGKILL), ("01", signal.SIGTERM), ("01", signal.SIGINT)]
)
def test_ranks_that_are_ended_go_on(train: list[str], tmp_path: Path, who: str, how: signal.Signals) -> None:
    run = tmp_path / "run"
    command = [*train, "--set", "steps=6", "--run", str(run)]
    file = run / "checkpoints" / "checkpoint-2" / "complete.json"
    started = SIGNALLED.replace("RANKS", repr(who)).replace("FILE", repr(str(file))).replace("HOW", str(int(how)))
    ended = ranks(*command, code=started + CODE)
    assert all(one.returncode for one in ended), ended
    words = "".join(one.stderr for one in ended)
    if how == signal.SIGINT:
        assert words.count("stopped; finished artefacts stay, run the same command to go on") == 1
    else:
        line = words.splitlines()[-1]
        assert words.count("error:") == 1 and "another rank of this command has gone" in line
        assert re.search(rf"The same command goes on from {run}/checkpoints/checkpoint-\d+$", line), line
        assert usable(run / "checkpoints")[0].step >= 2
    assert "Traceback" not in words
    if how == signal.SIGKILL and who == "1":
        again = ranks(*command)
        assert [one.returncode for one in again] == [0, 0], again
        assert "6 steps" in again[0].stdout and again[1].stdout + again[1].stderr == ""


EXHAUSTED = """
import os, torch
from gtqlora.edits.checkpointing import MetricsCallback

ended, rank = MetricsCallback.on_step_end, os.environ["RANK"]

def on_step_end(self, args, state, control, **more):
    if state.global_step == 3 and rank == WHO:
        torch.empty(2**60, dtype=torch.uint8)
    ended(self, args, state, control, **more)

MetricsCallback.on_step_end = on_step_end
"""
"""Asks for more memory than there is, in the third step."""


@pytest.mark.parametrize("count", [1, 2])
def test_out_of_memory_is_said_with_what_takes_less(train: list[str], tmp_path: Path, count: int) -> None:
    run = tmp_path / "run"
    code = EXHAUSTED.replace("WHO", repr(str(count - 1))) + CODE
    ended = ranks(*train, "--run", run, code=code, count=count)
    line = spoken(ended, code=3)
    assert "out of memory on cpu in step 4" in line or "out of memory on cpu in step 3" in line
    for remedy in ("gradient_checkpointing = true", f"more ranks than {count}", "batch_size = 2"):
        assert remedy in line
    assert line.endswith(f"The same command goes on from {run}/checkpoints/checkpoint-2")
    assert usable(run / "checkpoints")[0].step == 2


STUCK = """
import ctypes, os
from gtqlora.edits.checkpointing import MetricsCallback
from gtqlora.ranks import joining

joining._GRACE = 1.0
ended, rank = MetricsCallback.on_step_end, os.environ["RANK"]

def on_step_end(self, args, state, control, **more):
    ended(self, args, state, control, **more)
    if state.global_step == 3 and rank == "1":
        lock = ctypes.create_string_buffer(64)
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(lock)

MetricsCallback.on_step_end = on_step_end
"""
"""Waits in the third step where no signal is heard, as one waits for a GPU that waits for another; seconds are few."""


def test_a_rank_that_hears_nothing_ends_when_it_is_told_to(train: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = run / "checkpoints" / "checkpoint-2" / "complete.json"
    told = SIGNALLED.replace("RANKS", "'1'").replace("FILE", repr(str(file))).replace("HOW", str(int(signal.SIGTERM)))
    told = told.replace("os.kill(", "time.sleep(2)\n    os.kill(")  # once it is stuck
    line = spoken(ranks(*train, "--run", run, code=STUCK + told + CODE))
    assert re.search(rf"The same command goes on from {run}/checkpoints/checkpoint-[23]$", line), line


def test_ranks_that_do_not_get_on_end(train: list[str], tmp_path: Path) -> None:
    """Nobody tells them to: one hangs, and the other waits for it."""
    run, few = tmp_path / "run", "joining._STILL, joining._TIMES = 3.0, 1.0\n"
    line = spoken(ranks(*train, "--run", run, code=STUCK + few + CODE))
    assert "another rank of this command has gone or does not answer" in line
    assert re.search(rf"The same command goes on from {run}/checkpoints/checkpoint-[23]$", line), line
