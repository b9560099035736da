"""The commands that look into checkpoints, on those of real runs."""

import shutil
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from tests.support.runs import damage, train

SETTINGS = (
    "--train.global_batch_size=32", "--train.micro_batch_size=32", "--checkpoint.every_steps=10",
    "--checkpoint.keep_last=9", "--train.ema_decays=[0.5]", "--train.lr=1e-2",
    "--train.ema_sigma_rel=[0.05, 0.1, 0.2]", "--evaluation.every_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("inspected") / "run"
    assert train(digits, run_dir, *SETTINGS, "--train.max_steps=80") == 0
    return run_dir


def step_dir(run_dir, step):
    return str(run_dir / "checkpoints" / f"step_{step:08d}")


def output(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def test_inspect_shows_position_kinds_and_tree(run_dir, capsys):
    text = output(capsys, "checkpoint", "inspect", run_dir)
    assert "step            80\n" in text
    assert "samples_seen    2560\n" in text
    assert "probe loss      0." in text
    kinds = {line.split()[0]: line.split()[1] for line in text.splitlines() if "MiB" in line}
    assert kinds["master"] == kinds["exp_avg"] == kinds["ema"] == kinds["ema_power_0.05"] == "31"
    assert "  blocks x 2  " in text
    assert "    attn.qkv.weight                  [96, 32]" in text


def test_inspect_tells_what_differs_from_a_file(run_dir, capsys):
    text = output(
        capsys, "checkpoint", "inspect", step_dir(run_dir, 40), "--config", run_dir / "config.json"
    )
    assert text.endswith("no difference\n")
    text = output(
        capsys, "checkpoint", "inspect", run_dir, "--config", "configs/dit_l_dtr_antuw.json"
    )
    assert "train.lr was 0.01 and is 0.0001" in text


def test_verify_reads_every_byte(run_dir, capsys, tmp_path):
    assert "complete and as written" in output(capsys, "checkpoint", "verify", run_dir)
    copy = tmp_path / "step_00000080"
    copy.mkdir()
    for path in (run_dir / "checkpoints" / "step_00000080").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    damaged = copy / "rank_00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    text = output(capsys, "checkpoint", "verify", copy, code=1)
    assert "rank_00000.safetensors is damaged in bytes" in text
    assert "1 damaged" in text


def cut(run_dir, tmp_path, step, how):
    """Return a copy of a run with one of its checkpoints damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    damage(Path(step_dir(copy, step)) / "rank_00000.safetensors", how)
    return copy


@pytest.mark.parametrize("how", ["cut", "flipped", "unmarked"])
def test_verify_judges_every_checkpoint_of_a_run(run_dir, capsys, tmp_path, how):
    copy = cut(run_dir, tmp_path, 80, how)
    text = output(capsys, "checkpoint", "verify", copy, code=1)
    assert text.count("complete and as written") == 7
    assert ("COMPLETE is missing" if how == "unmarked" else "1 damaged") in text
    copy = cut(run_dir, tmp_path / "older", 20, how)
    output(capsys, "checkpoint", "verify", copy, code=1)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(
    run_dir, capsys, tmp_path
):
    copy = cut(run_dir, tmp_path, 80, "cut")
    assert main(["checkpoint", "inspect", str(copy)]) == 0
    out, err = capsys.readouterr()
    assert "step            70\n" in out
    assert "checkpoint passed over: " in err and "step_00000080: rank_00000.safetensors" in err


def test_diff_measures_how_far_two_are_apart(run_dir, capsys):
    text = output(capsys, "checkpoint", "diff", step_dir(run_dir, 40), step_dir(run_dir, 80))
    assert "step: 40 and 80\n" in text
    assert "master: 31 of 31 tensors differ, relative 0." in text
    text = output(capsys, "checkpoint", "diff", run_dir, step_dir(run_dir, 80))
    assert "master: 0 of 31 tensors differ, relative 0, at most 0\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "'nowhere' holds no checkpoint"),
        (["verify", "nowhere"], "'nowhere' holds no checkpoint"),
    ],
)
def test_what_is_not_there_is_named(capsys, arguments, message):
    assert main(["checkpoint", *arguments]) == 2
    assert message in capsys.readouterr().err
