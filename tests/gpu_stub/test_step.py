"""One step as the GPU is asked for it: what is launched and exchanged, and who waits for whom."""

from typing import Any, NamedTuple

import pytest

from dtr_scale.engines.fsdp2 import GROUP_SIZE
from tests.gpu_stub.build import H100
from tests.gpu_stub.log import Entry, exchanged, late_reductions, launches, read_log, summary
from tests.support.engine_jobs import ENGINES

pytestmark = pytest.mark.slow

DEPTH, MICRO_STEPS, WORLD = 4, 2, 8
WIDE = (
    "--model.variant=null", "--model.hidden_size=1024", "--model.num_heads=16",
    "--model.patch_size=2", f"--model.depth={DEPTH}", "--train.micro_batch_size=32",
    "--data.num_workers=1",  # which pins the samples
)  # fmt: skip
"""Some blocks of a DiT-L/2, whose shapes choose the kernels."""
RECORDED = {"single": 1, "zero1": WORLD, "fsdp2": WORLD, "hsdp": WORLD, "flat": WORLD}


class Step(NamedTuple):
    """A step of an engine, eager."""

    engine: str
    entries: list[Entry]
    figures: dict[str, Any]


@pytest.fixture(scope="module", params=RECORDED)
def step(request, machine, tmp_path_factory):
    engine, world_size = request.param, RECORDED[request.param]
    log = tmp_path_factory.mktemp(engine) / "step.log"
    batch = f"--train.global_batch_size={32 * MICRO_STEPS * world_size}"
    overrides = [*WIDE, *ENGINES[engine], batch, "--engine.compile=false"]
    figures = machine.call("record_step", log, overrides, H100, world_size)
    assert figures["steps"] == [1, 2, 3, 4, 5]
    return Step(engine, read_log(log), figures)


def test_a_network_trains_where_kernels_run_nothing(step, tell):
    tell(
        f"{step.engine}, {DEPTH} blocks of L/2, {MICRO_STEPS} micro-steps:\n{summary(step.entries)}"
    )
    kernels = " ".join(word for entry in step.entries for word in entry.words)
    # The kernels of a GPU of this kind, on the dispatch of PyTorch and xformers as they are.
    assert "flash" in kernels
    assert "FusedAdam" in kernels
    # Forward, gradients of inputs and of weights.
    products = sum(entry.kind == "GEMM" for entry in step.entries)
    assert products >= MICRO_STEPS * 3 * 5 * DEPTH


# What DeepSpeed waits for by itself: the GPU once where it overlaps its exchanges, and three times
# in a norm that it searches for nan.
OWN_WAITS = {"zero1": 4}


def test_the_host_waits_for_nothing_in_a_step(step, tell):
    waits = [entry for entry in step.entries if entry.is_wait]
    tell(f"{step.engine}: {len(waits)} waits of the host in a step")
    ours = [place for place in step.figures["waits"] if "/deepspeed/" not in place]
    assert not ours
    assert len(waits) <= OWN_WAITS.get(step.engine, 0), waits


# Of a micro-step, eager, and of all that follows the last backward.
BUDGETS = {
    "single": (610, 42), "zero1": (650, 95), "fsdp2": (620, 45), "hsdp": (620, 45),
    "flat": (610, 38),
}  # fmt: skip
UPDATE = ("engine.step", "after_engine.step", "objective.update", "after_objective.update")


def test_launches_stay_within_their_budget(step, tell):
    update = sum(launches(step.entries, part) for part in UPDATE)
    micro_step = (launches(step.entries) - update) // MICRO_STEPS
    tell(f"{step.engine}: {micro_step} launches a micro-step of {DEPTH} blocks, {update} an update")
    assert micro_step <= BUDGETS[step.engine][0]
    assert update <= BUDGETS[step.engine][1]


def test_all_reductions_but_the_last_begin_inside_the_backward(step, tell):
    late = late_reductions(step.entries)
    total = sum(entry.is_reduction for entry in step.entries)
    tell(f"{step.engine}: {late} of {total} reductions begin after the last product")
    # HSDP's is followed by that of the shards.
    assert late <= (2 if step.engine == "hsdp" else 1)
    assert total == 0 if step.engine == "single" else total > 1


def test_ranks_exchange_what_the_formula_says(step, tell):
    """Gradients in fp32, weights in bf16; a reduction or a gathering counts as its whole tensor."""
    parameters = step.figures["parameters"]
    expected = {
        "single": {},
        "zero1": {"all_reduce": 4 * parameters, "all_gather": 2 * parameters},
        # Weights stay gathered from the first forward to the end of the last backward.
        "fsdp2": {"all_gather": 2 * parameters, "reduce_scatter": 4 * parameters},
        # Two copies of the weights, whose shards are summed.
        "hsdp": {
            "all_gather": 2 * parameters,
            "reduce_scatter": 4 * parameters,
            "all_reduce": 4 * parameters / (WORLD / 2),
        },
        "flat": {"reduce_scatter": 4 * parameters, "all_gather": 2 * parameters},
    }[step.engine]
    found = exchanged(step.entries)
    megabytes = {operation: f"{size / 1e6:.1f} MB" for operation, size in found.items()}
    number = sum(entry.is_exchange for entry in step.entries)
    tell(f"{step.engine}: {number} exchanges, {megabytes}, {parameters / 1e6:.1f}M parameters")
    assert found == pytest.approx(expected, rel=1e-3)  # parts are padded
    # Of each group of blocks, and of all that is outside of blocks.
    groups = DEPTH // GROUP_SIZE + 1
    limits = {"single": 0, "zero1": 3, "fsdp2": 2 * groups, "hsdp": 3 * groups}
    assert number <= limits.get(step.engine, 2 * (DEPTH + 1))
