"""A run in which one rank fails ends everywhere, although the others wait for it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.engines.peers import Failure, PeerWatch, end_at_exit
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
    run_module.PeerWatch = lambda world, end: original(world, end=end, grace_seconds=2)
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
    os._exit(0 if ended == [Failure("rank 1: no sign of life for 3 s")] else 1)


@pytest.mark.slow
def test_a_rank_that_shows_no_sign_of_life_has_failed():
    assert exit_codes(2, silent_rank) in ([0, 0], [0, 1])  # rank 1 wakes to a world that ended


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
    watch._closing.wait = lambda timeout=None: False
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
