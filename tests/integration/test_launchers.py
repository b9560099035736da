"""The command that users type, with the real launcher and several processes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.support.processes import free_port, wait_for
from tests.support.runs import DEMO, ROOT, SINGLE, SMALL, TIMINGS, journal, status, steps_in, train

DEEPSPEED = Path(sysconfig.get_path("scripts")) / "deepspeed"
STEPS = ("--train.max_steps=20", "--train.log_every=1")
STEPS_500 = ("--train.max_steps=500", "--train.global_batch_size=16")


@pytest.fixture
def launch(digits, popen):
    """Start `deepspeed launch/train.py` on the demo, or plain Python where `ranks` is 0.

    `script` comes before the command.
    """

    def start(run_dir, *overrides, ranks=2, config=DEMO, script=()):
        # Other jobs of this machine may have the default port.
        port = ("--master_port", str(free_port()))
        several = [str(DEEPSPEED), "--num_gpus", str(ranks), *port]
        launcher = several if ranks else [sys.executable]
        command = [
            *script, *launcher, "launch/train.py", "--config", str(config),
            f"--data.shards={digits}", f"--run_dir={run_dir}", *overrides,
        ]  # fmt: skip
        return popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    return start


def ranks_of(launcher):
    """Return the pids of a launcher's training processes."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--no-headers", "-g", str(os.getpgid(launcher.pid))],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    lines = [line.split(None, 1) for line in listed]
    return [int(pid) for pid, args in lines if "--local_rank=" in args]


def test_a_mistake_is_all_that_is_told_under_our_torchrun(tmp_path):
    """No table and no traceback of the launcher hides what the ranks say."""
    (tmp_path / "typo.json").write_text('{"name": "x", "modl": 1}')
    command = [sys.executable, "launch/torchrun.py", "--nproc_per_node", "2", "launch/train.py"]
    told = subprocess.run(
        [*command, "--config", str(tmp_path / "typo.json")],
        cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())},
    )  # fmt: skip
    assert told.returncode == 2
    assert [line.partition("typo.json: ")[2] for line in told.stdout.splitlines()] == [
        "model is missing", "data is missing", "unknown key modl; did you mean model?",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_of_zero1_write_the_journal_of_one_process(digits, tmp_path, launch):
    """20 steps of the demo as it is, but for fp32, single against ZeRO-1: 1e-4 relative."""
    fp32 = ("--engine.precision=fp32", "--tracking.type=none")
    plain = ("--model.hidden_size=128", "--model.depth=4")
    launched = launch(tmp_path / "zero1", *STEPS, *fp32, "--train.micro_batch_size=32")
    output, _ = launched.communicate(timeout=240)
    assert launched.returncode == 0, output
    assert train(digits, tmp_path / "single", *plain, *STEPS) == 0
    found, expected = journal(tmp_path / "zero1"), journal(tmp_path / "single")
    assert len(found) == 20
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    output_lines = output.splitlines()
    assert sum("step 20/20" in line for line in output_lines) == 1, "only rank 0 reports"
    # But for the launcher's, which have a date, there is no line that is not ours.
    ours = [line for line in output_lines if not line.startswith("[20")]
    assert all(re.match(r"\d\d:\d\d:\d\d \w", line) for line in ours), output


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_mlflow_run(digits, tmp_path, launch):
    """kill -9 of every process; started again, the journal is that of a run left in peace."""
    often = (*SMALL, *SINGLE, *STEPS_500, "--checkpoint.every_steps=7", "--tracking.type=mlflow")
    run_dir = tmp_path / "run"
    killed = launch(run_dir, *often, ranks=0)
    wait_for(lambda: (run_dir / "mlflow.json").exists() and steps_in(run_dir) > 12, killed)
    # A moment that is nobody's: in the middle of a step, a save, or a message to MLflow.
    time.sleep(random.random())
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = json.loads((run_dir / "mlflow.json").read_text())
    again = launch(run_dir, *often, ranks=0)
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "resumed " in output
    assert json.loads((run_dir / "mlflow.json").read_text()) == before
    assert train(digits, tmp_path / "through", *STEPS_500) == 0
    assert journal(run_dir) == journal(tmp_path / "through")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(before["run_id"]).info.status == "FINISHED"
    logged = [point.step for point in client.get_metric_history(before["run_id"], "train/loss")]
    assert logged == list(range(1, 501)), "each step once"


@pytest.mark.slow
def test_one_rank_asked_to_leave_takes_all_along(tmp_path, launch):
    run_dir = tmp_path / "run"
    launched = launch(run_dir, *SMALL, "--train.max_steps=100000")
    wait_for(lambda: steps_in(run_dir) >= 3, launched)
    os.kill(max(ranks_of(launched)), signal.SIGTERM)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 75, output
    left = status(run_dir)
    assert (left["outcome"], left["reason"]) == ("preempted", "SIGTERM")
    assert journal(run_dir)[-1]["step"] == left["step"]
    assert (run_dir / "checkpoints" / f"step_{left['step']:08d}" / "COMPLETE").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"),
    [
        ((), signal.SIGTERM),
        (("bash", "-c", 'export DTR_SCALE_LAUNCHER_PID=$$; "$@"; :', "bash"), signal.SIGKILL),
    ],
    ids=["deepspeed", "script"],
)
def test_ranks_leave_when_their_launcher_is_gone(tmp_path, launch, script, number):
    """SIGTERM to the `deepspeed` command, which hands nothing on; kill -9 of a launch script."""
    run_dir = tmp_path / "run"
    launched = launch(run_dir, *SMALL, "--train.max_steps=100000", script=script)
    wait_for(lambda: steps_in(run_dir) >= 3, launched)
    launched.send_signal(number)
    output, _ = launched.communicate(timeout=120)  # the ranks have it, too
    assert launched.returncode == -number
    left = status(run_dir)
    assert (left["outcome"], left["reason"]) == ("preempted", "the launcher is gone"), output
    assert (run_dir / "checkpoints" / f"step_{left['step']:08d}" / "COMPLETE").exists()


