"""One step as the GPU is asked for it: how many launches, of what, and who waits for whom."""

import pytest

from tests.gpu_stub.build import H100
from tests.gpu_stub.log import launches, read_log, summary

pytestmark = pytest.mark.slow

DEPTH = 2
WIDE = (
    "--model.variant=null", "--model.hidden_size=1024", "--model.num_heads=16",
    "--model.patch_size=2", f"--model.depth={DEPTH}",
    "--train.micro_batch_size=32", "--train.global_batch_size=64",
)  # fmt: skip
"""Two blocks of a DiT-L/2, whose shapes choose the kernels, and two micro-steps."""


@pytest.fixture(scope="module")
def eager(machine):
    log = machine.folder / "single_eager.log"
    overrides = [*WIDE, "--engine.type=single", "--engine.compile=false"]
    figures = machine.call("record_step", log, overrides, H100, 1)
    assert figures["steps"] == [1, 2, 3, 4]
    return read_log(log)


def test_a_network_trains_where_kernels_run_nothing(eager, tell):
    tell(f"single eager, {DEPTH} blocks of L/2, a step of 2 micro-steps:\n{summary(eager)}")
    kernels = " ".join(word for entry in eager for word in entry.words)
    # The kernels of a GPU of this kind, on the dispatch of PyTorch and xformers as they are.
    assert "flash" in kernels
    assert "FusedAdam" in kernels
    assert sum(entry.kind == "GEMM" for entry in eager) > 2 * 3 * 4 * DEPTH


def test_the_update_takes_few_launches(eager, tell):
    found = launches(eager, "engine.step")
    tell(f"launches of engine.step, single: {found}")
    assert found <= 25  # norm, clip and fused AdamW, by lists of tensors
