"""From pictures to training: real photos and emoji through the commands that users type."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from dtr_scale.cli.main import main
from dtr_scale.data.manifest import NULL_CONTEXT_NAME, read_manifest
from dtr_scale.storage.folder import Folder, open_folder
from tests.support.pictures import captioned, emoji, fashion_folders, small_autoencoder, small_clip
from tests.support.processes import free_port, wait_for
from tests.support.runs import ROOT, journal, train

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own


def prepare(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments)])


def data(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def torchrun(ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """Start `torchrun launch/prepare.py` in a process group of its own."""
    options = ["--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "launch/prepare.py"]
        + [str(argument) for argument in arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.names()}


def shards_read_by_webdataset(folder: Folder, directory: Path) -> list[dict[str, Any]]:
    """Fetch every shard and return its samples as plain webdataset decodes them."""
    samples: list[dict[str, Any]] = []
    directory.mkdir()
    for name in folder.names():
        if name.endswith(".tar"):
            folder.get(name, directory / name)
            subprocess.run(["tar", "-tf", directory / name], check=True, stdout=subprocess.DEVNULL)
            dataset: Any = WebDataset(str(directory / name), shardshuffle=False)
            samples += dataset.decode()
    return samples


@pytest.mark.services  # Fashion-MNIST is one of Debian's packages
@pytest.mark.slow
def test_two_ranks_of_torchrun_write_what_one_writes(tmp_path, capsys):
    """The first time both ranks are killed in the middle."""
    source = fashion_folders(tmp_path / "photos", 300)
    vae = small_autoencoder(tmp_path / "vae")
    arguments = ["imagefolder", source, "--vae", vae, "--size", 64, "--shard-mb", 0.15]
    assert prepare(*arguments, "--out", tmp_path / "alone") == 0
    out = open_folder(tmp_path / "out")

    ranks = torchrun(2, *arguments, "--out", out.url)
    wait_for(lambda: any(name.endswith(".record.json") for name in out.names()), ranks)
    os.killpg(ranks.pid, signal.SIGKILL)
    ranks.communicate()
    assert "manifest.json" not in out.names()
    records = [name for name in out.names() if name.endswith(".record.json")]
    tars = [out.local_path / name.replace(".record.json", ".tar") for name in records]
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in tars]

    ranks = torchrun(2, *arguments, "--out", out.url)
    told, _ = ranks.communicate(timeout=120)
    assert ranks.returncode == 0, told
    assert "going on: " in told
    assert told.count("manifest: ") == 1
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in tars] == before
    assert contents(out) == contents(open_folder(tmp_path / "alone"))


@pytest.mark.slow
def test_photos_become_latents_on_s3_and_are_trained_on(s3_url, tmp_path, capsys):
    source = fashion_folders(tmp_path / "photos", 2000)
    vae = small_autoencoder(tmp_path / "vae")
    out = f"{s3_url}/photos"
    start = time.monotonic()
    options = ("--vae", vae, "--size", 32, "--shard-mb", 0.5)
    assert prepare("imagefolder", source, "--out", out, *options) == 0
    print(f"2,000 photos in {time.monotonic() - start:.1f} s")
    assert data("verify", out) == 0
    assert data("inspect", out, "--sheet", tmp_path / "sheet.png") == 0
    told = capsys.readouterr().out
    assert "train: 2000 samples" in told and "10 classes" in told

    folder = open_folder(out)
    manifest = read_manifest(folder)
    samples = shards_read_by_webdataset(folder, tmp_path / "tars")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 2000
    counts = [len(list(path.iterdir())) for path in sorted(source.iterdir())]
    assert np.bincount([sample["cls"] for sample in samples]).tolist() == counts
    stored = np.stack([sample["npy"] for sample in samples])
    assert (stored.shape, stored.dtype) == ((2000, 2, 2, 4, 8, 8), np.float16)
    x_start = stored[:, 0, 0].astype(np.float64) * manifest.scale_factor
    np.testing.assert_allclose(manifest.channel_mean, x_start.mean((0, 2, 3)), rtol=1e-5)

    run_dir = tmp_path / "run"
    overrides = ("--model.in_channels=4", "--train.max_steps=200", "--evaluation.every_steps=0")
    assert train(out, run_dir, *overrides, f"--data.cache_dir={tmp_path / 'cache'}") == 0
    losses = [record["loss"] for record in journal(run_dir)]
    assert len(losses) == 200
    assert np.mean(losses[-20:]) < np.mean(losses[:20])

    draw = ["sample", str(run_dir), "--num-samples", "20", "--evaluation.num_sampling_steps=5"]
    assert main(draw) == 0
    with Image.open(run_dir / "samples" / "step_00000200_grid.png") as picture:
        assert picture.mode == "RGB"
    assert main([*draw, "--latents", "--out", str(tmp_path / "latents.npz")]) == 0
    assert np.load(tmp_path / "latents.npz")["latents"].shape == (20, 4, 8, 8)
    vae.rename(tmp_path / "elsewhere")
    assert main([*draw, "--out", str(tmp_path / "grid.png")]) == 2
    assert "give --vae NAME_OR_FOLDER" in capsys.readouterr().err
    again = ("--out", str(tmp_path / "grid.png"), "--vae", str(tmp_path / "elsewhere"))
    assert main([*draw, *again]) == 0
    drawn = (tmp_path / "grid.png").read_bytes()
    assert drawn == (run_dir / "samples" / "step_00000200_grid.png").read_bytes()


@pytest.mark.slow
def test_emoji_become_latents_with_tokens_on_s3_and_are_trained_on(s3_url, tmp_path, capsys):
    pictures = emoji(100)
    contents_by_name = {name: content for name, (content, _) in pictures.items()}
    captions = {name: texts for name, (_, texts) in pictures.items()}
    root = captioned(tmp_path / "coco", contents_by_name, captions)
    vae, clip = small_autoencoder(tmp_path / "vae"), small_clip(tmp_path / "clip", width=64)
    out = f"{s3_url}/emoji"
    sources = ("--images", root / "images", "--annotations", root / "captions.json")
    encoders = ("--vae", vae, "--size", 64, "--text-encoder", clip)
    assert prepare("coco", *sources, "--out", out, *encoders, "--shard-mb", 1) == 0
    assert data("verify", out) == 0
    told = capsys.readouterr().out
    assert "train: 100 samples in 7 shards" in told

    folder = open_folder(out)
    manifest = read_manifest(folder)
    assert (manifest.context_shape, manifest.num_classes) == ((77, 64), 1)
    assert NULL_CONTEXT_NAME in folder.names()
    samples = shards_read_by_webdataset(folder, tmp_path / "tars")
    assert sorted(sample["captions.json"] for sample in samples) == sorted(captions.values())
    for sample in samples:
        assert sample["npy"].shape == (2, 2, 4, 16, 16)
        context = sample["context.npy"]
        assert (context.shape, context.dtype) == ((5, 77, 64), np.float16)
        assert np.isfinite(context.astype(np.float32)).all()
        assert len({tokens.tobytes() for tokens in context}) == 5
    sheet = tmp_path / "sheet.png"
    assert data("inspect", out, "--sheet", sheet) == 0
    assert "100 samples, 7 shards, " in (told := capsys.readouterr().out)
    assert "500 captions" in told
    assert json.loads(folder.read_bytes("manifest.json"))["text_encoder"]["name"] == str(clip)

    run_dir = tmp_path / "run"
    overrides = (
        *("--model.conditioning=text", "--model.context_dim=64", "--model.input_size=16"),
        *("--model.in_channels=4", "--train.max_steps=50", "--evaluation.every_steps=0"),
        f"--data.cache_dir={tmp_path / 'cache'}",
    )
    assert train(out, run_dir, *overrides) == 0
    losses = [record["loss"] for record in journal(run_dir)]
    assert len(losses) == 50
    assert np.mean(losses[-10:]) < np.mean(losses[:10])

    # Prompts go through the text encoder that the manifest names, latents through its autoencoder.
    prompts = ["--prompt", "a red apple", "--prompt", "the face of a dog that is laughing"]
    fast = ["--num-samples", "8", "--evaluation.num_sampling_steps=4", "--evaluation.batch_size=8"]
    assert main(["sample", str(run_dir), *prompts, *fast]) == 0
    (grid,) = (run_dir / "samples").glob("step_00000050_grid_a_red_apple_*.png")
    assert json.loads(grid.with_suffix(".json").read_text())["labels"] == (
        'prompts ["a red apple", "the face of a dog that is laughing"]'
    )
    with Image.open(grid) as picture:
        assert picture.width == 4 * 66 + 2 and picture.height > 2 * 66 + 20, "named above columns"
