"""Latents and pictures are measured while training, on any ranks, as `evaluate` measures them."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.errors import EvaluationError
from dtr_scale.jobs.train import train_experiment
from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.held_out import HeldOutLoss
from tests.support.pictures import class_folders, small_autoencoder
from tests.support.ranks import exit_codes
from tests.support.runs import demo_experiment, train
from tests.support.weights import random_inception

RUN = (
    "--model.in_channels=4", "--model.input_size=8", "--model.num_classes=2", "--train.max_steps=2",
    "--train.global_batch_size=4", "--train.micro_batch_size=2", "--evaluation.every_steps=2",
    "--evaluation.num_samples=10", "--evaluation.batch_size=4", "--evaluation.clip_denoised=false",
    "--evaluation.num_sampling_steps=2", "--evaluation.loss_samples=64",
)  # fmt: skip
BATCHES = [range(4), range(4, 8), range(8, 12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An autoencoder in `vae`, and latents of pictures in `latents`."""
    place = tmp_path_factory.mktemp("in_training")
    class_folders(place / "pictures/train", {"a": 6, "b": 6})
    class_folders(place / "pictures/val", {"a": 4, "b": 4}, first_seed=50)
    given = ["--size", "32", "--vae", str(small_autoencoder(place / "vae"))]
    prepare = ["prepare", "imagefolder", str(place / "pictures"), *given]
    assert main([*prepare, "--out", str(place / "latents")]) == 0
    return place


def evaluations(run_dir):
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def killed(latents: Path, run_dir: Path) -> None:
    """Runs on each rank: rank 1 is killed in its second batch; rank 0 tells the held-out loss."""
    draw_batch, measure = PeriodicEvaluation._draw_batch, HeldOutLoss.measure
    drawn = []

    def dies(self, batch, step):
        drawn.extend([batch] if len(batch) else [])
        if os.environ["RANK"] == "1" and len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return draw_batch(self, batch, step)

    def told(self, network, rounds, step):
        losses = measure(self, network, rounds, step)
        if losses:
            run_dir.with_suffix(".json").write_text(json.dumps(losses))
        return losses

    PeriodicEvaluation._draw_batch, HeldOutLoss.measure = dies, told
    engine = ("--engine.type=fsdp2", "--engine.precision=fp32")
    train_experiment(demo_experiment(latents, run_dir, *RUN, *engine))


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_killed_on_other_ranks(place, tmp_path, monkeypatch):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    codes = exit_codes(2, killed, place / "latents", cut)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
    kept = cut / "samples/.step_00000002"
    assert sorted(path.name for path in kept.iterdir()) == ["0.npz", "1.npz", "plan.json"]
    shutil.copytree(cut, whole)
    shutil.rmtree(whole / "samples/.step_00000002")

    drawn, draw_batch = [], PeriodicEvaluation._draw_batch

    def counted(self, batch, step):
        drawn.extend([batch] if len(batch) else [])
        return draw_batch(self, batch, step)

    monkeypatch.setattr(PeriodicEvaluation, "_draw_batch", counted)
    alone = (*RUN, "--train.micro_batch_size=4")
    assert train(place / "latents", cut, *alone) == 0
    assert drawn == BATCHES[2:]
    assert train(place / "latents", whole, *alone) == 0
    assert drawn == BATCHES[2:] + BATCHES
    (found,), (expected,) = evaluations(cut), evaluations(whole)
    assert found["metrics"] == expected["metrics"]
    picture = "samples/step_00000002.png"
    assert (cut / picture).read_bytes() == (whole / picture).read_bytes()
    assert not kept.exists()

    # Two ranks of another engine, with other micro-batches.
    losses = {key: value for key, value in found["metrics"].items() if key.startswith("eval_loss")}
    assert json.loads(cut.with_suffix(".json").read_text()) == losses


def test_latents_are_measured_in_training_as_by_evaluate(place, tmp_path, caplog):
    caplog.set_level("INFO", "dtr_scale")
    run_dir = tmp_path / "run"
    assert train(place / "latents", run_dir, *RUN, "--evaluation.every_steps=1") == 0
    first, last = evaluations(run_dir)
    clusters = {f"eval_loss_cluster_{k}" for k in range(8)}
    assert set(last["metrics"]) == {"eval_loss", "fd_efficientnet"} | clusters
    assert last["metrics"]["eval_loss"] == pytest.approx(
        sum(last["metrics"][key] for key in clusters) / 8
    )
    assert first["metrics"]["fd_efficientnet"] != last["metrics"]["fd_efficientnet"]
    assert caplog.text.count("computing the moments of") <= 1  # none where they were kept before
    assert (run_dir / "samples/step_00000001.png").exists()

    out = tmp_path / "out.json"
    assert main(["evaluate", str(run_dir), "--json", str(out)]) == 0
    evaluated = json.loads(out.read_text())
    distance = evaluated["metrics"]["fd_efficientnet"]
    assert last["metrics"]["fd_efficientnet"] == pytest.approx(distance, rel=1e-4)
    told = last["manifest"].pop("held_out_loss")
    assert told["num_draws"] == 64
    # Of the averaged weights, which no rank holds in one piece while it trains.
    del evaluated["manifest"]["weights_sha256"]
    assert evaluated["manifest"] == last["manifest"]


@pytest.mark.slow
def test_fid_is_measured_in_training_where_inceptions_weights_are_at_hand(place, tmp_path):
    weights = random_inception(tmp_path)
    by = ("--evaluation.features=inception", f"--evaluation.inception_weights={weights}")
    assert train(place / "latents", tmp_path / "run", *RUN, *by) == 0
    (found,) = evaluations(tmp_path / "run")
    out = tmp_path / "out.json"
    assert main(["evaluate", str(tmp_path / "run"), "--json", str(out)]) == 0
    evaluated = json.loads(out.read_text())["metrics"]
    assert found["metrics"]["fid"] == pytest.approx(evaluated["fid"], rel=1e-4)


def test_latents_that_nothing_decodes_are_kept_and_their_loss_is_measured(
    place, tmp_path, warnings_of
):
    latents = Path(shutil.copytree(place / "latents", tmp_path / "latents"))
    manifest = latents / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(place / "vae"), "/nowhere/vae"))
    assert train(latents, tmp_path / "run", *RUN) == 0
    (warning,) = warnings_of("dtr_scale.jobs.in_training")
    assert warning.startswith("samples are not decoded in training: the autoencoder '/nowhere/vae'")
    (found,) = evaluations(tmp_path / "run")
    assert found["metrics"].keys() >= {"eval_loss"} and found["manifest"]["decoder"] is None
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step_00000002.npz"]


def test_features_that_are_asked_for_and_missing_end_the_start(place, tmp_path):
    asked = ("--evaluation.features=inception", "--evaluation.inception_weights=/nowhere.pth")
    with pytest.raises(EvaluationError, match=r"nowhere\.pth cannot be loaded") as caught:
        train(place / "latents", tmp_path / "run", *RUN, *asked)
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
