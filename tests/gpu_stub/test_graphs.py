"""Micro-steps as CUDA graphs: what is captured, and what is left for each of them to launch."""

from typing import NamedTuple

import pytest

from dtr_scale.engines.graphs import WARM_UP_CALLS
from tests.gpu_stub.build import H100
from tests.gpu_stub.cases import NETWORKS, Case
from tests.gpu_stub.log import Entry, exchanged, launches, read_log, summary
from tests.gpu_stub.test_step import DEPTH, MICRO_STEPS, UPDATE, WIDE, WORLD

pytestmark = pytest.mark.slow

GRAPHS = ("--engine.type=flat", "--engine.cuda_graphs=true")
INPUTS = 6
"""Tensors of a micro-batch, and the counts of the clusters."""


class Steps(NamedTuple):
    """The step that captures, one that replays, and the parameters that they train."""

    captured: list[Entry]
    replayed: list[Entry]
    waits: list[str]
    parameters: int


@pytest.fixture(scope="module", params=["eager", "compiled"])
def steps(request, machine, tmp_path_factory):
    place = tmp_path_factory.mktemp("graphs")
    capture, replay = place / "capture.log", place / "replay.log"
    overrides = [
        *WIDE, *GRAPHS, f"--train.global_batch_size={32 * MICRO_STEPS * WORLD}",
        f"--engine.compile={str(request.param == 'compiled').lower()}", "--model.attention=sdpa",
    ]  # fmt: skip
    others = [(WARM_UP_CALLS + 1, capture)]
    figures = machine.call("record_step", replay, overrides, H100, WORLD, 5, others)
    assert figures["steps"] == [1, 2, 3, 4, 5]
    assert figures["breaks"] == 0
    return Steps(read_log(capture), read_log(replay), figures["waits"], figures["parameters"])


def kinds(entries, kind):
    return [entry for entry in entries if entry.kind == kind]


def test_a_capture_takes_up_all_of_a_micro_step(steps):
    captured = kinds(steps.captured, "CAPTURED")
    products = [entry for entry in captured if entry.words[0] == "GEMM"]
    assert len(products) >= MICRO_STEPS * 3 * 5 * DEPTH
    assert not kinds(steps.captured, "GEMM")
    assert "flash" in " ".join(word for entry in captured for word in entry.words)
    # Nothing that the host must be there for, and nothing of another stream.
    assert {entry.words[0] for entry in captured} <= {"KERNEL", "TRITON", "GEMM", "COPY", "MEMSET"}
    assert not [entry for entry in captured if entry.is_wait]


def test_a_micro_step_is_one_launch_and_its_inputs(steps, tell):
    update = sum(launches(steps.replayed, part) for part in UPDATE)
    micro_step = (launches(steps.replayed) - update) // MICRO_STEPS
    tell(
        f"flat with graphs, {micro_step} launches a micro-step of {DEPTH} blocks, {update} an "
        f"update:\n{summary(steps.replayed)}"
    )
    graphs = kinds(steps.replayed, "GRAPH")
    assert len(graphs) == MICRO_STEPS
    assert not kinds(steps.replayed, "GEMM") and not kinds(steps.replayed, "CAPTURED")
    # All that was captured, the first micro-step's and that of the others.
    nodes = sum(int(entry.words[1]) for entry in graphs)
    assert nodes == len(kinds(steps.captured, "CAPTURED"))
    copies = [entry.words[1] for entry in kinds(steps.replayed, "COPY")]
    assert copies.count("D2D") >= MICRO_STEPS * INPUTS
    assert micro_step <= 30
    assert update <= 45


def test_the_host_waits_for_nothing_between_replays(steps):
    assert not steps.waits
    assert not [entry for entry in steps.replayed if entry.is_wait]


def test_ranks_exchange_the_same_after_the_last_replay(steps):
    last = max(n for n, entry in enumerate(steps.replayed) if entry.kind == "GRAPH")
    reductions = [n for n, entry in enumerate(steps.replayed) if entry.is_reduction]
    assert len(reductions) == DEPTH + 1
    assert min(reductions) > last
    expected = {"reduce_scatter": 4 * steps.parameters, "all_gather": 2 * steps.parameters}
    assert exchanged(steps.replayed) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("engine", "network"), [("flat", "text"), ("single", "adm")])
def test_it_captures_saves_evaluates_resumes_and_samples(engine, network, machine, tmp_path):
    """A run of four steps and four more, each of which captures by itself."""
    case = Case(engine, network, "sdpa", compiled=False, gpu=H100, world_size=1).arguments()
    case["overrides"] += ["--engine.cuda_graphs=true", "--engine.activation_checkpointing=true"]
    (result,) = machine.call("live", tmp_path, [{**case, "steps": (4, 8)}])
    assert not result["error"], result["error"]
    # Of two kinds of micro-steps, in two runs.
    assert result["replays"] == 2 * 2 * (4 - WARM_UP_CALLS)


def test_what_the_host_waits_for_cannot_be_captured(machine, tmp_path):
    batch = ("--train.global_batch_size=8", "--train.micro_batch_size=8")
    overrides = [*NETWORKS["class"], *GRAPHS, *batch, "--engine.compile=false"]
    told = machine.call("capture_a_wait", tmp_path, overrides, H100)
    assert told == (
        f"step {WARM_UP_CALLS + 1}: engine.cuda_graphs = true: a micro-step of this network cannot "
        "be captured (CUDA error: not permitted when a stream is capturing); give "
        "engine.cuda_graphs=false"
    )
