"""What happens to long runs: kills, full disks, stores that are away, damaged checkpoints.

Two real ranks each, started as a launcher would start them.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dtr_scale.cli.main import main
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import CheckpointError
from dtr_scale.jobs import train as run
from dtr_scale.storage.folder import open_folder
from tests.support.ceph import CephServer
from tests.support.disks import fill, small_disk
from tests.support.processes import PATIENCE_SECONDS, free_port
from tests.support.ranks import run_on_ranks, start_ranks
from tests.support.runs import DEMO, ROOT, SMALL, demo_experiment, journal, status, steps_in

ENDLESS = "--train.max_steps=1000000"
TWO_RANKS = (
    *SMALL, "--engine.precision=fp32", "--train.global_batch_size=32",
    "--train.micro_batch_size=16", "--evaluation.every_steps=0",
)  # fmt: skip


class Job:
    """Two ranks of one training; their output goes to a file."""

    def __init__(self, digits: Path, run_dir: Path, *overrides: str) -> None:
        self.run_dir = run_dir
        self._output = run_dir.parent / f"{run_dir.name}.txt"
        places = (f"--data.shards={digits}", f"--run_dir={run_dir}")
        self.ranks: Sequence[Any] = self._start(
            ["--config", str(DEMO), *TWO_RANKS, *places, *overrides]
        )

    def _start(self, arguments: list[str]) -> Sequence[Any]:
        port = str(free_port())
        with self._output.open("w") as output:
            return [
                subprocess.Popen(
                    [sys.executable, "launch/train.py", *arguments],
                    cwd=ROOT,
                    stdout=output,
                    stderr=output,
                    env=os.environ
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                    | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
                    | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                )
                for rank in range(2)
            ]

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.output
            assert all(self._code(rank) is None for rank in self.ranks), self.output
            time.sleep(0.002)

    def exit_codes(self) -> list[int | None]:
        for rank in self.ranks:
            self._join(rank)
        return [self._code(rank) for rank in self.ranks]

    def _code(self, rank: Any) -> int | None:
        return rank.poll()

    def _join(self, rank: Any) -> None:
        rank.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
        self.exit_codes()


class ForkedJob(Job):
    """The same, but forked from a process that has imported torch: 5 s earlier in training."""

    def _start(self, arguments: list[str]) -> Sequence[Any]:
        self._output.write_text("")  # the last job's
        return start_ranks(2, train_as_command, self._output, arguments)

    def _code(self, rank: Any) -> int | None:
        return rank.exitcode

    def _join(self, rank: Any) -> None:
        rank.join(PATIENCE_SECONDS)


def train_as_command(output: Path, arguments: list[str]) -> None:
    """Runs on each rank."""
    with output.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    run._PEER_SECONDS = 0.5  # the time that a rank which was killed leaves unused
    sys.exit(main(["train", *arguments]))


@pytest.fixture
def start(digits):
    """Start a job; whatever is left of it is killed at the end."""
    jobs: list[Job] = []

    def start_job(run_dir, *overrides, kind=Job):
        jobs.append(kind(digits, run_dir, *overrides))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


def saving(run_dir: Path) -> list[Path]:
    """Return the folder of a save in flight, or of one that was cut off."""
    return list(run_dir.glob("checkpoints/.step_*.tmp"))


def assert_told(job: Job, victims: list[int]) -> None:
    """The rank that is left, if there is one, has told why it failed."""
    codes = job.exit_codes()
    assert codes == [-signal.SIGKILL if rank in victims else 1 for rank in range(2)], job.output
    if len(victims) == 1:
        assert (left := status(job.run_dir))["outcome"] == "failed" and left["reason"]
    if victims == [0]:
        assert job.output.count("rank 0 is gone: it was killed, or its node is lost") == 1


def kill_while_it_starts(job: Job, moment: random.Random) -> str:
    seconds = moment.uniform(0, 3)
    time.sleep(seconds)
    job.kill()
    return f"{seconds:.1f} s after the start"


def kill_after_some_steps(
    job: Job, moment: random.Random, seconds_into_a_save: float | None
) -> str:
    """Kill -9 one rank or both; return what was hit."""
    job.wait_until(lambda: "resumed" in job.output or steps_in(job.run_dir))
    before = steps_in(job.run_dir)
    job.wait_until(lambda: steps_in(job.run_dir) > before + 1)
    time.sleep(moment.uniform(0, 0.5))
    if seconds_into_a_save is not None:
        job.wait_until(lambda: saving(job.run_dir))
        time.sleep(seconds_into_a_save)
    victims = moment.choice([[0], [1], [0, 1]])
    for victim in victims:
        job.ranks[victim].kill()
    job.exit_codes()  # a rank that is left alone ends by itself
    assert_told(job, victims)
    return f"rank {' and '.join(map(str, victims))}{', in a save' if saving(job.run_dir) else ''}"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_rank_that_is_left_tells_that_the_run_has_failed(start, tmp_path, victim):
    job = start(tmp_path / "run", ENDLESS)
    job.wait_until(lambda: steps_in(job.run_dir) > 2)
    job.ranks[victim].kill()
    assert_told(job, [victim])
    left = status(job.run_dir)
    assert left["step"] == steps_in(job.run_dir)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_writes_the_journal_of_one_left_in_peace(
    start, tmp_path, capsys
):
    """Every step saves, so kills hit saves, too; every other one waits for one to begin."""
    start = partial(start, kind=ForkedJob)
    seed = random.randrange(10**6)
    moment = random.Random(seed)
    often = ("--checkpoint.every_steps=1", "--model.hidden_size=128", "--model.depth=4")
    run_dir = tmp_path / "run"
    hits, reached = [], 0
    for number in range(20):
        job = start(run_dir, *often, ENDLESS)
        if number % 4 == 2:
            hits.append(kill_while_it_starts(job, moment))
        else:
            late = moment.uniform(0, 0.03) if number > 1 else 0.0  # the second surely hits one
            seconds_into_a_save = late if number % 2 else None
            hits.append(kill_after_some_steps(job, moment, seconds_into_a_save))
        reached = steps_in(run_dir)
        hits[-1] += f", at step {reached}"
    with capsys.disabled():
        print(f"\nkilled with seed {seed}: {'; '.join(hits)}")
    assert any("in a save" in hit for hit in hits)
    end = f"--train.max_steps={reached + 5}"
    job = start(run_dir, *often, end)
    assert job.exit_codes() == [0, 0], job.output
    assert "resumed" in job.output
    through = start(tmp_path / "through", *often, end, "--checkpoint.every_steps=1000000")
    assert through.exit_codes() == [0, 0], through.output
    assert journal(run_dir) == journal(tmp_path / "through")
    assert [record["step"] for record in journal(run_dir)] == list(range(1, reached + 6))
    assert not saving(run_dir)


class FullDisk:
    """A disk of three checkpoints' size, filled up and cleared again."""

    def __init__(self, path: Path) -> None:
        self.place = str(path / "checkpoints")
        self.overrides: tuple[str, ...] = ()
        self._filler = path / "filler"

    def begin(self) -> None:
        fill(self._filler)

    def end(self) -> None:
        self._filler.unlink()


