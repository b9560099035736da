"""Leave a run by a signal or a time limit, with a checkpoint."""

import os
import signal
import subprocess
import sys
import threading
import time
from subprocess import PIPE

import pytest

from dtr_scale.heartbeat import HEARTBEAT
from tests.support.processes import PATIENCE_SECONDS, free_port, wait_for
from tests.support.runs import BATCH, DEMO, ROOT, SINGLE, SMALL, TINY, journal, status, tiny, train


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(digits, tmp_path, number):
    run_dir, long = tmp_path / "run", (*BATCH, "--train.max_steps=1000000")

    def send_when_training():
        path = run_dir / "journal.jsonl"
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    assert train(digits, run_dir, *long) == 75
    sender.join()
    left = status(run_dir)
    assert (left["outcome"], left["reason"]) == ("preempted", number.name)
    last = int(journal(run_dir)[-1]["step"])
    assert left["step"] == last
    further = last + 2
    assert train(digits, run_dir, *BATCH, f"--train.max_steps={further}") == 0
    assert [record["step"] for record in journal(run_dir)] == list(range(1, further + 1))
    assert status(run_dir)["outcome"] == "finished"


def test_a_signal_to_one_rank_before_torch_is_imported_makes_all_leave(digits, tmp_path, popen):
    """Nothing is trained yet, so there is nothing to save; the same command goes on."""
    run_dir, beats = tmp_path / "run", [tmp_path / f"beat-{rank}" for rank in range(2)]
    split = ("--engine.type=fsdp2", "--engine.precision=fp32", "--train.micro_batch_size=16")
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={run_dir}")
    # As on two nodes, each of which has a heartbeat.
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        popen(
            [sys.executable, "launch/train.py", *places, *SMALL, *TINY, *split],
            cwd=ROOT, env=os.environ | launched | {"RANK": str(rank), HEARTBEAT: str(beat)},
        )
        for rank, beat in enumerate(beats)
    ]  # fmt: skip
    wait_for(beats[1].exists)
    ranks[1].terminate()
    assert [rank.wait(PATIENCE_SECONDS) for rank in ranks] == [75, 75]
    left = status(run_dir)
    assert (left["outcome"], left["reason"], left["step"]) == ("preempted", "SIGTERM", 0)
    assert left["saved_step"] is None and not list((run_dir / "checkpoints").glob("step_*"))
    assert tiny(digits, run_dir) == 0
    assert [record["step"] for record in journal(run_dir)] == [1, 2, 3, 4]


def test_a_second_interrupt_leaves_no_heartbeat_behind(tmp_path, popen):
    beat = tmp_path / "beat"
    command = [sys.executable, "launch/train.py", "--config", str(DEMO)]
    process = popen(command, cwd=ROOT, env=os.environ | {HEARTBEAT: str(beat)}, stderr=PIPE)
    wait_for(beat.exists)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "leaving" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_SECONDS) == 130
    assert not beat.exists()


# Trains with saves that hang, and with a loop that fails at step 5 if asked to.
HANGING = """
import sys, time
from dtr_scale.checkpoint import manager, snapshot
from dtr_scale.train import trainer
from dtr_scale.cli.main import main
snapshot.Snapshot.entry = lambda self, file: time.sleep(600)
manager._LAST_SAVE_SECONDS = 0.5
if sys.argv.pop(1) == "fail":
    trainer.Trainer._conclude = lambda self, results, *told: 1 / (6 - results[0].step) < 0
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("ending", ["interrupt", "fail"])
def test_a_save_that_hangs_does_not_keep_the_process(digits, tmp_path, ending):
    """Neither after a second Ctrl-C, during the last save, nor after an exception in the loop."""
    every = (*SMALL, *SINGLE, *BATCH, "--checkpoint.every_steps=5", "--train.max_steps=1000000")
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={tmp_path}")
    command = [sys.executable, "-c", HANGING, ending, *places, *every]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    told, watchdog = [], threading.Timer(60, process.kill)
    watchdog.start()
    for line in process.stderr:
        told.append(line)
        if ending == "interrupt" and ("step 4/" in line or "leaving after this step" in line):
            time.sleep(0.5)  # by then the loop waits for a save
            process.send_signal(signal.SIGINT)
    with process:
        code = process.wait()
    watchdog.cancel()
    assert code == (130 if ending == "interrupt" else 1), "".join(told)
    if ending == "fail":
        assert "ZeroDivisionError" in told[-1]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_a_time_limit_makes_a_run_save_and_leave(digits, tmp_path):
    assert tiny(digits, tmp_path, "--train.max_minutes=0.000001") == 75
    assert status(tmp_path)["outcome"] == "preempted"
    assert status(tmp_path)["reason"] == "train.max_minutes = 1e-06 are over"
    assert (tmp_path / "checkpoints" / "step_00000001" / "COMPLETE").exists()
    assert tiny(digits, tmp_path) == 0
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 3, 4]
