"""fp32 masters beside bf16 weights, which ZeRO-0 has on a GPU, tried on a CPU."""

from typing import Any

import pytest
import torch

from dtr_scale.engines.masters import Masters
from dtr_scale.engines.world import join_world
from dtr_scale.jobs import build
from dtr_scale.jobs.build import build_trainer
from tests.support.engine_jobs import HALF, HALF_WAY, losses, setting
from tests.support.ranks import run_on_ranks
from tests.support.runs import demo_experiment, run_trainer, train_on

# With micro-steps, whose gradients are added in fp32.
BF16 = (*setting("zero0_bf16"), "--train.micro_batch_size=4")


def trainings(digits, place) -> Any:
    """Runs on a rank: by autocast as on a CPU, with masters as on a GPU, and that resumed."""
    world = join_world(needs_process_group=True)
    found = {"autocast": train_on(world, demo_experiment(digits, place / "autocast", *BF16))}
    replaced: Any = build
    replaced.casts_weights_once = lambda experiment, device: True
    trainer = build_trainer(demo_experiment(digits, place / "masters", *BF16), world)
    found["masters"] = run_trainer(trainer)
    masters = trainer.engine.masters()
    for name, weight in trainer.engine.network.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight.detach().view(-1), masters[name].data.bfloat16()), name
    assert any(not torch.equal(m.data, m.data.bfloat16().float()) for m in masters.values())
    resumed = place / "resumed"
    train_on(world, demo_experiment(digits, resumed, *BF16, HALF_WAY))
    found["rest"] = train_on(world, demo_experiment(digits, resumed, *BF16), resume=True)
    world.leave()
    return {name: losses(records) for name, records in found.items()}


@pytest.mark.slow
def test_zero0_trains_as_by_autocast_and_resumes_to_the_last_bit(digits, tmp_path):
    found = run_on_ranks(2, trainings, digits, tmp_path)[0]
    assert found["masters"] == pytest.approx(found["autocast"], rel=1e-2)
    assert found["masters"] != found["autocast"]
    assert found["rest"] == found["masters"][HALF:]


def test_gradients_of_micro_steps_are_added_in_fp32():
    network = torch.nn.Linear(1, 1, bias=False)
    masters = Masters(network, torch.device("cpu"))
    for gradient in (1.0, 2.0**-10):  # whose sum bf16 does not have
        masters(torch.full((1, 1), gradient, dtype=torch.bfloat16)).sum().backward()
    assert network.weight.grad is None
    assert [float(p.grad) for p in masters.parameters() if p.grad is not None] == [1 + 2.0**-10]
