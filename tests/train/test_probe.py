"""What a restored run is checked by before it goes on."""

import json
import logging

import pytest
import torch

from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.train.probe import Probe, compare
from tests.support.runs import SINGLE, demo_experiment, train

ALONE = World(0, 0, 1, torch.device("cpu"))
STEPS = ("--train.global_batch_size=32", "--train.micro_batch_size=32", "--train.max_steps=3")


@pytest.fixture
def trainer(digits, tmp_path):
    trainer = build_trainer(demo_experiment(digits, tmp_path, *SINGLE, *STEPS), ALONE)
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
    trainer.step = 1
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
    assert compare(stored, found, {"fp32"}, "here").startswith("next samples as stored")
    next(trainer.engine.network.parameters()).data.mul_(1.01)
    found = trainer.probe()
    assert found is not None
    with pytest.raises(CheckpointError, match="here: the loss of its next 4 samples was"):
        compare(stored, found, {"fp32"}, "here")


def test_other_samples_are_refused_whatever_their_loss():
    stored = Probe([[0, 1]], 0.5).as_dict()
    with pytest.raises(CheckpointError, match=r"were \[\[0, 1\]\] and are \[\[0, 2\]\]"):
        compare(stored, Probe([[0, 2]], 0.5), {"fp32"}, "here")


@pytest.mark.parametrize(("precisions", "accepted"), [({"fp32"}, False), ({"fp32", "bf16"}, True)])
def test_the_coarser_precision_decides(precisions, accepted):
    stored, found = Probe([[0, 1]], 0.5).as_dict(), Probe([[0, 1]], 0.504)
    if accepted:
        assert "differs by 8.0e-03" in compare(stored, found, precisions, "here")
    else:
        with pytest.raises(CheckpointError):
            compare(stored, found, precisions, "here")
