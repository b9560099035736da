"""The first hour of new users: the README's commands, as they are typed, in an empty folder."""

import os
import re
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtr_scale.config.load import load_experiment
from tests.support.pictures import captioned, shapes, small_autoencoder, small_clip, tar_of
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


def drawn(sheet: Path) -> np.ndarray:
    """Return a sheet's pixels, which show something."""
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    assert min(pixels.shape[:2]) >= 64
    assert pixels.std() > 10
    return pixels


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

    told = typed(f"{prepare} --size 64")
    assert "train: 90 samples in 1 shard" in told and f"next: {init}\n" in told

    told = typed(init)
    assert "with DTR and ANT-UW" in told and f"next: {train}" in told
    assert len((tmp_path / "mine.json").read_text().splitlines()) <= 15

    port = f"deepspeed --master_port {free_port()} "
    log = typed(f"{train.replace('deepspeed ', port, 1)} {SHORT}")
    steps = re.findall(r"step (\d+)/40", log)
    assert steps[-1] == "40"
    assert "finished at step 40; checkpoint " in log and f"next: {sample}\n" in log
    assert status(tmp_path / "runs" / "mine")["outcome"] == "finished"
    assert [record["step"] for record in journal(tmp_path / "runs" / "mine")] == [20, 40]

    told = typed(f"{sample} --evaluation.num_sampling_steps=4")
    assert "drawing 64 samples of step 40: ddim, 4 steps, guidance 1.5" in told
    sheet = tmp_path / told.splitlines()[-1]
    assert sheet.parent == tmp_path / "runs" / "mine" / "samples"
    drawn(sheet)


def test_own_webdataset_tars(tmp_path, typed):
    """KEY.png with KEY.cls, kept as pixels; trained and resumed in one process."""
    for number, name in enumerate(("discs", "squares", "stripes")):
        pictures = sorted((shapes(tmp_path / name, 20, size=32) / name).iterdir())
        members = {f"{name}_{path.stem}.png": path.read_bytes() for path in pictures}
        members |= {f"{name}_{path.stem}.cls": str(number).encode() for path in pictures}
        tar = tmp_path / "tars" / f"{number:06}.tar"
        tar.parent.mkdir(exist_ok=True)
        tar.write_bytes(tar_of(dict(sorted(members.items()))))

    told = typed("dtr-scale prepare webdataset tars --pixels --size 32 --out data/tars")
    assert "train: 60 samples in 1 shard" in told
    typed("dtr-scale config init --data data/tars --out tars.json")
    train = f"dtr-scale train --config tars.json --engine.type=single {SHORT}"
    assert "step 20/20" in typed(f"{train} --train.max_steps=20 --evaluation.every_steps=0")
    log = typed(train)
    assert "at step 20" in log and "step 40/40" in log

    few = "--num-samples 4 --evaluation.num_sampling_steps=4"
    told = typed(f"dtr-scale sample runs/tars --classes 0,2 {few} --folder single --out some.png")
    drawn(tmp_path / told.splitlines()[-1])
    assert len(list((tmp_path / "single").glob("*.png"))) == 4


def test_captions_as_coco_has_them_and_pictures_for_a_prompt(tmp_path, typed):
    """The network is one of texts, whose encoder the data names."""
    pictures, captions = {}, {}
    for path in sorted(shapes(tmp_path / "shapes", 12).rglob("*.png")):
        name = f"{path.parent.name}_{path.name}"
        pictures[name], captions[name] = path.read_bytes(), [f"{path.parent.name} at night"]
    captioned(tmp_path / "coco", pictures, captions)
    small_clip(tmp_path / "clip")
    in_the_cache(tmp_path / "hub", "stabilityai/sd-vae-ft-ema")

    told = typed("dtr-scale prepare coco --images coco/images --annotations coco/captions.json "
                 "--size 64 --text-encoder clip --out data/coco")  # fmt: skip
    assert "train: 36 samples in 1 shard" in told
    typed("dtr-scale config init --data data/coco --out coco.json")
    experiment = load_experiment(tmp_path / "coco.json")
    assert experiment.model.conditioning == "text"
    log = typed(f"dtr-scale train --config coco.json --engine.type=single {SHORT}")
    assert "finished at step 40" in log

    told = typed("dtr-scale sample runs/coco --prompt 'discs at night' --num-samples 4 "
                 "--evaluation.num_sampling_steps=4")  # fmt: skip
    drawn(tmp_path / told.splitlines()[-1])