class StoreAway:
    """The object store, stopped and started again."""

    def __init__(self, server: CephServer, url: str) -> None:
        self.place = url
        self.overrides = ('--data.storage_options={"max_attempts": 1}',)
        self.begin = server.stop
        self.end = server.start


@pytest.fixture(params=["disk_full", pytest.param("store_away", marks=pytest.mark.services)])
def outage(request, tmp_path):
    if request.param == "disk_full":
        with small_disk(tmp_path / "disk", 3 * 2**20):
            yield FullDisk(tmp_path / "disk")
        return
    server, url = request.getfixturevalue("s3_server"), request.getfixturevalue("s3_url")
    yield StoreAway(server, url)
    server.stop()
    server.start()


@pytest.mark.slow
def test_training_goes_on_through_an_outage_and_stops_after_too_many_failures(
    start, tmp_path, outage
):
    run_dir, place = tmp_path / "run", open_folder(outage.place)
    settings = (
        *outage.overrides, f"--checkpoint.dir={outage.place}", "--checkpoint.every_steps=20",
        "--checkpoint.keep_last=1", ENDLESS,
    )  # fmt: skip

    def saved_steps() -> list[str]:
        return [name for name in place.names() if place.exists(f"{name}/COMPLETE")]

    job = start(run_dir, *settings, "--checkpoint.max_failures=1000000")
    job.wait_until(lambda: "step 100/" in job.output)
    before = saved_steps()
    assert before
    outage.begin()
    job.wait_until(lambda: job.output.count("is not saved, training goes on: cannot save") >= 2)
    outage.end()
    failed = job.output.count("is not saved")
    job.wait_until(lambda: set(saved_steps()) - set(before))
    job.ranks[1].send_signal(signal.SIGTERM)
    assert job.exit_codes() == [75, 75], job.output
    assert "Traceback" not in job.output
    assert job.output.count("is not saved") <= failed + 1, "told once per failure, by rank 0"

    job = start(run_dir, *settings, "--checkpoint.max_failures=3")
    resumed = status(run_dir)["step"]
    job.wait_until(lambda: "resumed" in job.output and "step " in job.output)
    outage.begin()
    assert job.exit_codes() == [1, 1], job.output
    outage.end()
    assert job.output.count("is not saved") == 3
    assert job.output.count("error: 3 saves in a row failed, checkpoint.max_failures") == 1
    assert "Traceback" not in job.output
    left = status(run_dir)
    assert left["outcome"] == "failed" and "3 saves in a row failed" in left["reason"]
    assert left["step"] > resumed


