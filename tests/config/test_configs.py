"""Every file in configs/ is an experiment that can be built."""

from pathlib import Path

import pytest
import torch

from dtr_scale.cli import main
from dtr_scale.config.export import experiment_schema
from dtr_scale.config.load import load_experiment
from dtr_scale.train.build import build_network

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.json"))
EXPERIMENTS.remove(CONFIGS / "experiment.schema.json")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_is_shown_and_builds_its_network(path, capsys):
    assert main(["config", "show", str(path)]) == 0
    assert f'"name": "{path.stem}"' in capsys.readouterr().out
    with torch.device("meta"):
        network = build_network(load_experiment(path))
    assert sum(parameter.numel() for parameter in network.parameters()) > 100_000


def test_schema_file_is_the_one_the_code_makes():
    committed = (CONFIGS / "experiment.schema.json").read_text(encoding="utf-8")
    assert committed == experiment_schema(), (
        "run: dtr-scale config schema > configs/experiment.schema.json"
    )


def test_flagship_is_the_papers_setting():
    flagship = load_experiment(CONFIGS / "dit_l_dtr_antuw.json")
    with torch.device("meta"):
        network = build_network(flagship)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 458
    assert flagship.model.routing.model_dump() == {"type": "dtr", "alpha": 4, "beta": 0.8}
    assert (flagship.objective.type, flagship.objective.num_clusters) == ("ant_uw", 8)
    assert (flagship.diffusion.noise_schedule, flagship.diffusion.num_timesteps) == ("cosine", 1000)
    assert flagship.train.model_dump() == {
        "max_steps": 2_000_000, "global_batch_size": 256, "micro_batch_size": 32, "lr": 1e-4,
        "weight_decay": 0.0, "ema_decay": 0.9999, "grad_clip": None, "seed": 0, "log_every": 100,
    }  # fmt: skip
    assert (flagship.model.class_dropout_prob, flagship.data.horizontal_flip) == (0.1, True)
    assert flagship.evaluation.cfg_channels == 4
