"""Samples are the same bytes on any number of ranks, also when their drawing was cut off."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtr_scale.cli.main import main
from dtr_scale.errors import UnfinishedError
from dtr_scale.evaluation.pictures import NpzPictures, to_uint8
from dtr_scale.evaluation.sampling import Sampler, class_labels, draw_samples
from dtr_scale.evaluation.stored import StoredBatches
from dtr_scale.jobs.averages import Choice, find_average
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.sample import sample_run
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import load_run
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import small_clip
from tests.support.processes import free_port, started_processes, wait_for
from tests.support.ranks import exit_codes, run_on_ranks
from tests.support.runs import ROOT, train
from tests.support.shards import write_data

SMALL = (
    "--train.global_batch_size=16", "--train.micro_batch_size=16", "--train.max_steps=4",
    "--checkpoint.every_steps=2", "--checkpoint.keep_last=9", "--evaluation.every_steps=0",
    "--train.ema_sigma_rel=[0.05, 0.1]", "--train.lr=1e-2",
)  # fmt: skip
STEPS, BATCH = "--evaluation.num_sampling_steps=4", "--evaluation.batch_size=32"
FAST = (STEPS, BATCH)


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "run"
    assert train(digits, path, *SMALL) == 0
    return path


@pytest.fixture(scope="module")
def whole(run_dir, tmp_path_factory):
    """500 samples drawn by one process; the path of their .npz."""
    out = tmp_path_factory.mktemp("whole") / "samples.npz"
    assert main(["sample", str(run_dir), "--num-samples", "500", "--out", str(out), *FAST]) == 0
    return out


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["sample", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_files_hold_what_adm_writes(run_dir, whole):
    with np.load(whole) as stored:
        assert stored.files == ["arr_0", "arr_1"]
        pictures, labels = stored["arr_0"], stored["arr_1"]
    assert (pictures.shape, pictures.dtype) == ((500, 8, 8, 3), np.uint8)
    assert (labels.dtype, np.bincount(labels).tolist()) == (np.int64, [50] * 10)
    assert NpzPictures(whole).shape == (3, 8, 8)
    # numpy itself would have written these bytes.
    np.savez(whole.parent / "numpy", pictures, labels)
    assert (whole.parent / "numpy.npz").read_bytes() == whole.read_bytes()
    (whole.parent / "numpy.npz").unlink()
    assert names(whole.parent) == {"samples.npz", "samples.png", "samples.json"}

    run = load_run(run_dir, FAST)
    settings = sampling_settings(run.experiment)
    x_start = draw_samples(run.network, settings, range(32), batch_size=32, step=run.mask_step)
    grey = to_uint8(x_start).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pictures[:32], grey.repeat(3, axis=3))
    with Image.open(whole.with_suffix(".png")) as grid:
        width, height = grid.size
    assert width == 10 * 66 + 2, "a column per class"
    assert 10 < height - (8 * 66 + 2) < 25, "eight rows, and a line with the classes' names"


def test_the_manifest_tells_what_the_samples_depend_on(run_dir, whole):
    manifest = json.loads(whole.with_suffix(".json").read_text())
    settings = sampling_settings(load_run(run_dir, FAST).experiment).manifest()
    assert {key: manifest[key] for key in settings} == settings
    told = {
        "num_samples": 500, "batch_size": 32, "precision": "fp32", "compiled": False, "step": 4,
        "device": "cpu", "decoder": None, "rounding": "127.5 x + 128, cut off",
        "labels": "balanced",
    }  # fmt: skip
    assert {key: manifest[key] for key in told} == told
    assert manifest["ema"] == [[{"from_step": 0, "decay": 0.995}]]
    assert len(manifest["weights_sha256"]) == 64


def test_a_sample_depends_on_its_index_alone(run_dir, whole, tmp_path):
    """A batch that is not full is drawn in full: matrix products round by their rows."""
    out = sample_run(run_dir, num_samples=33, out=tmp_path / "few.npz", overrides=FAST)
    with np.load(out) as few, np.load(whole) as many:
        np.testing.assert_array_equal(few["arr_0"], many["arr_0"][:33])


def sample_on_rank(run_dir: Path, out: Path, kill_after: int | None) -> None:
    """Runs on each rank; the last one is killed, with no time to tell, after some batches."""
    if kill_after is not None and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        calls, draw = itertools.count(), Sampler.draw

        def killed(self, indices, progress=None):
            if next(calls) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return draw(self, indices, progress)

        Sampler.draw = killed
    sample_run(run_dir, num_samples=500, out=out, overrides=FAST)


@pytest.mark.slow
def test_any_number_of_ranks_draws_the_same_bytes_also_after_a_kill(run_dir, whole, tmp_path):
    """16 batches: 2 ranks, then 3; a rank is killed in each, and 2 ranks go on to the end."""
    two, cut = tmp_path / "two.npz", tmp_path / "cut.npz"
    run_on_ranks(2, sample_on_rank, run_dir, two, None)
    assert two.read_bytes() == whole.read_bytes()
    finished = two.stat().st_mtime_ns
    run_on_ranks(2, sample_on_rank, run_dir, two, None)
    assert two.stat().st_mtime_ns == finished, "all ranks know that nothing is to be drawn"
    parts = StoredBatches(tmp_path / "cut.npz.parts", 500, 32)
    # One alone, three, then two: each goes on with what the ones before have stored.
    for world_size, at_least in ((1, 3), (3, 6)):
        codes = exit_codes(world_size, sample_on_rank, run_dir, cut, 3 if world_size == 1 else 1)
        assert codes[-1] == -signal.SIGKILL
        assert all(code == 1 for code in codes[:-1]), "the others do not wait for it"
        missing = len(parts.missing())
        assert 0 < missing <= 16 - at_least
    run_on_ranks(2, sample_on_rank, run_dir, cut, None)
    assert cut.read_bytes() == whole.read_bytes()
    assert cut.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
    assert names(tmp_path) == {f"{n}.{e}" for n in ("two", "cut") for e in ("npz", "png", "json")}


def asked_to_leave(monkeypatch, batch):
    """SIGTERM comes in the middle of a batch."""
    calls, draw = itertools.count(), Sampler.draw

    def leaving(self, indices, progress=None):
        if next(calls) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, indices, progress)

    monkeypatch.setattr(Sampler, "draw", leaving)


def test_a_request_to_leave_is_heard_and_the_same_command_goes_on(
    run_dir, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "samples.npz"
    command = ["sample", str(run_dir), "--num-samples", "500", "--out", str(out), *FAST]
    with monkeypatch.context() as patch:
        asked_to_leave(patch, 2)
        assert main(command) == 75
    told = "leaving on request (SIGTERM): 2 of 16 batches are stored in"
    assert told in (err := capsys.readouterr().err) and "the same command goes on" in err
    assert names(tmp_path) == {"samples.npz.parts"}
    # Cut by a failing disk: it is drawn again.
    cut = tmp_path / "samples.npz.parts" / "batch_000001.npz"
    cut.write_bytes(cut.read_bytes()[:-30])
    assert main(command) == 0
    assert "going on: 1 of 16 batches are stored" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert "samples.npz.parts" not in names(tmp_path)


def test_a_flipped_bit_is_found_and_drawn_again(run_dir, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "samples.npz"
    command = ["sample", str(run_dir), "--num-samples", "500", "--out", str(out), *FAST]
    with monkeypatch.context() as patch:
        asked_to_leave(patch, 2)
        assert main(command) == 75
    batch = tmp_path / "samples.npz.parts" / "batch_000000.npz"
    content = bytearray(batch.read_bytes())
    content[len(content) // 2] ^= 1
    batch.write_bytes(content)
    assert main(command) == 1
    assert "batch_000000.npz is damaged and was removed" in capsys.readouterr().err
    assert not out.exists()
    assert main(command) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_unfinished_samples_of_other_settings_are_refused(run_dir, tmp_path, monkeypatch, capsys):
    out = tmp_path / "samples.npz"
    command = [run_dir, "--num-samples", 100, "--out", out, *FAST]
    with monkeypatch.context() as patch:
        asked_to_leave(patch, 1)
        assert main(["sample", *map(str, command)]) == 75
    line = refused(capsys, *command, "--evaluation.cfg_scale=2", "--evaluation.cfg_interval=[1,9]")
    assert "cfg_scale was 3.0 and is 2.0, cfg_interval was null and is [1, 9]; give the" in line
    assert "num_samples was 100 and is 90" in refused(
        capsys, run_dir, "--num-samples", 90, "--out", out, *FAST
    )
    assert 'weights_sha256 was "' in refused(capsys, *command, "--ema", "none")
    # Without a name nothing is lost that somebody waits for.
    with monkeypatch.context() as patch:
        asked_to_leave(patch, 1)
        with pytest.raises(UnfinishedError):
            sample_run(run_dir, num_samples=100, overrides=FAST)
    path = sample_run(run_dir, num_samples=32, overrides=[*FAST, "--evaluation.cfg_scale=2"])
    assert path == run_dir / "samples" / "step_00000004_grid.png"
    assert "step_00000004_grid.png.parts" not in names(run_dir / "samples")
    path.unlink()


def test_a_run_that_has_trained_on_goes_on_with_its_older_weights(digits, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    few = {"num_samples": 64, "overrides": FAST}
    assert train(digits, run_dir, *SMALL, "--train.max_steps=2") == 0
    expected = sample_run(run_dir, out=tmp_path / "expected.npz", **few).read_bytes()
    with monkeypatch.context() as patch:
        asked_to_leave(patch, 1)
        with pytest.raises(UnfinishedError):
            sample_run(run_dir, out=tmp_path / "cut.npz", **few)
    assert train(digits, run_dir, *SMALL) == 0
    newer = sample_run(run_dir, out=tmp_path / "newer.npz", **few).read_bytes()
    assert newer != expected
    assert sample_run(run_dir, out=tmp_path / "cut.npz", **few).read_bytes() == expected
    of_step = sample_run(run_dir, out=tmp_path / "step.npz", choice=Choice(step=2), **few)
    assert of_step.read_bytes() == expected


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


def test_each_sample_can_be_a_png(run_dir, whole, tmp_path, capsys):
    place = tmp_path / "pngs"
    sheet = tmp_path / "x.png"
    sample_run(run_dir, num_samples=34, out=sheet, folder=place, overrides=FAST)
    assert sorted(names(place)) == [f"{i:06d}.png" for i in range(34)]
    expected = np.load(whole)["arr_0"]
    for i in (0, 33):
        with Image.open(place / f"{i:06d}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), expected[i, :, :, 0])
    with Image.open(sheet) as grid:
        assert grid.width == 10 * 66 + 2 and 4 * 66 < grid.height < 5 * 66, "all of them"
    line = refused(capsys, run_dir, "--folder", place, *FAST)
    assert "not empty; give a new folder, or --force" in line
    # By force they are replaced, but nothing else is removed.
    again = ["--num-samples", 2, "--folder", place, "--out", sheet, "--force", *FAST]
    assert main(["sample", str(run_dir), *map(str, again)]) == 0
    assert sorted(names(place)) == ["000000.png", "000001.png"]
    (place / "mine.txt").write_text("")
    assert "a folder with nothing but samples in it" in refused(capsys, run_dir, *again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.jpg"], "give a file that ends in .npz or .png"),
        (["--latents", "--out", "x.png"], "--latents are no pictures; give --out FILE.npz"),
        (["--latents", "--folder", "x"], "give --out FILE.npz, and no --folder"),
        (["--captions", "x.txt"], "--captions=x.txt is for models of text, this one has"),
        (["--prompt", "a cat"], "--prompt='a cat' is for models of text, this one has"),
        (["--classes", "3,10"], "--classes: '10' is no class of this run; give 0 to 9, or a name"),
        (
            ["--guidance", "1,2", "--out", "x.npz"],
            "--guidance makes one sheet; give --out FILE.png",
        ),
        (["--guidance", "1,2", "--num-samples", "33", BATCH], "give a smaller --num-samples"),
        (["--ema", "0.3"], "--ema=0.3: "),
        (["--step", "3"], "has no checkpoint of that step"),
        (["--evaluation.precision=tf32"], "evaluation.precision = 'tf32' needs a GPU"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    run_dir, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, run_dir, *arguments)
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_what_is_finished_is_not_overwritten(run_dir, tmp_path, capsys):
    out = tmp_path / "x.npz"
    command = ["sample", *map(str, [run_dir, "--num-samples", 4, "--out", out, *FAST])]
    assert main(command) == 0
    before = out.read_bytes()
    out.write_bytes(b"finished")
    assert main(command) == 0
    assert out.read_bytes() == b"finished", "of the same settings: nothing is to be drawn"
    assert "x.npz is finished, of these settings; --force draws it" in capsys.readouterr().err
    line = refused(capsys, *command[1:], "--seed", 5)
    assert f"{out} is finished, and of other settings: seed was 0 and is 5; give --out" in line
    assert out.read_bytes() == b"finished"
    assert main([*command, "--force"]) == 0
    assert out.read_bytes() == before
    out.with_suffix(".json").unlink()
    assert "what it was made with is not known; give --out" in refused(capsys, *command[1:])


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


@pytest.mark.slow
def test_deepspeed_starts_the_ranks(run_dir, whole, tmp_path):
    out = tmp_path / "samples.npz"
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [
        launcher, "--num_gpus", "2", "--master_port", str(free_port()), "launch/sample.py",
        str(run_dir), "--num-samples", "500", "--out", str(out), *FAST,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines().count(str(out)) == 1, "rank 0 alone speaks"
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_ranks_of_torchrun_leave_on_sigterm_and_go_on(run_dir, tmp_path):
    out = tmp_path / "samples.npz"
    command = [
        sys.executable, "launch/torchrun.py", "--nproc_per_node", "2", "--master_port",
        str(free_port()), "launch/sample.py", str(run_dir), "--num-samples", "500", "--out",
        str(out), BATCH, "--evaluation.num_sampling_steps=100",
    ]  # fmt: skip
    parts = StoredBatches(tmp_path / "samples.npz.parts", 500, 32)
    with started_processes() as start:
        started = start(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(lambda: len(parts.missing()) < 14, started)
        started.send_signal(signal.SIGTERM)
        told, _ = started.communicate(timeout=60)
    assert started.returncode == 75, told
    assert "leaving on request (" in told and "the same command goes on" in told
    assert 0 < len(parts.missing()) < 14
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on: " in done.stderr
    assert names(tmp_path) == {"samples.npz", "samples.png", "samples.json"}
