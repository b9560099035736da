"""What the flat engine asks of a GPU and of NCCL in one step, as rank 0 of 8."""

import pytest

from tests.gpu_stub.build import H100
from tests.gpu_stub.log import exchanged, launches, read_log, summary

pytestmark = pytest.mark.slow

RANKS, DEPTH = 8, 2
BLOCK, OUTSIDE = 18_889_728, 4_487_680
"""Elements of a block of a DiT-L/2, and of all that is outside of blocks with its padding."""
UPDATE_BYTES = 4 + 6 * 4 + 2 + 2 * 8
"""Of an element: a gradient, master and moments read and written, a weight, two averages."""
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
    # Norm, verdict, AdamW, a cast, the average.
    assert launches(step, "engine.step") <= 20


def test_gradients_exchanged_in_bf16_are_half_the_bytes(machine, tmp_path, tell):
    machine.call(
        "record_step", tmp_path / "log", [*OVERRIDES, "--engine.exchange=bf16"], H100, RANKS
    )
    found = exchanged(read_log(tmp_path / "log"))
    tell(f"flat, gradients exchanged in bf16: {found}")
    assert found["reduce_scatter"] == 2 * (DEPTH * BLOCK + OUTSIDE)


@pytest.fixture(scope="module")
def compiled(machine, tmp_path_factory):
    """The log of a step whose update is compiled, and what its kernels move."""
    log = tmp_path_factory.mktemp("flat") / "update.log"
    overrides = [*OVERRIDES, "--engine.compile=true", "--train.ema_sigma_rel=[0.1]"]
    figures = machine.call("record_update", log, overrides, H100, RANKS)
    return read_log(log), figures["gigabytes"]


def test_a_compiled_update_is_one_pass_that_reads_and_writes_each_number_once(compiled, tell):
    entries, gigabytes = compiled
    # Numbers that are the same for all elements, the count of updates, and the pass.
    kernels = [e for e in entries if e.kind == "TRITON" and e.part == "engine.step"]
    num_bytes = 1e9 * gigabytes[-1] / ((DEPTH * BLOCK + OUTSIDE) / RANKS)
    tell(
        f"flat, compiled, {DEPTH} blocks, 2 averages: {launches(entries, 'engine.step')} launches "
        f"of an update, {len(kernels)} compiled, {num_bytes:.1f} bytes an element"
    )
    assert len(kernels) == 3
    assert "FusedSgd" not in " ".join(word for e in entries for word in e.words)
    assert num_bytes == pytest.approx(UPDATE_BYTES, rel=0.01)
    assert launches(entries, "engine.step") <= 15
    assert not [e for e in entries if e.is_wait and e.part.startswith("engine.")]
