"""Resume runs: exactly where they were, and never a silent fresh start."""

import shutil

import pytest
import torch

from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.errors import CheckpointError
from tests.support.runs import BATCH, journal, status, tiny, train


def test_a_resumed_run_is_the_run_that_was_not_stopped(digits, tmp_path):
    """To the last bit: stopped at step 50 and resumed to 100, against straight through."""
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    assert train(digits, through, *BATCH, "--train.max_steps=100") == 0
    assert train(digits, resumed, *BATCH, "--train.max_steps=50") == 0
    assert train(digits, resumed, *BATCH, "--train.max_steps=100") == 0
    assert journal(resumed) == journal(through)
    assert len(journal(through)) == 100
    weights = "checkpoints/step_00000100/rank_00000.safetensors"
    assert (resumed / weights).read_bytes() == (through / weights).read_bytes()


def test_a_checkpoint_cut_short_is_passed_over(digits, tmp_path, warnings_of):
    through, cut = tmp_path / "through", tmp_path / "cut"
    tiny(digits, through)
    tiny(digits, cut)
    part = cut / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    tiny(digits, cut)
    (warning,) = warnings_of("dtr_scale.checkpoint.manager")
    assert "step_00000004: rank_00000.safetensors has" in warning
    assert journal(cut) == journal(through)


def test_a_fresh_start_on_purpose_loses_nothing(digits, tmp_path):
    tiny(digits, tmp_path)
    tiny(digits, tmp_path, "--checkpoint.resume=never", "--train.seed=1")
    (replaced,) = tmp_path.glob("replaced_*")
    assert journal(replaced) != journal(tmp_path)
    assert [record["step"] for record in journal(replaced)] == [1, 2, 3, 4]
    assert (replaced / "checkpoints" / "step_00000004").is_dir()


@pytest.mark.parametrize("launcher", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_fresh_start_counts_for_the_first_start_of_a_job_alone(
    digits, tmp_path, monkeypatch, launcher
):
    """A job that its launcher starts again goes on with the run that it has begun."""
    tiny(digits, tmp_path)
    never = ("--checkpoint.resume=never", "--train.seed=1")
    monkeypatch.setenv(launcher, "0")
    tiny(digits, tmp_path, *never, "--train.max_steps=2")
    monkeypatch.setenv(launcher, "1")
    tiny(digits, tmp_path, *never)
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("replaced_*"))) == 1


def ends(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("ended", ["SLURM", "build_trainer", "_set_aside"])
def test_a_fresh_start_that_ended_before_it_began_is_made_up_for(
    digits, tmp_path, monkeypatch, ended
):
    """The first start of a launch ends before the earlier run, begun afresh too, is set aside."""
    never = ("--checkpoint.resume=never", "--train.seed=1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's name for all its launches
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    tiny(digits, tmp_path, "--checkpoint.resume=never")
    if ended != "_set_aside":
        monkeypatch.setenv("SLURM_JOB_ID", "2")
    if ended != "SLURM":  # else before it came so far
        module = "train" if ended == "build_trainer" else "resume"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"dtr_scale.jobs.{module}.{ended}", ends)
            tiny(digits, tmp_path, *never)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    tiny(digits, tmp_path, *never, "--train.max_steps=2")
    (replaced,) = tmp_path.glob("replaced_*")
    assert [record["step"] for record in journal(replaced)] == [1, 2, 3, 4]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    tiny(digits, tmp_path, *never)
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 3, 4]
    assert len(list(tmp_path.glob("replaced_*"))) == 1


def test_a_fresh_start_on_purpose_begins_where_it_is_told(digits, tmp_path, caplog):
    caplog.set_level("INFO", "dtr_scale")
    never = ("--checkpoint.resume=never", f"--checkpoint.start_from={tmp_path / 'missing.pt'}")
    with pytest.raises(CheckpointError, match="missing"):
        tiny(digits, tmp_path / "run", *never)
    assert "moved" not in caplog.text


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(digits, tmp_path):
    tiny(digits, tmp_path)
    before = journal(tmp_path)
    for part in tmp_path.glob("checkpoints/*/index.json"):
        part.unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        tiny(digits, tmp_path)
    assert journal(tmp_path) == before


def test_checkpoints_that_are_gone_are_an_error_and_no_fresh_start(digits, tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    dir_ = f"--checkpoint.dir={elsewhere}"
    assert tiny(digits, run_dir, dir_) == 0
    assert status(run_dir)["saved_step"] == 4
    before = journal(run_dir)
    elsewhere.rename(tmp_path / "unmounted")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"saved at step 4, but there is no checkpoint"):
            tiny(digits, run_dir, dir_)
    assert journal(run_dir) == before
    shutil.rmtree(elsewhere)
    (tmp_path / "unmounted").rename(elsewhere)
    assert tiny(digits, run_dir, dir_, "--train.max_steps=6") == 0
    assert len(journal(run_dir)) == 6


def test_a_new_average_begins_at_the_weights(digits, tmp_path, caplog):
    tiny(digits, tmp_path)
    caplog.set_level("INFO", "dtr_scale")
    added = ("--train.ema_decays=[0.5]", "--train.ema_sigma_rel=[0.1]", "--train.max_steps=5")
    assert tiny(digits, tmp_path, *added) == 0
    assert "the average ema_0.5 is new and begins at the weights" in caplog.text
    reader = find_checkpoint(str(tmp_path))
    before = find_checkpoint(str(tmp_path / "checkpoints" / "step_00000004"))
    name = "blocks.0.attn.qkv.weight"
    start = before.read([f"master/{name}"])[f"master/{name}"]
    after, half = reader.read([f"master/{name}", f"ema_0.5/{name}"]).values()
    torch.testing.assert_close(half, (start + after) / 2)
