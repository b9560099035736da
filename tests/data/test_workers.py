"""Workers are not started where what they share with the main process has no room."""

import os
import subprocess
import sys

import pytest

from tests.support.runs import DEMO, SINGLE, SMALL

TRAIN = [
    sys.executable, "-m", "dtr_scale", "train", "--config", str(DEMO),
    *SMALL, *SINGLE, "--data.num_workers=2",
]  # fmt: skip


def test_a_small_dev_shm_is_refused_with_numbers_before_the_first_batch(digits, tmp_path):
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    command = ["unshare", "-m", "bash", "-c", f'{mount} || exit 77; exec "$@"', "-", *TRAIN]
    command += [f"--data.shards={digits}", f"--run_dir={tmp_path}/run"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip("needs the right to mount a disk")
    assert ran.returncode == 2, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "error: " in line]
    assert "MB of /dev/shm, 1.0 of its 1.0 MB are free; fix: " in line
    assert "--shm-size=" in line
    assert "lower data.num_workers (now 2) or train.micro_batch_size" in line
    assert "Traceback" not in ran.stderr
