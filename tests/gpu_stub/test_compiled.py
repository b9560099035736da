"""Compiled blocks: one graph, few kernels of their own that move few bytes, and a warm cache."""

import pytest

from tests.gpu_stub.build import A100, H100
from tests.gpu_stub.log import read_log
from tests.gpu_stub.test_step import WIDE, WORLD
from tests.support.engine_jobs import ENGINES

pytestmark = pytest.mark.slow

FORWARD_KERNELS, BACKWARD_KERNELS, GIGABYTES = 5, 14, 0.94


@pytest.mark.parametrize(("attention", "gpu"), [("sdpa", H100), ("xformers", A100)])
def test_a_block_is_one_graph_of_few_kernels(attention, gpu, machine, tell):
    log = machine.folder / f"block_{attention}.log"
    figures = machine.call("compile_block", log, attention, gpu)
    entries = read_log(log)
    forward, backward = (
        sum(entry.kind == "TRITON" and entry.part == part for entry in entries) / 2
        for part in ("forward", "backward")
    )
    gigabytes = sum(figures["gigabytes"])
    tell(
        f"a compiled block, {attention}: {forward:g} kernels of its own forward and {backward:g} "
        f"backward move {gigabytes:.3f} GB"
    )
    assert (figures["graphs"], figures["breaks"]) == (1, 0)
    assert 0 < forward <= FORWARD_KERNELS
    assert 0 < backward <= BACKWARD_KERNELS
    assert 0 < gigabytes <= GIGABYTES


def test_the_second_start_compiles_nothing(machine, tell):
    overrides = [
        *WIDE, *ENGINES["zero1"], f"--train.global_batch_size={32 * WORLD}",
        "--engine.compile=true", "--model.attention=sdpa",
    ]  # fmt: skip
    starts = []
    for number in range(2):
        log = machine.folder / f"start_{number}.log"
        starts.append(machine.call("record_step", log, overrides, H100, WORLD))
        tell(f"start {number}: {starts[-1]['cache']}")
        assert starts[-1]["breaks"] == 0
    first, second = (start["cache"] for start in starts)
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == second.get("autograd_cache_miss", 0) == 0
    assert second["autograd_cache_hit"] > 0
