"""What the flat engine asks of a GPU and of NCCL in one step, as rank 0 of 8."""

import pytest

from tests.gpu_stub.build import H100
from tests.gpu_stub.log import launches, read_log, summary

pytestmark = pytest.mark.slow

RANKS, DEPTH = 8, 2
BLOCK, OUTSIDE = 18_889_728, 4_487_680
"""Elements of a block of a DiT-L/2, and of all that is outside of blocks with its padding."""
OVERRIDES = (
    "--engine.type=flat", "--engine.compile=false", "--model.variant=null",
    "--model.hidden_size=1024", "--model.num_heads=16", "--model.patch_size=2",
    f"--model.depth={DEPTH}", "--train.micro_batch_size=32",
    f"--train.global_batch_size={RANKS * 64}",
)  # fmt: skip


@pytest.fixture(scope="module")
def step(machine, tmp_path_factory):
    """The log of a step of two micro-steps."""
    log = tmp_path_factory.mktemp("flat") / "step.log"
    machine.call("record_step", log, OVERRIDES, H100, RANKS)
    return read_log(log)


def places(entries, kind, word=""):
    """Return where in the log entries of a kind are that hold a word."""
    return [n for n, e in enumerate(entries) if e.kind == kind and word in " ".join(e.words)]


def test_blocks_are_reduced_before_the_backward_has_queued_its_last_product(step, tell):
    tell(f"flat, {DEPTH} blocks of L/2, {RANKS} ranks, 2 micro-steps:\n{summary(step)}")
    reductions = places(step, "NCCL", "reduce_scatter")
    assert [step[place].num_bytes for place in reductions] == [*DEPTH * [4 * BLOCK], 4 * OUTSIDE]
    last_product = max(places(step, "GEMM"))
    assert [place < last_product for place in reductions] == [*DEPTH * [True], False]
    # On NCCL's own stream, beside the backward.
    assert {step[place].words[0] for place in reductions} != {"(nil)"}


def test_a_forward_begins_before_all_weights_are_there(step):
    gathers = places(step, "NCCL", "all_gather")
    assert [step[place].num_bytes for place in gathers] == [2 * OUTSIDE, *DEPTH * [2 * BLOCK]]
    assert {step[place].part for place in gathers} == {"engine.step"}
    # Those of the step before: what is outside of blocks first, each block before its products.
    waits = [p for p in places(step, "AFTER") if step[p].part == "engine.forward"]
    products = places(step, "GEMM")
    assert len(waits) == DEPTH + 1
    assert waits[0] < products[0] < waits[1] < waits[2] < products[-1]


def test_nothing_in_the_engine_waits_and_the_update_takes_few_launches(step):
    assert not [entry for entry in step if entry.is_wait and entry.part.startswith("engine.")]
    assert launches(step, "engine.step") <= 20  # norm, verdict, AdamW, a cast per block
