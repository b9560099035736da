"""Analyse a run from the command line: the files written, the lines printed."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dtr_scale.cli.main import main
from tests.support.runs import demo_experiment, train

TWO_STEPS = (
    "--train.global_batch_size=16",
    "--train.micro_batch_size=16",
    "--train.max_steps=2",
    "--checkpoint.every_steps=2",
)
FEW = ("--num-samples", "12", "--num-timesteps", "4")
SYNTHETIC = ("--data.type=synthetic", "--evaluation.cfg_scale=1")


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    """A run of two steps that no test writes to but below samples/."""
    path = tmp_path_factory.mktemp("run")
    assert train(digits, path, *TWO_STEPS) == 0
    return path


def analyse(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def manifest_of(numbers):
    return json.loads(str(numbers["manifest"]))


def test_cka_writes_a_picture_and_its_numbers(run_dir, capsys):
    out, _ = analyse(capsys, "cka", run_dir, *FEW)
    samples = run_dir / "samples"
    assert out.splitlines() == [str(samples / "cka.png"), str(samples / "cka.npz")]
    with Image.open(samples / "cka.png") as picture:
        assert (picture.format, picture.width > picture.height) == ("PNG", True)
    with np.load(samples / "cka.npz") as numbers:
        cka = numbers["cka"]
        assert (cka.shape, cka.dtype) == ((2, 4, 4), np.float32)
        assert numbers["timesteps"].tolist() == [0, 333, 666, 999]
        manifest = manifest_of(numbers)
    assert (np.diagonal(cka, axis1=1, axis2=2) == 1).all()
    # A digit at timestep 0 and pure noise at 999 have less in common than noise and more noise.
    assert (abs(cka[:, 0, 3]) < 0.3).all() and (cka[:, 2, 3] > 0.8).all()
    assert (manifest["split"], manifest["num_samples"], manifest["step"]) == ("val", 12, 2)
    assert manifest["checkpoints"][0].endswith("step_00000002")


def test_cka_goes_where_it_is_told_and_repeats_itself(run_dir, tmp_path, capsys):
    for name in ("a", "b"):
        analyse(capsys, "cka", run_dir, *FEW, "--out", tmp_path / f"{name}.png")
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        assert (first["cka"] == second["cka"]).all()


def test_without_held_out_samples_training_ones_are_taken(run_dir, digits, tmp_path, capsys):
    place, moved = tmp_path / "digits", tmp_path / "run"
    shutil.copytree(digits, place)
    shutil.copytree(run_dir, moved)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["shards"] = [s for s in manifest["shards"] if s["split"] == "train"][:1]
    (place / "manifest.json").write_text(json.dumps(manifest))
    config = (moved / "config.json").read_text().replace(str(digits), str(place))
    (moved / "config.json").write_text(config)
    analyse(capsys, "cka", moved, "--num-samples", 600, "--num-timesteps", 2)
    with np.load(moved / "samples" / "cka.npz") as numbers:
        found = manifest_of(numbers)
    assert (found["split"], found["num_samples"]) == ("train", 500)  # all that there are


@pytest.mark.parametrize("conditioning", ["none", "text"])
def test_other_conditions_come_from_the_samples(digits, tmp_path, capsys, conditioning):
    text = ("--model.context_length=3", "--model.context_dim=8")
    network = (f"--model.conditioning={conditioning}", *text)
    assert train(digits, tmp_path, *TWO_STEPS, *SYNTHETIC, *network) == 0
    analyse(capsys, "cka", tmp_path, *FEW)
    out, _ = analyse(capsys, "affinity", tmp_path, *FEW)
    assert len(json.loads(out)["objective"]["boundaries"]) == 9
    with np.load(tmp_path / "samples" / "cka.npz") as numbers:
        assert manifest_of(numbers)["split"] == "train"


def test_affinity_prints_what_an_experiment_takes(run_dir, digits, tmp_path, capsys):
    out, err = analyse(capsys, "affinity", run_dir, *FEW, "--num-clusters", 5)
    samples = run_dir / "samples"
    assert err.splitlines() == [str(samples / "affinity.png"), str(samples / "affinity.npz")]
    printed = json.loads(out)
    boundaries = printed["objective"]["boundaries"]
    assert len(boundaries) == 6 and (boundaries[0], boundaries[-1]) == (0, 1000)
    with np.load(samples / "affinity.npz") as numbers:
        affinity = numbers["affinity"]
        assert numbers["boundaries"].tolist() == boundaries
        assert manifest_of(numbers)["split"] == "train"
    assert affinity.shape == (1000, 1000)
    assert np.allclose(np.diagonal(affinity), 1) and np.allclose(affinity, affinity.T)
    with Image.open(samples / "affinity.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100
    overrides = [
        f"--objective.{key}={json.dumps(value)}" for key, value in printed["objective"].items()
    ]
    experiment = demo_experiment(digits, tmp_path, *overrides)
    assert (experiment.objective.clusters, experiment.objective.num_clusters) == ("gradient", 5)
    assert train(digits, tmp_path, *TWO_STEPS, *overrides) == 0


@pytest.mark.parametrize("command", ["cka", "affinity"])
@pytest.mark.parametrize("count", ["1", "1001"])
def test_a_number_of_timesteps_that_cannot_be_is_refused(run_dir, capsys, command, count):
    assert main([command, str(run_dir), "--num-timesteps", count]) == 2
    assert f"--num-timesteps={count} is not accepted; give 2 to 1000" in capsys.readouterr().err


def test_too_few_samples_are_told_by_their_number_alone(run_dir, capsys):
    assert main(["cka", str(run_dir), "--num-samples", "2", "--num-timesteps", "4"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: num_samples = 2: too few for CKA; give at least 4 samples\n"
    )


def test_more_clusters_than_timesteps_are_refused(run_dir, capsys):
    assert main(["affinity", str(run_dir), *FEW, "--num-clusters", "1001"]) == 2
    assert "num_clusters = 1001: not accepted" in capsys.readouterr().err