@pytest.mark.slow
def test_a_full_disk_that_holds_all_of_a_run_ends_it_only_with_the_run(start, tmp_path):
    """Journal, status and checkpoints on one disk, as they are unless told otherwise."""
    run_dir, endure = tmp_path / "run", "--checkpoint.max_failures=1000000"
    settings = ("--checkpoint.every_steps=20", "--checkpoint.keep_last=1")
    with small_disk(run_dir, 3 * 2**20):
        disk = FullDisk(run_dir)
        job = start(run_dir, *settings, endure, ENDLESS)
        job.wait_until(lambda: "step 50/" in job.output)

        def is_felt() -> bool:
            disk.begin()  # again and again: a save in flight makes room when it retires another
            told = "journal.jsonl cannot be written, training goes on" in job.output
            return told and job.output.count("is not saved, training goes on") >= 2

        job.wait_until(is_felt)
        disk.end()
        job.wait_until(lambda: "journal.jsonl is written again, and complete" in job.output)
        job.ranks[1].send_signal(signal.SIGTERM)
        assert job.exit_codes() == [75, 75], job.output
        assert job.output.count("journal.jsonl cannot be written") == 1
        assert "Traceback" not in job.output
        left = status(run_dir)
        assert left["outcome"] == "preempted"
        steps = [record["step"] for record in journal(run_dir)]
        assert steps == list(range(1, left["step"] + 1))


def cut(checkpoint: Path) -> None:
    path = checkpoint / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def alter_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "rank_00001.safetensors").unlink()


def keep_the_mark_alone(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        if path.name != "COMPLETE":
            path.unlink()


DAMAGES = {
    cut: "rank_00001.safetensors has",
    alter_a_byte: "rank_00000.safetensors is damaged in bytes",
    lose_a_file: "rank_00001.safetensors is missing",
    keep_the_mark_alone: "index.json is missing",
}


class Staying(World):
    """DeepSpeed and gloo cannot be taken down and set up again in one process."""

    def leave(self) -> None: ...


def damaged_starts(digits: Path, place: Path) -> dict[str, list[str]]:
    """Runs on two ranks: what starts tell after damage to the newest checkpoint and to all."""
    world = join_world(needs_process_group=True)
    staying = Staying(**vars(world))
    run.join_world = lambda **_: staying
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("dtr_scale").addHandler(handler)
    logging.getLogger("dtr_scale").setLevel(logging.INFO)
    steps = ("--train.max_steps=4", "--checkpoint.every_steps=2")

    def start(name: str, *overrides: str) -> list[str]:
        told.clear()
        try:
            code = run.train_experiment(
                demo_experiment(digits, place / name, *TWO_RANKS, *steps, *overrides)
            )
        except CheckpointError as error:
            return [*told, f"error: {error}"]
        return [*told, f"exit {code}"]

    start("whole")
    outcomes = {}
    for damage in DAMAGES:
        name, checkpoints = damage.__name__, place / damage.__name__ / "checkpoints"
        if world.is_main:
            shutil.copytree(place / "whole", place / name)
            damage(checkpoints / "step_00000004")
        world.barrier()
        outcomes[name] = start(name)
        if world.is_main:
            for checkpoint in checkpoints.glob("step_*"):
                damage(checkpoint)
        world.barrier()
        outcomes[f"{name}, all"] = start(name)
    outcomes["afresh"] = start(cut.__name__, "--checkpoint.resume=never")
    world.leave()
    return outcomes


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken_or_none(digits, tmp_path):
    told, told_rank_1 = run_on_ranks(2, damaged_starts, digits, tmp_path)
    whole = journal(tmp_path / "whole")
    for damage, message in DAMAGES.items():
        lines = told[damage.__name__]
        (warning,) = [line for line in lines if "passed over" in line]
        assert f"step_00000004: {message}" in warning
        assert any("step_00000002 at step 2" in line for line in lines)
        assert lines[-1] == "exit 0"
        lines = told[f"{damage.__name__}, all"]
        assert [line for line in lines if "passed over" in line and message in line][1:]
        assert lines[-1].startswith("error: none of the 2 checkpoints in ")
        assert lines[-1].endswith("start afresh on purpose with --checkpoint.resume=never")
        assert journal(tmp_path / damage.__name__) == whole
    for name, lines in told_rank_1.items():
        assert lines[-1] == told[name][-1], "all ranks end alike"
    assert told["afresh"][-1] == "exit 0"
    assert any("the earlier run was moved to" in line for line in told["afresh"])
    (replaced,) = (tmp_path / cut.__name__).glob("replaced_*")
    assert journal(replaced) == whole
