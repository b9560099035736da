"""bf16 weights beside fp32 masters, which the engine has on a GPU, tried on a CPU."""

import pytest
import torch

from dtr_scale.jobs import build
from dtr_scale.jobs.build import build_trainer
from tests.support.engine_jobs import HALF, HALF_WAY, LONE, assert_same, losses, setting
from tests.support.runs import demo_experiment, run_trainer, train_on


@pytest.fixture
def casting(monkeypatch):
    monkeypatch.setattr(build, "casts_weights_once", lambda experiment, device: True)


def test_it_trains_as_in_fp32_and_resumes_to_the_last_bit(digits, tmp_path, casting):
    fp32, bf16 = ((*setting(f"single_{precision}"),) for precision in ("fp32", "bf16"))
    # With micro-steps, whose gradients are added in fp32.
    accumulating = "--train.micro_batch_size=4"
    expected = train_on(LONE, demo_experiment(digits, tmp_path / "fp32", *fp32, HALF_WAY))
    through = train_on(LONE, demo_experiment(digits, tmp_path / "through", *bf16, accumulating))
    assert_same(through[:HALF], expected, "bf16")
    resumed = tmp_path / "resumed"
    train_on(LONE, demo_experiment(digits, resumed, *bf16, accumulating, HALF_WAY))
    rest = train_on(LONE, demo_experiment(digits, resumed, *bf16, accumulating), resume=True)
    assert losses(rest) == losses(through)[HALF:]


def test_weights_are_the_masters_cast(digits, tmp_path, casting):
    trainer = build_trainer(demo_experiment(digits, tmp_path, *setting("single_bf16")), LONE)
    before = {name: piece.data.clone() for name, piece in trainer.engine.masters().items()}
    run_trainer(trainer)
    masters = trainer.engine.masters()
    for name, weight in trainer.engine.network.named_parameters():
        master = masters[name].data
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight.detach().view(-1), master.bfloat16())
        assert not torch.equal(master, before[name])
    assert any(not torch.equal(m.data, m.data.bfloat16().float()) for m in masters.values())
