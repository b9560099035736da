"""Save the state of a run, and check a loaded one before the run goes on."""

import json
import logging

import pytest
import torch

from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError
from dtr_scale.jobs.build import build_network, build_trainer
from dtr_scale.jobs.train import train_experiment
from dtr_scale.jobs.trained import load_run
from dtr_scale.train.state import Probe, compare_probes, persistent_buffers
from tests.support.runs import SINGLE, demo_experiment, run_trainer, train

STEPS = ("--train.global_batch_size=32", "--train.micro_batch_size=32", "--train.max_steps=3")
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


@pytest.fixture
def trainer(digits, tmp_path):
    trainer = build_trainer(demo_experiment(digits, tmp_path, *SINGLE, *STEPS), LONE)
    yield trainer
    trainer.loader.close()


def test_a_resume_tells_that_samples_and_loss_are_as_stored(digits, tmp_path, caplog):
    assert train(digits, tmp_path, *STEPS) == 0
    with caplog.at_level(logging.INFO):
        assert train(digits, tmp_path, *STEPS, "--train.max_steps=4") == 0
    assert "next samples as stored, probe loss " in caplog.text
    assert "(differs by 0.0e+00)" in caplog.text


def test_the_probe_is_that_of_the_next_samples(trainer):
    first = trainer.probe()
    assert first is not None
    order = trainer.loader.peek(0, 4)[0]
    assert first.sample_ids == order
    assert len(order) == 4
    batch = next(iter(trainer.loader))
    assert torch.equal(trainer.loader.peek(0, 4)[1].noise, batch.noise[:4])
    trainer.state.advance(32)
    second = trainer.probe()
    assert second is not None
    assert second.sample_ids != first.sample_ids


def test_weights_that_are_not_those_saved_are_refused(digits, tmp_path, trainer):
    assert train(digits, tmp_path, *STEPS) == 0
    index = tmp_path / "checkpoints" / "step_00000003" / "index.json"
    stored = json.loads(index.read_text(encoding="utf-8"))["meta"]["probe"]
    assert trainer.resume()
    found = trainer.probe()
    assert found is not None
    assert compare_probes(stored, found, {"fp32"}, "here").startswith("next samples as stored")
    next(trainer.engine.network.parameters()).data.mul_(1.01)
    found = trainer.probe()
    assert found is not None
    with pytest.raises(CheckpointError, match="here: the loss of its next 4 samples was"):
        compare_probes(stored, found, {"fp32"}, "here")


def test_other_samples_are_refused_whatever_their_loss():
    stored = Probe([[0, 1]], 0.5).as_dict()
    with pytest.raises(CheckpointError, match=r"were \[\[0, 1\]\] and are \[\[0, 2\]\]"):
        compare_probes(stored, Probe([[0, 2]], 0.5), {"fp32"}, "here")


@pytest.mark.parametrize(("precisions", "accepted"), [({"fp32"}, False), ({"fp32", "bf16"}, True)])
def test_the_coarser_precision_decides(precisions, accepted):
    stored, found = Probe([[0, 1]], 0.5).as_dict(), Probe([[0, 1]], 0.504)
    if accepted:
        assert "differs by 8.0e-03" in compare_probes(stored, found, precisions, "here")
    else:
        with pytest.raises(CheckpointError):
            compare_probes(stored, found, precisions, "here")
