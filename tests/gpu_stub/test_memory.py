"""The planned memory beside what PyTorch's allocator for GPUs hands out in real steps."""

import pytest

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.gpus import find_gpu
from dtr_scale.jobs.plan.memory import Memory
from dtr_scale.jobs.plan.planner import Planner
from tests.gpu_stub.build import A100
from tests.gpu_stub.test_step import WIDE
from tests.support.engine_jobs import ENGINES
from tests.support.runs import ROOT

pytestmark = pytest.mark.slow

WORLD = 8
EAGER = (*WIDE, f"--train.global_batch_size={32 * WORLD}", "--engine.compile=false")
CASES = {
    "zero1": ENGINES["zero1"],
    # The gradients of the first are there when the second's activations are.
    "zero1, 2 micro-steps": (*ENGINES["zero1"], f"--train.global_batch_size={64 * WORLD}"),
    # Of more than the one group of blocks that it reduces together.
    "fsdp2, 12 blocks": (*ENGINES["fsdp2"], "--model.depth=12"),
    "flat, recomputed": (*ENGINES["flat"], "--engine.activation_checkpointing=true"),
}


def planned(case: tuple[str, ...]) -> Memory:
    experiment = load_experiment(ROOT / "configs/dit_l_dtr_antuw.json", [*EAGER, *case])
    planner = Planner(experiment, Cluster(find_gpu("a100-80gb"), WORLD))
    return planner.memory(planner.layout())


def test_the_plan_is_what_pytorch_hands_out(machine, tell, tmp_path):
    """To a tenth, in bf16 with eager blocks, for rank 0 of 8."""
    found = machine.call(
        "measure_memory", tmp_path, [[*EAGER, *c] for c in CASES.values()], A100, WORLD
    )
    for (name, case), (allocated, reserved) in zip(CASES.items(), found, strict=True):
        plan = planned(case).allocated
        tell(
            f"{name}: {allocated / 1e9:.2f} GB at most, {plan / 1e9:.2f} planned "
            f"({plan / allocated - 1:+.1%}), {reserved / 1e9:.2f} reserved"
        )
        assert plan == pytest.approx(allocated, rel=0.1), name
