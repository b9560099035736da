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
from PIL import Image

from dtr_scale.cli.main import main
from dtr_scale.errors import UnfinishedError
from dtr_scale.evaluation.pictures import NpzPictures, to_uint8
from dtr_scale.evaluation.sampling import Sampler, draw_samples
from dtr_scale.evaluation.stored import StoredBatches
from dtr_scale.jobs import trained
from dtr_scale.jobs.averages import Choice, share_of_begin
from dtr_scale.jobs.sample import sample_run
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import load_run
from tests.support.processes import free_port, started_processes, wait_for
from tests.support.ranks import exit_codes, run_on_ranks
from tests.support.runs import ROOT, train
from tests.support.samples import BATCH, FAST, SMALL, names, refused


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


def test_what_is_loaded_slowly_and_what_is_drawn_is_told(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trained, "_QUIET_SECONDS", 0.001)
    out = tmp_path / "sheet.png"
    assert main(["sample", str(run_dir), "--guidance", "1,4", "--out", str(out), *FAST]) == 0
    told = capsys.readouterr().err
    assert f"loading the network of {run_dir} ..." in told
    assert "drawing 10 samples of step 4: ddpm, 4 steps, guidance 1 and 4\n" in told
    assert (
        main(["sample", str(run_dir), "--num-samples", "9", "--out", str(out), *FAST, "--force"])
        == 0
    )
    told = capsys.readouterr().err
    assert "guidance 3; in a whole batch of 32, --evaluation.batch_size=9 is quicker\n" in told


def test_an_average_that_is_still_noise_is_told(run_dir, tmp_path, capsys):
    """0.995 over 4 steps: nearly all of it is what the network began with."""
    command = ["sample", str(run_dir), "--num-samples", "2", "--out", str(tmp_path / "x.png")]
    assert main([*command, *FAST]) == 0
    told = capsys.readouterr().err
    assert "the average still holds 98% of the weights that the training began with" in told
    assert main([*command, "--ema", "none", "--force", *FAST]) == 0
    assert "the average still holds" not in capsys.readouterr().err
    history = [{"from_step": 0, "decay": 0.9}, {"from_step": 10, "decay": 0.5}]
    assert share_of_begin(history, 12) == pytest.approx(0.9**10 * 0.5**2)
    assert share_of_begin([{"from_step": 0, "sigma_rel": 0.1}], 1) == 0


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
