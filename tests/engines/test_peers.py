"""A run in which one rank fails ends everywhere, although the others wait for it."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.engines import peers
from dtr_scale.engines import place as place_module
from dtr_scale.engines.peers import Failure, PeerWatch, end_at_exit
from dtr_scale.engines.place import Place, Position
from dtr_scale.engines.stacks import Stacks
from dtr_scale.engines.world import World, join_world
from dtr_scale.jobs import train as run_module
from dtr_scale.train.trainer import Trainer
from tests.support.ranks import exit_codes, run_on_ranks
from tests.support.runs import DEMO, SMALL


def train_with_a_failure(digits: Path, run_dir: Path) -> None:
    """Runs on each rank: rank 1 fails in its third step, rank 0 waits as NCCL would."""
    rank, train_step = int(os.environ["RANK"]), Trainer._train_step

    def faulty(self, *args):
        if self.step == 2 and rank == 1:
            raise KeyError("a bug on rank 1")
        if self.step == 2:
            time.sleep(600)
        return train_step(self, *args)

    patched: Any = Trainer
    patched._train_step = faulty
    original = run_module.PeerWatch
    run_module.PeerWatch = lambda world, **ends: original(world, **ends, grace_seconds=2)
    arguments = [
        *SMALL,
        f"--data.shards={digits}",
        f"--run_dir={run_dir}",
        "--engine.precision=fp32",
    ]
    os._exit(main(["train", "--config", str(DEMO), *arguments]))


@pytest.mark.slow
def test_an_exception_on_one_rank_ends_all(digits, tmp_path, capfd):
    started = time.monotonic()
    codes = exit_codes(2, train_with_a_failure, digits, tmp_path)
    assert time.monotonic() - started < 90
    assert codes == [1, 1]
    status = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert status["outcome"] == "failed"
    assert "a bug on rank 1" in status["reason"]
    assert "another rank failed: rank 1: 'a bug on rank 1'" in capfd.readouterr().err


def silent_rank() -> None:
    """Runs on each rank: rank 1 is stopped for a while, rank 0 tells why it would end."""
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    PeerWatch(world, end=ended.append, interval_seconds=0.2, grace_seconds=0.2, silence_seconds=3)
    if world.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.1)
    told = "rank 1 on {}: no sign of life for 3 s: it is stopped, or something holds its GIL"
    os._exit(0 if ended == [Failure(told.format(socket.gethostname()))] else 1)


@pytest.mark.slow
def test_a_rank_that_shows_no_sign_of_life_has_failed():
    assert exit_codes(2, silent_rank) in ([0, 0], [0, 1])  # rank 1 wakes to a world that ended


def killed_rank() -> None:
    """Runs on each rank: the kernel tells of the end of rank 1, without any silence."""
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    PeerWatch(world, end=ended.append, grace_seconds=0.2)
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    killed_at = time.monotonic()
    while not ended and time.monotonic() - killed_at < 60:
        time.sleep(0.01)
    (failure,) = ended
    known = failure.reason.startswith(f"rank 1 on {socket.gethostname()} is gone: it was killed")
    os._exit(0 if known and time.monotonic() - killed_at < 5 else 1)


def test_a_killed_rank_is_known_at_once():
    assert exit_codes(3, killed_rank) == [0, -signal.SIGKILL, 0]


def hung_rank(folder: Path) -> None:
    """Runs on each rank: steps of 20 ms, then rank 1 stays in its forward and rank 0 waits."""
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    watch = PeerWatch(world, end=ended.append, interval_seconds=0.2, grace_seconds=0.2)
    place, stacks = Place(), Stacks(folder, world.rank)
    watch.follow(place, stacks)
    place_module._FLOOR_SECONDS = 3.0  # pyright: ignore[reportConstantRedefinition]
    for step in range(1, 20):
        for section in ("data", "forward", "backward", "update"):
            place.enter(section)
            if step == 9 and section == ("forward" if world.rank == 1 else "backward"):
                deadline = time.monotonic() + 60
                while not ended and time.monotonic() < deadline:
                    time.sleep(0.1)
                stacks.close()
                hung = f"rank 1 on {socket.gethostname()}: hung for "
                known = [f.reason.startswith(hung) and "step 9, forward" in f.reason for f in ended]
                os._exit(0 if known == [True] else 1)
        time.sleep(0.02)
        place.end_step(step)
        if step == 5:
            place.enter("evaluation")
            time.sleep(5)  # longer than a step may take


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_named_and_all_write_their_stacks(tmp_path):
    assert exit_codes(2, hung_rank, tmp_path) == [0, 0]
    for rank in (0, 1):
        (title, *stack) = (tmp_path / f"rank_{rank:05d}.txt").read_text().strip().splitlines()
        assert f" rank {rank}, pid " in title and "hung for" in title
        assert any("in hung_rank" in line for line in stack)


def holds_the_gil(folder: Path) -> None:
    """Runs on each rank: rank 1 holds its GIL for good, in steps."""
    peers._STEP_SILENCE_SECONDS = 3.0  # pyright: ignore[reportConstantRedefinition]
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    watch = PeerWatch(world, end=ended.append, interval_seconds=0.2, grace_seconds=0.2)
    place = Place()
    watch.follow(place, Stacks(folder, world.rank))
    for step in range(1, 9):
        place.enter("forward")
        time.sleep(0.05)
        place.end_step(step)
    if world.rank == 1:
        time.sleep(0.5)
        ctypes.PyDLL(None).sleep(600)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.1)
    told = ": no sign of life for 3 s: it is stopped, or something holds its GIL"
    os._exit(0 if [told in failure.reason for failure in ended] == [True] else 2)


@pytest.mark.slow
def test_a_rank_whose_gil_is_held_writes_its_stacks_and_ends_by_itself(tmp_path):
    assert exit_codes(2, holds_the_gil, tmp_path) == [0, 1]
    assert "in holds_the_gil" in (tmp_path / "rank_00001.txt").read_text()


def test_a_limit_is_learnt_from_steps_without_what_may_take_any_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(place_module.time, "monotonic", lambda: now[0])
    place = Place()
    for step in range(1, 8):
        assert place.limit_seconds is None
        for section, seconds in (("data", 50), ("forward", 4), ("save", 30), ("update", 6)):
            place.enter(section)
            now[0] += seconds if step > 2 else 900  # the first steps compile
        place.end_step(step)
    assert place.limit_seconds == 35
    place.enter("data")
    assert place.position.is_exempt
    now[0] += 601
    assert not place.position.is_exempt


def lost_main() -> None:
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    PeerWatch(world, end=ended.append, interval_seconds=0.2, grace_seconds=0.2)
    if world.rank == 0:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.1)
    os._exit(0 if [failure.reason[:14] for failure in ended] == ["rank 0 is gone"] else 1)


def test_losing_rank_0_ends_the_others():
    assert exit_codes(2, lost_main) == [-signal.SIGKILL, 0]


def quiet_end() -> list[Failure]:
    world = join_world(needs_process_group=True)
    ended: list[Failure] = []
    watch = PeerWatch(world, end=ended.append, interval_seconds=0.1, grace_seconds=0.1)
    time.sleep(1)
    world.barrier()
    watch.close()
    world.leave()
    time.sleep(0.5)
    return ended


def test_a_watch_that_is_closed_ends_nobody():
    assert run_on_ranks(2, quiet_end) == [[], []]


def failed_rank() -> None:
    """Runs on each rank: it leaves while its watch is in the store, as it always is here."""
    world = join_world(needs_process_group=True)
    watch = PeerWatch(world, end=lambda failure: None, interval_seconds=0, grace_seconds=100)
    watch._closing.is_set = lambda: False
    time.sleep(0.5)
    end_at_exit(7)


def test_a_rank_that_has_failed_ends_with_its_exit_code_whatever_its_threads_do():
    assert exit_codes(2, failed_rank) == [7, 7]


def test_one_process_has_no_peers():
    watch = PeerWatch(
        World(0, 0, 1, torch.device("cpu")), end=lambda failure: pytest.fail(failure.reason)
    )
    watch.post("anything")
    assert watch.failure() is None
    watch.close()


def test_a_silent_rank_that_told_of_its_start_alone_is_judged_as_in_steps():
    """Many short steps fit between two signs of life."""
    watch = PeerWatch(World(0, 0, 1, torch.device("cpu")), end=lambda failure: None)
    place = watch._place
    start = Position(1, "start", 0, 0.0)
    assert watch._patience(start) == 120
    for step in range(1, 11):
        place.enter("forward")
        place.end_step(step)
    place.enter("evaluation")
    assert watch._patience(start) == 120
    place.enter("forward")
    assert watch._patience(start) == 20
    assert watch._patience(Position(40, "evaluation", 10, 0.0)) == 120