@pytest.mark.slow
def test_a_mistake_is_told_once_without_a_traceback(tmp_path, launch):
    launched = launch(tmp_path / "run", "--engine.zero_stge=1")
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 2
    assert output.count("unknown key engine.zero_stge; did you mean engine.zero_stage?") == 1
    assert "Traceback" not in output


@pytest.mark.slow
def test_what_only_ranks_can_know_is_told_once(tmp_path, launch):
    """The manifest is read when all ranks are up: all of them fail, rank 0 says why."""
    launched = launch(tmp_path / "run", f"--data.shards={tmp_path}/nothing")
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 2
    assert output.count("manifest.json is missing") == 1, output
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_altered_shard_is_told_in_one_line_whichever_rank_meets_it(digits, tmp_path, launch):
    place, run_dir = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, place)
    shard = place / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(bytes(data))
    launched = launch(run_dir, *SMALL, f"--data.shards={place}")
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 2, output
    assert "Traceback" not in output, output
    assert "train-000001.tar" in status(run_dir)["reason"]
    assert status(run_dir)["outcome"] == "failed"


@pytest.mark.slow
def test_the_flagship_steps_twice_on_a_cpu(tmp_path, launch):
    """The real 458M network is built, compiled, wrapped by ZeRO-1 in bf16 and stepped."""
    launched = launch(
        tmp_path / "run", "--data.type=synthetic", "--train.max_steps=2",
        "--train.global_batch_size=8", "--train.micro_batch_size=4", "--train.log_every=1",
        "--evaluation.every_steps=0", "--tracking.type=none",
        "--data.num_workers=1",
        config=ROOT / "configs" / "dit_l_dtr_antuw.json", ranks=1,
    )  # fmt: skip
    output, _ = launched.communicate(timeout=540)
    assert launched.returncode == 0, output
    assert "DiT-L/2, 45" in output
    records = journal(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    assert TIMINGS.isdisjoint(records[0])
    # adaLN-Zero: the first output is zero, so the first error is that of predicting no noise.
    assert records[0]["mse"] == pytest.approx(1.0, abs=0.02)
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "COMPLETE").exists()
