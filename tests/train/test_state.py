"""What a checkpoint holds of a run: also what is neither learned nor made from its settings."""

import torch

from dtr_scale.engines.world import World
from dtr_scale.jobs.build import build_network, build_trainer
from dtr_scale.jobs.train import train_experiment
from dtr_scale.jobs.trained import load_run
from dtr_scale.train.state import persistent_buffers
from tests.support.runs import SINGLE, demo_experiment, run_trainer

LONE = World(0, 0, 1, torch.device("cpu"))
BATCH = ("--train.global_batch_size=32", "--train.micro_batch_size=32", "--train.max_steps=2")


def test_masks_that_cannot_be_drawn_again_are_kept(digits, tmp_path):
    """R-TR's masks as an import may have set them: saved, resumed, and sampled with."""
    random = (*SINGLE, *BATCH, "--model.routing.type=random")
    experiment = demo_experiment(digits, tmp_path, *random)
    assert train_experiment(experiment) == 0  # for its config.json

    trainer = build_trainer(experiment, LONE)
    drawn = persistent_buffers(build_network(experiment))
    assert list(drawn) == ["routing.mask_0", "routing.mask_1"]
    imported = {name: mask.roll(5, dims=1) for name, mask in drawn.items()}
    trainer.engine.network.load_state_dict(imported, strict=False)
    run_trainer(trainer)

    resumed = build_trainer(experiment, LONE)
    assert resumed.resume()
    for network in (resumed.engine.network, load_run(tmp_path).network):
        found = persistent_buffers(network)
        assert all(mask.dtype == torch.bool for mask in found.values())
        assert all(torch.equal(found[name], mask) for name, mask in imported.items())


def test_networks_with_windows_have_nothing_to_add(digits, tmp_path):
    assert persistent_buffers(build_network(demo_experiment(digits, tmp_path))) == {}
