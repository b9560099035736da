"""The report of an evaluation, and the manifest that it is published with."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.data.manifest import read_manifest
from dtr_scale.evaluation.sampling import Sampler
from dtr_scale.jobs.trained import load_run
from dtr_scale.storage.folder import open_folder
from tests.support.runs import damage, train

SMALL = (
    "--train.global_batch_size=16", "--train.micro_batch_size=16", "--train.max_steps=4",
    "--evaluation.every_steps=0", "--evaluation.num_sampling_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    """A run whose first average was made with another decay in its first two steps."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(digits, path, *SMALL, "--train.ema_decay=0.9", "--train.max_steps=2") == 0
    assert train(digits, path, *SMALL, "--train.ema_decay=0.5") == 0
    return path


def evaluated(run_dir):
    assert main(["evaluate", str(run_dir), "--num-samples", "20"]) == 0
    return json.loads((run_dir / "evaluation.json").read_text())["manifest"]


def test_the_manifest_tells_what_the_numbers_depend_on(run_dir, digits):
    manifest = evaluated(run_dir)
    reference = read_manifest(open_folder(digits), "val").hash("val")
    assert manifest["reference"] == {"split": "val", "manifest_hash": reference}
    assert reference != read_manifest(open_folder(digits), "train").hash("train")
    assert (manifest["num_samples"], manifest["step"], manifest["sampler"]) == (20, 4, "ddpm")
    assert manifest["checkpoints"][0].endswith("step_00000004")


def test_the_manifest_tells_the_decays_that_really_made_the_average(run_dir):
    assert evaluated(run_dir)["ema"] == [
        [{"from_step": 0, "decay": 0.9}, {"from_step": 2, "decay": 0.5}]
    ]


@pytest.mark.parametrize("how", ["cut", "flipped", "unmarked"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    run_dir, tmp_path, capsys, how
):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    damage(copy / "checkpoints" / "step_00000004" / "rank_00000.safetensors", how)
    assert evaluated(copy)["step"] == 2
    assert "checkpoint passed over: " in (err := capsys.readouterr().err)
    assert "step_00000004" in err


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("--diffusion.noise_schedule=linear", "diffusion.noise_schedule = 'cosine' and 'linear'"),
        ("--train.seed=7", "train.seed = 0 and 7"),
        ("", "data.shards = 'manifest "),
    ],
)
def test_experts_of_different_runs_are_not_assembled(digits, tmp_path, capsys, changed, named):
    expert = ("--model.num_experts=2", "--train.max_steps=1")
    data = digits
    for k in range(2):
        other = [changed] if k and changed else []
        if k and not changed:
            data = Path(shutil.copytree(digits, tmp_path / "digits"))
            manifest = json.loads((data / "manifest.json").read_text())
            manifest["shards"] = [s for s in manifest["shards"] if s["split"] == "val"] + [
                s for s in manifest["shards"] if s["split"] == "train"
            ][:1]
            (data / "manifest.json").write_text(json.dumps(manifest))
        place = tmp_path / "run" / f"expert_{k}"
        assert train(data, place, *SMALL, *expert, f"--model.expert={k}", *other) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--num-samples", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"are of different runs: {named}" in line


def test_a_run_can_be_looked_at_without_its_data(run_dir, tmp_path, capsys, monkeypatch):
    """Pictures of pixels need no decoder: nothing is missing, and nobody is told so."""
    config = json.loads((run_dir / "config.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    config["data"]["shards"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir("/")
    assert main(["sample", str(copy), "--num-samples", "2"]) == 0
    err = capsys.readouterr().err
    assert "shown as pixels: data.shards: manifest.json is missing" in err
    assert "not decoded" not in err
    assert load_run(copy).step == 4


def test_a_run_is_measured_from_any_folder(digits, tmp_path, monkeypatch):
    (tmp_path / "digits").symlink_to(digits)
    monkeypatch.chdir(tmp_path)
    assert train("digits", Path("run"), *SMALL, "--checkpoint.dir=stored") == 0
    monkeypatch.chdir("/")
    assert evaluated(tmp_path / "run")["step"] == 4


def test_an_evaluation_that_was_cut_off_goes_on_with_its_samples(run_dir, monkeypatch, capsys):
    expected = evaluated(run_dir)
    command = ["evaluate", str(run_dir), "--num-samples", "20", "--evaluation.batch_size=8"]
    drawn, draw = [], Sampler.draw

    def counted(self, indices, progress=None):
        drawn.append(indices)
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, indices, progress)

    monkeypatch.setattr(Sampler, "draw", counted)
    assert main(command) == 75
    assert "1 of 3 batches are stored in" in capsys.readouterr().err
    assert main(command) == 0
    assert drawn == [range(8), range(8, 16), range(8, 16), range(16, 24)]
    assert not list((run_dir / "samples").glob("*.parts"))
    manifest = json.loads((run_dir / "evaluation.json").read_text())["manifest"]
    assert manifest == expected | {"batch_size": 8}
    assert (manifest["precision"], manifest["labels"]) == ("fp32", "balanced")
