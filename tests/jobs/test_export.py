"""The export command: averages of a run, kept or made, in files and folders."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import dtr_scale
from dtr_scale.checkpoint.convert import from_official, official_config
from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.checkpoint.weights import read_weights
from dtr_scale.cli.main import main
from dtr_scale.jobs.trained import load_run
from tests.support.runs import damage, train
from tests.support.weights import assert_same

SETTINGS = (
    "--train.global_batch_size=32", "--train.micro_batch_size=32", "--checkpoint.every_steps=10",
    "--checkpoint.keep_last=9", "--train.ema_decays=[0.5]", "--train.lr=1e-2",
    "--train.ema_sigma_rel=[0.05, 0.1, 0.2]", "--evaluation.every_steps=0",
)  # fmt: skip
NAME = "blocks.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("exported") / "run"
    assert train(digits, run_dir, *SETTINGS, "--train.max_steps=80") == 0
    return run_dir


@pytest.fixture
def export(tmp_path, capsys):
    """Export to a file, which is returned, or expect a refusal, whose line is."""

    def run(place, *arguments, to="safetensors", code=0):
        out = tmp_path / ("folder" if to == "diffusers" else "model.safetensors")
        arguments = [place, *arguments, "--to", to, "--out", out]
        assert main(["export", *map(str, arguments)]) == code
        told = capsys.readouterr()
        return (out, told) if code == 0 else told.err

    return run


def stored(run_dir, kind, name=NAME):
    return find_checkpoint(str(run_dir)).read([f"{kind}/{name}"])[f"{kind}/{name}"]


@pytest.mark.parametrize(
    ("ema", "kind"),
    [("0.995", "ema"), ("0.5", "ema_0.5"), ("power_0.1", "ema_power_0.1"), ("none", "master")],
)
def test_the_average_asked_for_is_written(run_dir, export, ema, kind):
    out, _ = export(run_dir, "--ema", ema)
    assert torch.equal(load_file(out)[NAME], stored(run_dir, kind))


def test_the_first_average_is_the_default_and_a_step_can_be_chosen(run_dir, export):
    assert torch.equal(load_file(export(run_dir)[0])[NAME], stored(run_dir, "ema"))
    step_40 = run_dir / "checkpoints" / "step_00000040"
    for arguments in ([run_dir, "--step", 40], [step_40], [step_40, "--step", 40]):
        assert torch.equal(load_file(export(*arguments)[0])[NAME], stored(step_40, "ema"))
    assert "--step=33" in export(run_dir, "--step", 33, code=2)
    assert "--step=41" in export(step_40, "--step", 41, code=2)


@pytest.mark.parametrize("kind", ["none", "random", "dtr", "max_roaming"])
def test_what_is_exported_loads_strictly_and_says_what_it_is(digits, tmp_path, export, kind):
    run = tmp_path / "run"
    small = ("--train.max_steps=2", f"--model.routing.type={kind}", "--train.ema_decay=0.5")
    assert train(digits, run, *small) == 0
    out, _ = export(run)
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert (header["step"], header["average"]) == ("2", "decay 0.5")
    assert header["layout"] == "dtr_scale.build_model"
    assert header["run"] == str(run)
    assert header["checkpoint"].endswith("step_00000002")
    network = dtr_scale.build_model(json.loads(header["config"])["model"])
    network.load_state_dict(load_file(out), strict=True)
    assert_same(network.state_dict(), load_run(run).network.state_dict())


@pytest.mark.parametrize("kind", ["none", "random", "dtr"])
def test_the_official_layout_comes_back(digits, tmp_path, export, kind):
    run = tmp_path / "run"
    assert train(digits, run, "--train.max_steps=2", f"--model.routing.type={kind}") == 0
    official = read_weights(export(run, to="official")[0])
    source = "dit" if kind == "none" else "dtr"
    assert_same(from_official(official, source), load_run(run).network.state_dict())
    assert official_config(official, source, num_heads=4)["routing"]["type"] == kind


def test_experts_are_exported_as_one_network(digits, tmp_path, export):
    for k in range(2):
        one = [f"--model.expert={k}", "--model.num_experts=2", "--train.max_steps=2"]
        assert train(digits, tmp_path / f"expert_{k}", *one, "--evaluation.every_steps=0") == 0
    out, _ = export(tmp_path)
    with safe_open(out, "pt") as file:
        section = json.loads(file.metadata()["config"])["model"]
    network = dtr_scale.build_model(section)
    network.load_state_dict(load_file(out), strict=True)
    assert_same(network.state_dict(), load_run(tmp_path).network.state_dict())
    command = ["export", str(tmp_path), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]
    assert main(command) == 0
    described = json.loads((tmp_path / "pipeline" / "transformer" / "config.json").read_text())
    assert described["num_experts"] == 2


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_named(run_dir, tmp_path, export, how):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    damage(copy / "checkpoints" / "step_00000080" / "rank_00000.safetensors", how)
    out, told = export(copy)
    assert "checkpoint passed over: " in told.err and "step_00000080: rank_00000" in told.err
    assert torch.equal(
        load_file(out)[NAME], stored(run_dir / "checkpoints" / "step_00000070", "ema")
    )
    assert "rank_00000.safetensors" in export(copy, "--step", 80, code=2)


def test_an_average_that_was_not_kept_is_made(run_dir, export):
    """Of the widths 0.05, 0.1 and 0.2 in eight checkpoints; 0.2 itself comes out exactly."""
    made = {}
    for sigma in (0.07, 0.15, 0.2):
        out, told = export(run_dir, "--sigma-rel", sigma)
        assert "made of 24 averages" in told.out
        made[sigma] = load_file(out)[NAME]
    kept = {sigma: stored(run_dir, f"ema_power_{sigma}") for sigma in (0.1, 0.2)}
    torch.testing.assert_close(made[0.2], kept[0.2], rtol=1e-4, atol=1e-5)
    between = (made[0.15] - kept[0.1]).norm() / (kept[0.2] - kept[0.1]).norm()
    assert 0.2 < between < 0.8
    assert made[0.07].isfinite().all()


def test_averages_that_were_switched_on_later_are_known(digits, tmp_path, export):
    """Beside a run that kept them from the first step on: the weights are the same."""
    later, always = tmp_path / "later", tmp_path / "always"
    assert train(digits, later, *SETTINGS, "--train.ema_sigma_rel=[]", "--train.max_steps=40") == 0
    assert train(digits, later, *SETTINGS, "--train.max_steps=80") == 0
    assert train(digits, always, *SETTINGS, "--train.max_steps=80") == 0
    averages = find_checkpoint(str(later)).meta["averages"]
    assert averages["ema_power_0.1"] == [{"from_step": 40, "sigma_rel": 0.1}]
    made = {}
    for run, count in ((later, 4 * 3), (always, 8 * 3)):
        out, told = export(run, "--sigma-rel", 0.12)
        assert f"made of {count} averages" in told.out
        made[run] = load_file(out)[NAME]
    near = stored(always, "ema_power_0.1")
    assert (made[later] - made[always]).norm() < 0.1 * (stored(always, "master") - near).norm()


def test_what_cannot_be_written_is_refused(run_dir, tmp_path, export, capsys):
    assert "accepted: 0.995, 0.5, power_0.05" in export(run_dir, "--ema", "0.1", code=2)
    assert "--push=x is for --to diffusers" in export(run_dir, "--push", "x", code=2)
    for name in ("x.pt", "x"):
        wrong = ["export", str(run_dir), "--to", "safetensors", "--out", str(tmp_path / name)]
        assert main(wrong) == 2
        assert "give a file that ends in .safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run_dir), "--sigma-rel", "0.5", "--to", "safetensors", "--out", "x"])
    assert "'0.5' is not accepted; give 0.01 to 0.28" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
