"""The planned memory beside that of real runs, byte by byte of PyTorch's allocator on a CPU.

`tests/gpu_stub/test_memory.py` does the same by its allocator for GPUs.
"""

import contextlib
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.gpus import find_gpu
from dtr_scale.jobs.plan.layout import Layout
from dtr_scale.jobs.plan.memory import Memory, Sizes, checkpoint_bytes, rank_memory
from dtr_scale.jobs.plan.planner import Planner
from dtr_scale.jobs.plan.trace import trace_step
from tests.support.ranks import run_on_ranks

CONFIG = Path(__file__).parents[3] / "configs" / "demo_digits.json"
LONE = World(0, 0, 1, torch.device("cpu"))
# In fp32, since bf16's attention on a CPU is not the fused one that is planned for.
SETTINGS = (
    "--data.type=synthetic", "--data.num_workers=0", "--tracking.type=none",
    "--engine.precision=fp32", "--engine.compile=false", "--train.ema_decays=[0.9]",
)  # fmt: skip
ENGINES = {
    **{f"zero-{k}": ("--engine.type=deepspeed", f"--engine.zero_stage={k}") for k in range(4)},
    "fsdp2": ("--engine.type=fsdp2",),
    "flat": ("--engine.type=flat",),
}


def experiment_of(place: Path, *overrides: str) -> Experiment:
    return load_experiment(CONFIG, [*SETTINGS, f"--run_dir={place}", *overrides])


def measured(experiment: Experiment, world: World) -> tuple[int, int]:
    """Return the bytes of all tensors between two steps, and at the fullest moment of one."""
    gc.collect()
    before = _bytes_of_tensors()
    trainer = build_trainer(experiment, world)
    batches = iter(trainer.loader)
    for _ in range(2):
        trainer._train_step(batches)
    gc.collect()
    resting = _bytes_of_tensors() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        trainer._train_step(batches)
    # What the allocator has told; torch has no public list of it.
    profiler: Any = profiled.profiler
    live = peak = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    trainer.loader.close()
    trainer.checkpoints.close()
    return resting, resting + peak


def _bytes_of_tensors() -> int:
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            # Wrappers of other tensors and fake ones, by other tests, have no memory to tell of.
            with contextlib.suppress(RuntimeError, UserWarning):
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def planned(experiment: Experiment, ranks: int) -> tuple[Planner, Memory]:
    planner = Planner(experiment, Cluster(find_gpu("a100-80gb"), ranks))
    return planner, planner.memory(replace(planner.layout(), on_gpu=False))


@pytest.mark.filterwarnings("ignore::UserWarning:torch.profiler")
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--engine.activation_checkpointing=true",),
        # A sixth of the network is trained: no gradients of the rest, nor what they are made of.
        ("--train.freeze=*embedder*,blocks.0.*,blocks.1.*,blocks.2.*,blocks.3.attn.*",),
    ],
)
def test_one_process(tmp_path, extra):
    experiment = experiment_of(tmp_path, "--engine.type=single", *extra)
    resting, peak = measured(experiment, LONE)
    planner, memory = planned(experiment, 1)
    state = memory.weights + memory.optimizer + memory.ema
    # What else rests is the position table, masks and a batch.
    assert state <= resting <= 1.005 * state
    assert state == checkpoint_bytes(planner.sizes)
    # Nor is what the loss makes of the batch counted.
    assert memory.total == pytest.approx(peak, rel=0.005)


def test_in_bf16_on_a_gpu_one_process_has_the_flat_engine():
    sizes = Sizes(1000, 1000, 100, 200, averages=1)

    def planned_memory(name: str, *, on_gpu: bool) -> Memory:
        return rank_memory(Layout(name, 1, 1, "bf16", on_gpu), sizes, 0.0)

    assert planned_memory("single", on_gpu=True) == planned_memory("flat", on_gpu=True)
    assert planned_memory("single", on_gpu=False) == planned_memory("zero-0", on_gpu=False)


def test_autocasts_copies_of_weights_are_no_activations(tmp_path):
    """They do not grow with the micro-batch, and are counted once, among the buffers."""
    experiment = experiment_of(tmp_path)
    traces = [trace_step(experiment, micro, precision="autocast") for micro in (8, 16)]
    constant = 2 * traces[0].peak_bytes - traces[1].peak_bytes
    assert constant < 0.1 * 2 * traces[0].num_parameters


def _on_ranks(place: Path) -> dict[str, int]:
    world = join_world(needs_process_group=True)
    found = {name: measured(experiment_of(place, *ENGINES[name]), world)[1] for name in ENGINES}
    world.leave()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_engine(tmp_path, ranks):
    """Of 42 to 477 MB, most of which is DeepSpeed's buckets of 50 million elements."""
    for name, peak in run_on_ranks(ranks, _on_ranks, tmp_path)[0].items():
        _, memory = planned(experiment_of(tmp_path, *ENGINES[name]), ranks)
        assert 0.995 * peak <= memory.total <= 1.1 * peak, name
