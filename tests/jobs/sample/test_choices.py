"""What is drawn: weights, labels, classes, seeds, scales of guidance, captions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dtr_scale.cli.main import main
from dtr_scale.evaluation.sampling import class_labels
from dtr_scale.jobs.averages import Choice, find_average
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.sample import sample_run
from dtr_scale.jobs.trained import load_run
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import small_clip
from tests.support.runs import train
from tests.support.samples import FAST, SMALL, STEPS, refused
from tests.support.shards import write_data


@pytest.mark.parametrize("choice", [Choice("none"), Choice("power_0.1"), Choice(sigma_rel=0.08)])
def test_any_weights_are_sampled(run_dir, tmp_path, choice):
    out = sample_run(run_dir, num_samples=2, out=tmp_path / "x.npz", choice=choice, overrides=FAST)
    manifest = json.loads(out.with_suffix(".json").read_text())
    found = find_average(str(run_dir), choice)
    assert manifest["ema"] == json.loads(json.dumps(found.records))
    assert (manifest["ema"] == [None]) == (choice.ema == "none")
    run = load_run(run_dir, FAST, choice)
    for name, weight in run.network.state_dict().items():
        assert torch.equal(weight, found.weights[name])
    assert (
        manifest["weights_sha256"]
        != json.loads(
            sample_run(run_dir, num_samples=2, out=tmp_path / "ema.npz", overrides=FAST)
            .with_suffix(".json")
            .read_text()
        )["weights_sha256"]
    )


def test_labels_are_balanced_or_drawn_by_the_index(run_dir, tmp_path):
    random = [*FAST, "--evaluation.labels=random"]
    out = sample_run(run_dir, num_samples=200, out=tmp_path / "random.npz", overrides=random)
    labels = np.load(out)["arr_1"]
    assert json.loads(out.with_suffix(".json").read_text())["labels"] == "random"
    counts = np.bincount(labels, minlength=10)
    assert len(set(counts.tolist())) > 1 and counts.min() > 5 and counts.max() < 40

    def x_start(*overrides):
        path = tmp_path / "latents.npz"
        options = {"num_samples": 50, "latents": True, "overrides": [*FAST, *overrides]}
        sample_run(run_dir, out=path, force=True, **options)
        with np.load(path) as stored:
            return stored["latents"], stored["arr_1"]

    fewer, labels_of_fewer = x_start("--evaluation.labels=random")
    np.testing.assert_array_equal(labels_of_fewer, labels[:50])
    assert (fewer.shape, fewer.dtype) == ((50, 1, 8, 8), np.float32)
    # The labels are those that the network was asked for.
    balanced, in_turn = x_start()
    np.testing.assert_array_equal(in_turn, class_labels(range(50), 10))
    same = labels_of_fewer == in_turn
    np.testing.assert_array_equal((fewer == balanced).all((1, 2, 3)), same)


def test_default_names_tell_the_step_and_what_was_asked_for(run_dir):
    few = {"num_samples": 4, "overrides": FAST}
    wanted = [
        ({}, "step_00000004_grid.png"),
        ({"choice": Choice(step=2)}, "step_00000002_grid.png"),
        ({"wanted": Wanted(("3", "7")), "seed": 1}, "step_00000004_grid_classes_3_7_seed_1.png"),
        ({"choice": Choice(sigma_rel=0.08)}, "step_00000004_grid_sigma_rel_0_08.png"),
        ({"guidance": (1.0, 4.0)}, "step_00000004_guidance.png"),
        ({"latents": True}, "step_00000004_latents.npz"),
    ]
    for options, name in wanted:
        path = sample_run(run_dir, **few, **options)
        assert path == run_dir / "samples" / name and path.exists()
        assert path.with_suffix(".json").exists()
        path.unlink()


def test_classes_are_drawn_in_turn(run_dir, tmp_path):
    def latents(name, wanted):
        path, few = tmp_path / name, {"num_samples": 8, "latents": True, "overrides": FAST}
        sample_run(run_dir, out=path, wanted=wanted, **few)
        with np.load(path) as drawn:
            return drawn["latents"], drawn["arr_1"].tolist()

    chosen, labels = latents("chosen.npz", Wanted(("3", "7", "3")))
    every, all_labels = latents("every.npz", None)
    assert (labels, all_labels) == ([3, 7, 3, 3, 7, 3, 3, 7], [*range(8)])
    # Sample 3 is a 3 in both, and 7 a 7, of the same noise; the network was asked for the others.
    same = (chosen == every).all((1, 2, 3))
    assert same.tolist() == [i in (3, 7) for i in range(8)]
    assert json.loads((tmp_path / "chosen.json").read_text())["labels"] == "classes 3, 7, 3"


def test_classes_are_known_by_their_names(tmp_path, capsys):
    arrays = np.random.default_rng(0).integers(0, 17, (30, 1, 8, 8), np.uint8)
    samples = [StoredSample(array, i % 3) for i, array in enumerate(arrays)]
    told = {
        "encoding": "pixels", "shape": (1, 8, 8), "dtype": "uint8", "scale_factor": 1 / 8,
        "shift": -1, "num_classes": 3, "class_names": ("cat", "1", "dog"),
    }  # fmt: skip
    write_data(open_folder(tmp_path / "data"), samples, 30, **told)
    run_dir = tmp_path / "run"
    assert train(tmp_path / "data", run_dir, *SMALL, "--model.num_classes=3") == 0
    options = ["--num-samples", 6, "--out", tmp_path / "x.npz", *FAST]
    command = ["sample", *map(str, [run_dir, "--classes", "dog,1,0", *options])]
    assert main(command) == 0
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [2, 1, 0] * 2
    line = refused(capsys, run_dir, "--classes", "dgo", *options)
    assert line.endswith("'dgo' is no class of this run; give 0 to 2, or a name such as 'dog'")
    conditions = conditions_of(load_run(run_dir).experiment, Wanted(), torch.device("cpu"))
    assert conditions.titles is not None and conditions.titles.period == 3
    assert conditions.titles.of(range(4)) == ["cat", "1", "dog", "cat"]
    random = load_run(run_dir, ["--evaluation.labels=random"]).experiment
    conditions = conditions_of(random, Wanted(), torch.device("cpu"))
    assert conditions.titles is not None and conditions.titles.period == 0
    # Without their data, classes are known by their numbers.
    (tmp_path / "data").rename(tmp_path / "gone")
    assert "'dog' is no class of this run; give 0 to 2" in refused(
        capsys, run_dir, "--classes", "dog", *options
    )
    assert main(["sample", *map(str, [run_dir, "--classes", 2, *FAST])]) == 0


def test_another_seed_makes_other_samples(run_dir, whole, tmp_path):
    def drawn(name, seed):
        sample_run(run_dir, num_samples=8, out=tmp_path / name, seed=seed, overrides=FAST)
        return np.load(tmp_path / name)["arr_0"]

    other = drawn("other.npz", 7)
    assert json.loads((tmp_path / "other.json").read_text())["seed"] == 7
    first = np.load(whole)["arr_0"][:8]
    assert not (other == first).all((1, 2, 3)).any()
    np.testing.assert_array_equal(drawn("run.npz", load_run(run_dir).experiment.train.seed), first)


def test_a_sheet_shows_the_same_samples_at_each_scale_of_guidance(run_dir, tmp_path):
    sheet = tmp_path / "sheet.png"
    command = ["sample", str(run_dir), "--guidance", "1,3,4", "--out", str(sheet), *FAST]
    assert main(command) == 0
    assert json.loads(sheet.with_suffix(".json").read_text())["guidance"] == [1, 3, 4]
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    left = pixels.shape[1] - 10 * 66
    rows = pixels[-3 * 66 :, left:].reshape(3, 66, 10, 66)[:, :64, :, :64].swapaxes(1, 2)
    shown = rows[:, :, ::8, ::8]  # [scales, classes, 8, 8]
    for row, scale in zip(shown, (1, 3, 4), strict=True):
        out = tmp_path / f"{scale}.npz"
        overrides = [STEPS, "--evaluation.batch_size=10", f"--evaluation.cfg_scale={scale}"]
        sample_run(run_dir, num_samples=10, out=out, overrides=overrides)
        np.testing.assert_array_equal(row, np.load(out)["arr_0"][:, :, :, 0])


@pytest.mark.parametrize(("classes", "columns"), [((), 10), (("3", "7"), 8), (("3",), 8)])
def test_a_sheet_shows_each_class_equally_often(run_dir, tmp_path, classes, columns):
    fast = {"wanted": Wanted(classes), "guidance": (1.0, 2.0), "overrides": [STEPS]}
    out = sample_run(run_dir, out=tmp_path / "sheet.png", **fast)
    assert json.loads(out.with_suffix(".json").read_text())["num_samples"] == columns


def test_bf16_is_near_fp32_and_told(run_dir, whole, tmp_path):
    overrides = [*FAST, "--evaluation.precision=bf16"]
    out = sample_run(run_dir, num_samples=32, out=tmp_path / "bf16.npz", overrides=overrides)
    assert json.loads(out.with_suffix(".json").read_text())["precision"] == "bf16"
    difference = np.load(out)["arr_0"].astype(int) - np.load(whole)["arr_0"][:32]
    assert 0 < np.abs(difference).mean() < 4, "levels of 256"


TEXT = {
    "type": "dit", "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 2, "input_size": 8,
    "in_channels": 3, "conditioning": "text", "context_length": 77, "context_dim": 32,
    "class_dropout_prob": 0.1,
}  # fmt: skip


def test_captions_of_a_file_are_drawn(tmp_path, capsys):
    run_dir, clip = tmp_path / "run", small_clip(tmp_path / "clip")
    text = ("--data.type=synthetic", f"--model={json.dumps(TEXT)}")
    assert train("none", run_dir, *SMALL, *text) == 0
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat\n\n a dog\na cat\n")
    six = ["--num-samples", 6, "--evaluation.batch_size=6", STEPS, "--latents"]
    given = ["--captions", captions, *six]
    line = refused(capsys, run_dir, *given, "--out", tmp_path / "x.npz")
    assert "names no text encoder; give --text-encoder" in line
    command = [run_dir, *given, "--text-encoder", clip, "--out", tmp_path / "x.npz"]
    assert main(["sample", *map(str, command)]) == 0
    with np.load(tmp_path / "x.npz") as stored:
        assert stored.files == ["latents"], "texts are no labels"
        first = stored["latents"]
    told = json.loads((tmp_path / "x.json").read_text())["labels"]
    assert told.startswith("3 captions, sha256 ")
    captions.write_text("a cat\na horse\na cat\n")
    command.append("--force")
    assert main(["sample", *map(str, command)]) == 0
    same = (np.load(tmp_path / "x.npz")["latents"] == first).all((1, 2, 3))
    assert same.tolist() == [True, False, True] * 2
    # Prompts are what a file of them is; the text's own encoder makes them.
    prompts = ["--prompt", "a cat", "--prompt", "a horse", "--prompt", "a cat", *six]
    prompted = [run_dir, *prompts, "--text-encoder", clip, "--out", tmp_path / "p.npz"]
    assert main(["sample", *map(str, prompted)]) == 0
    assert (tmp_path / "p.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()
    told = json.loads((tmp_path / "p.json").read_text())["labels"]
    assert told == 'prompts ["a cat", "a horse", "a cat"]'
    assert "--classes=3 is for models of classes" in refused(capsys, run_dir, "--classes", 3)
    captions.write_text("\n")
    assert "has no captions; write one a line" in refused(capsys, *command)
