"""The commands that look into checkpoints, on those of real runs."""

import pytest
import torch
from safetensors.torch import load_file

from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.cli.main import main
from tests.support.runs import train

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


def test_diff_measures_how_far_two_are_apart(run_dir, capsys):
    text = output(capsys, "checkpoint", "diff", step_dir(run_dir, 40), step_dir(run_dir, 80))
    assert "step: 40 and 80\n" in text
    assert "master: 31 of 31 tensors differ, relative 0." in text
    text = output(capsys, "checkpoint", "diff", run_dir, step_dir(run_dir, 80))
    assert "master: 0 of 31 tensors differ, relative 0, at most 0\n" in text


@pytest.mark.parametrize(
    ("ema", "kind"),
    [("ema", "ema"), ("0.995", "ema"), ("0.5", "ema_0.5"), ("power_0.1", "ema_power_0.1"),
     ("none", "master")],
)  # fmt: skip
def test_export_writes_the_average_asked_for(run_dir, capsys, tmp_path, ema, kind):
    out = tmp_path / "model.safetensors"
    output(capsys, "checkpoint", "export", run_dir, "--ema", ema, "--out", out)
    stored = find_checkpoint(str(run_dir)).read([f"{kind}/blocks.0.mlp.fc1.weight"])
    assert torch.equal(load_file(out)["blocks.0.mlp.fc1.weight"], *stored.values())


def test_reconstruct_makes_an_average_that_was_not_kept(run_dir, capsys, tmp_path):
    """Of the widths 0.05, 0.1 and 0.2 in eight checkpoints; 0.2 itself comes out exactly."""
    out = tmp_path / "model.safetensors"
    name = "blocks.0.mlp.fc1.weight"
    reader = find_checkpoint(str(run_dir))
    made = {}
    for sigma in (0.07, 0.15, 0.2):
        text = output(capsys, "ema", "reconstruct", run_dir, "--sigma-rel", sigma, "--out", out)
        assert "made of 24 averages" in text
        made[sigma] = load_file(out)[name]
    kept = {s: reader.read([f"ema_power_{s}/{name}"])[f"ema_power_{s}/{name}"] for s in (0.1, 0.2)}
    torch.testing.assert_close(made[0.2], kept[0.2], rtol=1e-4, atol=1e-5)
    between = (made[0.15] - kept[0.1]).norm() / (kept[0.2] - kept[0.1]).norm()
    assert 0.2 < between < 0.8
    assert made[0.07].isfinite().all()


def test_reconstruct_knows_what_was_switched_on_later(digits, tmp_path, capsys):
    """Beside a run that kept the averages from the first step on: weights are the same."""
    later, always = tmp_path / "later", tmp_path / "always"
    small = (*SETTINGS, "--evaluation.every_steps=0")
    assert train(digits, later, *small, "--train.ema_sigma_rel=[]", "--train.max_steps=40") == 0
    assert train(digits, later, *small, "--train.max_steps=80") == 0
    assert train(digits, always, *small, "--train.max_steps=80") == 0
    reader = find_checkpoint(str(later))
    assert reader.meta["averages"]["ema_power_0.1"] == [{"from_step": 40, "sigma_rel": 0.1}]

    name, made = "blocks.0.mlp.fc1.weight", {}
    for run in (later, always):
        out = tmp_path / f"{run.name}.safetensors"
        text = output(capsys, "ema", "reconstruct", run, "--sigma-rel", 0.12, "--out", out)
        assert f"made of {4 * 3 if run == later else 8 * 3} averages" in text
        made[run] = load_file(out)[name]
    apart = (made[later] - made[always]).norm()
    kept = [find_checkpoint(str(always)).read([f"{k}/{name}"]) for k in ("master", "ema_power_0.1")]
    weights, near = (value for read in kept for value in read.values())
    assert apart < 0.1 * (weights - near).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "'nowhere' holds no checkpoint"),
        (["export", "RUN", "--ema", "0.1", "--out", "x"], "accepted: 0.995, 0.5, power_0.05"),
    ],
)
def test_what_is_not_there_is_named(run_dir, capsys, arguments, message):
    arguments = [str(run_dir) if argument == "RUN" else argument for argument in arguments]
    assert main(["checkpoint", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_reconstruct_needs_a_step_that_was_kept(run_dir, capsys, tmp_path):
    arguments = [
        "ema",
        "reconstruct",
        str(run_dir),
        "--sigma-rel",
        "0.1",
        "--out",
        str(tmp_path / "x"),
    ]
    assert main([*arguments, "--step", "33"]) == 2
    assert "has no complete checkpoint of that step" in capsys.readouterr().err
    assert main([*arguments[:4], "0.5", *arguments[5:]]) == 2
    assert "--sigma-rel=0.5 is not accepted" in capsys.readouterr().err
