"""Runs on latents, folders, shards and anybody's pictures are measured, by the command line."""

import json
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtr_scale.cli.evaluation import FEATURES
from dtr_scale.cli.main import main
from dtr_scale.data.manifest import read_manifest
from dtr_scale.evaluation.features import EXTRACTORS
from dtr_scale.evaluation.pictures import file_sha256
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import class_folders, small_autoencoder
from tests.support.runs import train
from tests.support.weights import random_inception

LATENTS = (
    "--model.in_channels=4", "--model.input_size=8", "--model.num_classes=2", "--train.max_steps=1",
    "--train.global_batch_size=4", "--train.micro_batch_size=4", "--evaluation.every_steps=0",
    "--evaluation.num_sampling_steps=2", "--evaluation.clip_denoised=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures in `pictures/train` and `pictures/val`, an autoencoder, latents, and a run."""
    place = tmp_path_factory.mktemp("measured")
    class_folders(place / "pictures/train", {"a": 6, "b": 6})
    class_folders(place / "pictures/val", {"a": 4, "b": 4}, first_seed=50)
    vae = small_autoencoder(place / "vae")
    source, out = str(place / "pictures"), str(place / "latents")
    given = ["--size", "32", "--vae", str(vae), "--out", out]
    assert main(["prepare", "imagefolder", source, *given]) == 0
    assert train(out, place / "run", *LATENTS) == 0
    return place


@pytest.fixture(scope="module")
def reference(place):
    """A reference of the training pictures, cropped to 32 x 32."""
    out = place / "reference.npz"
    given = ["--size", "32", "--num-pictures", "5", "--out", str(out)]
    assert main(["evaluate", "reference", str(place / "pictures/train"), *given]) == 0
    return out


def evaluated(place, *arguments):
    out = place / "out.json"
    out.unlink(missing_ok=True)
    assert main(["evaluate", *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_command_line_knows_the_extractors():
    assert tuple(EXTRACTORS) == FEATURES


def test_a_run_on_latents_is_decoded_and_measured(place, capsys):
    report = evaluated(place, place / "run", "--num-samples", 8)
    assert set(report["metrics"]) == {
        "fd_efficientnet", "precision_efficientnet", "recall_efficientnet"
    }  # fmt: skip
    assert f"fd_efficientnet: {report['metrics']['fd_efficientnet']:.3f}" in capsys.readouterr().out
    assert json.loads((place / "run/evaluation.json").read_text()) == report
    manifest = report["manifest"]
    data = read_manifest(open_folder(place / "latents"), "val")
    assert data.encoder is not None
    assert manifest["decoder"] == data.encoder.sha256
    assert (manifest["num_samples"], manifest["cfg_scale"], manifest["step"]) == (8, 3.0, 1)
    told = manifest["reference"]["efficientnet"]
    assert told["moments_of"] == "the 8 pictures" and "split val, decoded by" in told["source"]

    # The same samples, decoded alike: the same number.
    again = evaluated(place, place / "run", "--num-samples", 8, "--vae", place / "vae")
    assert again["metrics"] == report["metrics"]


def test_a_run_is_measured_against_a_reference_file(place, reference):
    report = evaluated(place, place / "run", "--num-samples", 8, "--reference", reference)
    told = report["manifest"]["reference"]["efficientnet"]
    assert told["sha256"] == file_sha256(reference)
    assert (told["moments_of"], told["set_pictures"], told["num_pictures"]) == (
        "the whole set", 12, 5
    )  # fmt: skip
    assert report["metrics"]["fd_efficientnet"] > 1


@pytest.mark.slow
def test_a_run_is_measured_as_by_torch_fidelitys_command(place, tmp_path):
    """By the same Inception, whose weights are random: those that are published need a download."""
    weights = random_inception(tmp_path)
    reference = tmp_path / "reference.npz"
    by = ("--features", "inception", "--inception-weights", weights)
    given = ["--size", 32, *by, "--num-pictures", 12, "--out", reference]
    source = place / "pictures/train"
    assert main(["evaluate", "reference", *map(str, [source, *given])]) == 0
    report = evaluated(place, place / "run", "--num-samples", 12, *by, "--reference", reference)
    out = tmp_path / "samples.npz"
    assert main(["sample", str(place / "run"), "--num-samples", "12", "--out", str(out)]) == 0

    for npz in (out, reference):
        with np.load(npz) as stored:
            npz.with_suffix("").mkdir()
            for i, picture in enumerate(stored["arr_0"]):
                Image.fromarray(picture).save(npz.with_suffix("") / f"{i:02}.png")
    fidelity = Path(sysconfig.get_path("scripts"), "fidelity")
    command = [
        fidelity, "--cpu", "--json", "--no-cache", "--fid", "--isc", "--prc", "--isc-splits", "1",
        "--feature-extractor", "inception-v3-compat", "--feature-layer-prc", "2048",
        "--feature-extractor-weights-path", weights,
        "--input1", out.with_suffix(""), "--input2", reference.with_suffix(""),
    ]  # fmt: skip
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    theirs = json.loads(told[told.index("{") :])
    ours = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for key, name in ours.items():
        assert report["metrics"][key] == pytest.approx(theirs[name], rel=1e-4), key


def test_small_pixels_are_measured_by_features_where_asked(place, digits, tmp_path):
    small = ("--train.max_steps=1", "--train.global_batch_size=4", "--train.micro_batch_size=4")
    steps = ("--evaluation.every_steps=0", "--evaluation.num_sampling_steps=2")
    assert train(digits, tmp_path / "run", *small, *steps) == 0
    reference = tmp_path / "digits.npz"
    np.savez(reference, np.zeros((9, 8, 8, 1), np.uint8))
    report = evaluated(place, tmp_path / "run", "--num-samples", 4, "--reference", reference)
    assert report["manifest"]["decoder"] is None
    assert set(report["manifest"]["features"]) == {"efficientnet"}


def test_pictures_of_a_folder_an_npz_and_shards_are_the_same_pictures(place, reference, tmp_path):
    with np.load(reference) as stored:
        kept = stored["arr_0"]
    for i, picture in enumerate(kept):
        (tmp_path / "png" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "png" / str(i % 2) / f"{i}.png")
    order = [0, 2, 4, 1, 3]  # by folder
    np.savez(tmp_path / "samples.npz", arr_0=kept[order])
    pixels = tmp_path / "pixels"
    given = ["--split", "train", "--pixels", "--size", "32", "--out", str(pixels)]
    assert main(["prepare", "imagefolder", str(tmp_path / "png"), *given]) == 0

    sources = [tmp_path / "png", tmp_path / "samples.npz", pixels]
    reports = [evaluated(place, "--samples", each, "--reference", reference) for each in sources]
    for report in reports:
        # Shards are shuffled, which moves a sum's last digits.
        assert report["metrics"] == pytest.approx(reports[0]["metrics"], rel=1e-6)
        assert report["metrics"]["precision_efficientnet"] == 1
    assert len({report["manifest"]["samples"]["sha256"] for report in reports}) == 3


def test_what_cannot_be_measured_is_refused(place, reference, tmp_path, capsys):
    wide = refused(capsys, "--samples", place / "pictures/val", "--reference", reference)
    assert "000.png is 40x30, not 40x40; give square pictures" in wide
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"none")
    assert "x.png is no picture" in refused(
        capsys, "--samples", tmp_path / "broken", "--reference", reference
    )
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in refused(
        capsys, "--samples", tmp_path / "empty", "--reference", reference
    )
    assert "--size=9 is for a folder" in refused(
        capsys, "reference", place / "latents", "--out", tmp_path / "x.npz", "--size", 9
    )
    assert "give a file that ends in .npz" in refused(
        capsys, "reference", place / "pictures/train", "--out", tmp_path / "x.png"
    )
    missing = refused(
        capsys, place / "run", "--features", "inception", "--inception-weights", tmp_path / "x.pth"
    )
    assert "x.pth cannot be loaded (FileNotFoundError" in missing


def test_sizes_that_differ_are_told(place, reference, capsys):
    np.savez(place / "small.npz", np.zeros((5, 16, 16, 3), np.uint8))
    evaluated(place, "--samples", place / "small.npz", "--reference", reference)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "samples are [3, 16, 16]" in line and "[3, 32, 32]" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give RUN_DIR, --samples or reference"),
        (["reference", "folder"], "needs FOLDER|URL and --out"),
        (["reference", "--out", "x.npz"], "needs FOLDER|URL and --out"),
        (["--samples", "x.npz"], "--samples needs --reference"),
        (["run", "--samples", "x.npz", "--reference", "y.npz"], "and no RUN_DIR"),
        (["run", "--out", "x.json"], "give --json FILE"),
        (["run", "--features", "vgg"], "invalid choice: 'vgg'"),
    ],
)
def test_arguments_that_do_not_go_together_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_overrides_are_for_runs(capsys):
    line = refused(capsys, "--samples", "x", "--reference", "y", "--evaluation.cfg_scale=2")
    assert "unknown argument '--evaluation.cfg_scale'" in line
