"""A checkout of the released code is timed beside ours; here one that is laid out as they are."""

import json
import sys

import pytest

from dtr_scale.cli.main import main
from tests.support.runs import DEMO, SINGLE, SMALL

MODELS = """
import torch
from torch import nn

class DiT(nn.Module):
    def __init__(self, *, input_size, in_channels, hidden_size, depth, **sizes):
        super().__init__()
        assert sizes == SIZES, sizes
        self.layer = nn.Conv2d(in_channels, 2 * in_channels, 1)

    def forward(self, x, t, y):
        assert len(x) == len(t) == len(y) and x.shape[1:] == (1, 8, 8)
        return self.layer(x)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        assert (y[len(y) // 2:] == 10).all() and cfg_scale == 3
        return self.forward(x, t, y)
"""
SIZES = {"num_heads": 4, "patch_size": 2, "num_classes": 10, "learn_sigma": True}
DTR = {"router": 1, "sharing_ratio": 0.8, "taskcount": 1000, "init_method": "DTR"}
DIFFUSION = """
import torch

class Diffusion:
    num_timesteps = 1000

    def training_losses(self, model, x, t, model_kwargs):
        return {"loss": model(x, t, **model_kwargs).square().flatten(1).mean(1)}

    def p_sample_loop_progressive(self, model, shape, noise, clip_denoised, model_kwargs, device):
        for t in reversed(range(5)):
            yield model(noise, torch.full(shape[:1], t), **model_kwargs)

def create_diffusion(timestep_respacing, noise_schedule, learn_sigma, diffusion_steps):
    assert timestep_respacing in ("", "5") and noise_schedule == SCHEDULE
    return Diffusion()
"""
SETTINGS = [*SMALL, "--data.type=synthetic", "--train.global_batch_size=8"]


@pytest.fixture(params=["dit", "dtr"])
def checkout(request, tmp_path, monkeypatch):
    """A folder with the modules, and the calls, of one of the two repositories."""
    before, is_dtr = set(sys.modules), request.param == "dtr"
    folder = tmp_path / "checkout"
    models = f"SIZES = {SIZES | DTR if is_dtr else SIZES}\n{MODELS}"
    schedule = "cosine" if is_dtr else "squaredcos_cap_v2"
    files = {"diffusion/__init__.py": f"SCHEDULE = {schedule!r}\n{DIFFUSION}"}
    if is_dtr:
        files |= {"models/DiT/models.py": models, "models/taskrouting.py": "TaskRouter = 1"}
    else:
        files |= {"models.py": models}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    yield folder
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("models", "diffusion"):
            del sys.modules[name]


def test_its_steps_are_timed_beside_ours(checkout, tmp_path, capsys):
    command = ["--config", str(DEMO), *SETTINGS, "--peer", str(checkout)]
    file = tmp_path / "report.json"
    assert main(["bench", "train", *command, *SINGLE, "--steps", "2", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    ratio = report["samples_per_second"] / report["peer_samples_per_second"]
    assert report["speed_over_peer"] == pytest.approx(ratio)
    drawing = ["--evaluation.num_sampling_steps=5", "--num-samples", "4", "--json", str(file)]
    assert main(["bench", "sample", *command, *drawing]) == 0
    report = json.loads(file.read_text())
    ours = 2 * 4 / report["step_seconds"]["median"]
    ratio = ours / report["peer_network_evaluations_per_second"]
    assert report["speed_over_peer"] == pytest.approx(ratio)
    assert capsys.readouterr().out.count("ours over theirs") == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--evaluation.sampler=ddim", "the released code samples by ddpm"),
        ("--evaluation.cfg_interval=[200,800]", "guides at every timestep"),
        ("--model.routing.type=cdtr", "has the masks of dtr and random"),
    ],
)
@pytest.mark.parametrize("checkout", ["dtr"], indirect=True)
def test_what_the_released_code_lacks_is_refused(override, told, checkout, capsys):
    command = ["bench", "sample", "--config", str(DEMO), *SETTINGS, override, "--num-samples", "4"]
    assert main([*command, "--peer", str(checkout)]) == 2
    assert told in capsys.readouterr().err


def test_another_folder_is_refused(tmp_path, capsys):
    command = ["bench", "sample", "--config", str(DEMO), *SETTINGS, "--num-samples", "4"]
    assert main([*command, "--peer", str(tmp_path)]) == 2
    assert "has neither models/taskrouting.py nor models.py" in capsys.readouterr().err
