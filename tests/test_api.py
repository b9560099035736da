"""The Python interface: what its README shows runs, and gives what the commands give."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dtr_scale
from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from tests.support.runs import ROOT, tiny

FAST: dict[str, Any] = {"num_sampling_steps": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def home(digits, tmp_path_factory):
    """A folder with a run and its data, as a user has them."""
    path = tmp_path_factory.mktemp("home")
    (path / "data").mkdir()
    (path / "data" / "mine").symlink_to(digits)
    (path / "configs").symlink_to(ROOT / "configs")
    assert tiny(path / "data" / "mine", path / "runs" / "mine", "--train.lr=1e-2") == 0
    return path


def test_the_script_of_the_readme_runs(home):
    text = (ROOT / "dtr_scale" / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    # By a process of its own: workers import the main program.
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=home, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "demo_digits at step 4"
    assert re.fullmatch(r"\d\.\de\+\d\d FLOPs", done.stdout.splitlines()[1])
    assert re.fullmatch(r"[\d.]+ days, \d+ dollars", done.stdout.splitlines()[2])


def test_samples_are_those_of_the_command(home, tmp_path):
    run_dir, out = home / "runs" / "mine", tmp_path / "x.npz"
    overrides = [f"--evaluation.{key}={value}" for key, value in FAST.items()]
    options = ["--classes", "3,7", "--seed", "5", "--num-samples", "11", *overrides]
    assert main(["sample", str(run_dir), "--out", str(out), *options]) == 0
    run = dtr_scale.load_run(run_dir)
    before = {name: tensor.clone() for name, tensor in run.network.state_dict().items()}
    pictures = dtr_scale.sample(run, 11, classes=[3, "7"], seed=5, **FAST)
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (11, 1, 8, 8))
    stored = np.load(out)["arr_0"][:, :, :, :1].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(pictures.numpy(), stored)
    # In another precision the caller's network stays what it is.
    x_start = dtr_scale.sample(str(run_dir), 3, decode=False, precision="bf16", **FAST)
    assert x_start.dtype == torch.float32 and x_start.isfinite().all()
    dtr_scale.sample(run, 3, precision="bf16", **FAST)
    assert all(torch.equal(before[n], t) for n, t in run.network.state_dict().items())


def test_any_weights_of_a_run_are_loaded(home):
    run_dir = str(home / "runs" / "mine")
    average, plain = dtr_scale.load_run(run_dir), dtr_scale.load_run(run_dir, ema="none")
    assert not average.network.training and average.step == 4
    first = dtr_scale.load_run(run_dir, step=2, device="cpu", overrides=["--evaluation.eta=1"])
    assert (first.step, first.experiment.evaluation.eta) == (2, 1.0)
    weights = [next(r.network.parameters()) for r in (average, plain, first)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    same = dtr_scale.load_run(run_dir, ema=average.experiment.train.ema_decay)
    assert torch.equal(next(same.network.parameters()), weights[0])


def test_mistakes_are_told(home):
    run = dtr_scale.load_run(home / "runs" / "mine")
    with pytest.raises(ConfigError, match=r"unknown key evaluation\.cfg_scal; did you mean"):
        dtr_scale.sample(run, 1, cfg_scal=2)
    with pytest.raises(ConfigError, match="num_samples = 0 is not accepted; give 1 or more"):
        dtr_scale.sample(run, 0)
    with pytest.raises(ConfigError, match="is for models of text"):
        dtr_scale.sample(run, 1, prompts=["a cat"])
    with pytest.raises(ConfigError, match="is no run directory"):
        dtr_scale.load_run(home)


def test_a_plan_is_that_of_the_command():
    config = ROOT / "configs" / "demo_digits.json"
    plan = dtr_scale.plan(config)
    smaller = dtr_scale.plan(str(config), ["--train.max_steps=1"])
    assert plan.training_flops == 2000 * smaller.training_flops > 0
    assert "GFLOPs" in plan.table(per_layer=False)
    on_gpus = dtr_scale.plan(config, gpu="a100-80gb", gpus=2, price=3.0)
    assert on_gpus.cluster.world_size == 2 and on_gpus.compute == plan
    assert on_gpus.cost == pytest.approx(6 * on_gpus.wall_seconds / 3600)
    with pytest.raises(ConfigError, match="a100-80gb"):
        dtr_scale.plan(config, gpu="abacus")


def test_each_room_says_what_it_holds():
    for path in sorted(Path(dtr_scale.__file__).parent.glob("*/__init__.py")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        assert re.match(r'""".{20,}\."""$|""".{20,}\.$', first), path
