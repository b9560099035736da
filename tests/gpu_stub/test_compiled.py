"""Compiled blocks: one graph, few kernels of their own that move few bytes, and a warm cache."""

import pytest

from tests.gpu_stub.build import A100, H100
from tests.gpu_stub.log import read_log
from tests.gpu_stub.test_step import DEPTH, WIDE, WORLD
from tests.support.engine_jobs import ENGINES

pytestmark = pytest.mark.slow

KERNELS = {"forward": 5, "backward": 14, "sampling": 4}
GIGABYTES, SAMPLING_GIGABYTES = 0.94, 0.18
GELU = "36"
"""Of a matrix product that adds a bias and applies GELU: cuBLASLt's CUBLASLT_EPILOGUE_GELU_BIAS."""


@pytest.mark.parametrize(("attention", "gpu"), [("sdpa", H100), ("xformers", A100)])
def test_a_block_is_one_graph_of_few_kernels(attention, gpu, machine, tell):
    log = machine.folder / f"block_{attention}.log"
    figures = machine.call("compile_block", log, attention, gpu)
    entries = read_log(log)
    kernels = {part: count(entries, part, "TRITON") for part in KERNELS}
    *trained, sampled = figures["gigabytes"]
    tell(
        f"a compiled block, {attention}: {kernels['forward']:g} kernels of its own forward and "
        f"{kernels['backward']:g} backward move {sum(trained):.3f} GB; without gradients "
        f"{kernels['sampling']:g} move {sampled:.3f} GB"
    )
    # One to train, one without gradients.
    assert (figures["graphs"], figures["breaks"]) == (2, 0)
    for part, budget in KERNELS.items():
        assert 0 < kernels[part] <= budget
    assert 0 < sum(trained) <= GIGABYTES
    assert 0 < sampled <= SAMPLING_GIGABYTES
    # GELU is part of its product where no gradient needs what enters it.
    assert [count(entries, part, "GEMM", GELU) for part in KERNELS] == [0, 0, 1]


def test_autocast_casts_the_product_with_a_gelu(machine):
    assert machine.call("dtype_of_mlp", H100) == "torch.bfloat16"


def count(entries, part, kind, *last):
    """Return how many entries of a part and a kind, with these last words, a block has."""
    found = [entry for entry in entries if (entry.kind, entry.part) == (kind, part)]
    return sum(not last or entry.words[-1:] == last for entry in found) / 2


LOSS_KERNELS = 4
"""Of the compiled loss, in a backward."""


def test_a_training_has_such_blocks_and_its_second_start_compiles_nothing(machine, tell):
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
        # The block alone is given contiguous tokens and bf16 weights. So must the trainer.
        entries = read_log(log)
        forward, backward = (
            2 * count(entries, f"engine.{part}", "TRITON") for part in ("forward", "backward")
        )
        tell(f"start {number}: {DEPTH} blocks, {forward:g} kernels forward, {backward:g} backward")
        assert 0 < forward <= DEPTH * KERNELS["forward"]
        assert 0 < backward <= DEPTH * KERNELS["backward"] + LOSS_KERNELS
    first, second = (start["cache"] for start in starts)
    assert first["fxgraph_cache_miss"] > 0
    assert second.get("fxgraph_cache_miss", 0) == second.get("autograd_cache_miss", 0) == 0
    assert second["autograd_cache_hit"] > 0
