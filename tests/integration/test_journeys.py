"""The first hour of new users: the README's commands, as they are typed, in an empty folder."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import shapes, small_autoencoder
from tests.support.processes import free_port
from tests.support.runs import ROOT, journal, status

pytestmark = pytest.mark.slow

# What the README's commands are given besides, so that they take seconds.
SHORT = (
    "--train.max_steps=40 --train.global_batch_size=16 --train.micro_batch_size=16 "
    "--checkpoint.every_steps=20 --evaluation.every_steps=40 --evaluation.num_samples=6 "
    "--evaluation.num_sampling_steps=4 --tracking.type=none"
)


@pytest.fixture
def typed(tmp_path):
    """Return what types a command in an empty folder beside `launch/`, and returns what it said."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = os.environ | {
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hub"),
    }

    def run(command: str) -> str:
        told = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert told.returncode == 0, f"{command}\n{told.stdout}"
        assert "Traceback" not in told.stdout
        return told.stdout

    return run


def in_the_cache(home: Path, name: str) -> None:
    """Put a small autoencoder where the hub's client keeps the one that data is encoded by."""
    cached = home / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    small_autoencoder(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)


def readme_commands(heading: str) -> list[str]:
    """Return the commands below a heading of the README."""
    section = (ROOT / "README.md").read_text().partition(f"## {heading}\n")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.S)
    assert block
    return [line.partition("  #")[0].strip() for line in block[1].splitlines()]


def test_own_pictures_by_the_four_commands_of_the_readme(tmp_path, typed):
    prepare, init, train, sample = readme_commands("Your own pictures")
    shapes(tmp_path / "PICTURES", 30)
    in_the_cache(tmp_path / "hub", "stabilityai/sd-vae-ft-ema")

    assert "train: 90 samples in 1 shards" in typed(f"{prepare} --size 64")

    told = typed(init)
    assert "with DTR and ANT-UW" in told and f"next: {train}" in told
    assert len((tmp_path / "mine.json").read_text().splitlines()) < 26

    port = f"deepspeed --master_port {free_port()} "
    log = typed(f"{train.replace('deepspeed ', port, 1)} {SHORT}")
    steps = re.findall(r"step (\d+)/40", log)
    assert steps[-1] == "40"
    assert "finished at step 40; checkpoint " in log
    assert status(tmp_path / "runs" / "mine")["outcome"] == "finished"
    assert [record["step"] for record in journal(tmp_path / "runs" / "mine")] == [20, 40]

    told = typed(f"{sample} --evaluation.num_sampling_steps=4")
    sheet = tmp_path / told.splitlines()[-1]
    assert sheet.parent == tmp_path / "runs" / "mine" / "samples"
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    assert min(pixels.shape[:2]) >= 64
    assert pixels.std() > 10
