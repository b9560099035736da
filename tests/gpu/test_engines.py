"""Every engine on one GPU in bf16: the same training, checkpoints for each other, memory."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.engines.world import join_world
from dtr_scale.jobs.build import build_trainer
from dtr_scale.tracking.journal import Record
from tests.support.ranks import run_on_ranks
from tests.support.runs import ROOT, run_trainer, train_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch.compile and DeepSpeed deprecate each other
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"),
]

STEPS, HALF = 10, 5
TIMEOUT_SECONDS = 1200
ENGINES = {
    "single": ("--engine.type=single",),
    **{f"zero{k}": ("--engine.type=deepspeed", f"--engine.zero_stage={k}") for k in range(4)},
    "fsdp2": ("--engine.type=fsdp2",),
    "flat": ("--engine.type=flat",),
}


def experiment(place: Path, variant: str, batch_size: int, *overrides: str) -> Any:
    return load_experiment(
        ROOT / "configs" / "dit_l_dtr_antuw.json",
        [
            f"--model.variant={variant}", "--data.type=synthetic", f"--run_dir={place}",
            f"--train.max_steps={STEPS}", f"--train.global_batch_size={2 * batch_size}",
            f"--train.micro_batch_size={batch_size}", "--train.log_every=1",
            "--train.grad_clip=1", "--tracking.type=none", "--evaluation.every_steps=0",
            "--checkpoint.every_steps=1000", "--engine.compile=false", *overrides,
        ],
    )  # fmt: skip


@contextlib.contextmanager
def one_gpu() -> Any:
    world = join_world(needs_process_group=True)
    yield world
    world.leave()


def trainings(place: Path) -> dict[str, list[Record]]:
    """Runs in a process of its own: DeepSpeed keeps state that outlives a run."""
    with one_gpu() as world:
        records = {}
        for name, engine in ENGINES.items():
            settings = experiment(place / name, "DiT-S/2", 8, *engine)
            records[name] = train_on(world, settings)
            compiled = (*engine, "--engine.compile=true")
            settings = experiment(place / f"{name}_compiled", "DiT-S/2", 8, *compiled)
            records[f"{name}_compiled"] = train_on(world, settings)
            half = (*engine, f"--train.max_steps={HALF}")
            train_on(world, experiment(place / f"{name}_half", "DiT-S/2", 8, *half))
        for before in ENGINES:
            for after, engine in ENGINES.items():
                run_dir = place / f"{before}_then_{after}"
                shutil.copytree(place / f"{before}_half", run_dir)
                settings = experiment(run_dir, "DiT-S/2", 8, *engine)
                records[f"{before}_then_{after}"] = train_on(world, settings, resume=True)
    return records


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    return run_on_ranks(1, trainings, place, timeout_seconds=TIMEOUT_SECONDS)[0]


def losses(records):
    return [record["loss"] for record in records]


@pytest.mark.parametrize("compiled", ["", "_compiled"], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ENGINES)
def test_engines_train_the_same_network(runs, name, compiled):
    expected = pytest.approx(losses(runs["single"]), rel=2e-2)
    assert losses(runs[f"{name}{compiled}"]) == expected


@pytest.mark.parametrize("before", ENGINES)
def test_every_engine_goes_on_from_every_other(runs, before):
    for after in ENGINES:
        resumed = losses(runs[f"{before}_then_{after}"])
        assert resumed == pytest.approx(losses(runs["single"])[HALF:], rel=2e-2), after


def peak_of_dit_l(place: Path, engine: tuple[str, ...]) -> tuple[str, float]:
    """Return the GPU and the most memory that three steps of two micro-batches of 32 took."""
    with one_gpu() as world:
        three = ("--train.max_steps=3", *engine)
        trainer = build_trainer(experiment(place, "DiT-L/2", 32, *three), world)
        unsaved: Any = trainer
        unsaved._save_for_certain = lambda result: None  # 7 GB on disk
        torch.cuda.reset_peak_memory_stats()
        run_trainer(trainer)
    return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 1e9


@pytest.mark.parametrize("name", ENGINES)
def test_memory_of_dit_l(tmp_path, capsys, name):
    ((gpu, peak_gb),) = run_on_ranks(1, peak_of_dit_l, tmp_path, ENGINES[name])
    with capsys.disabled():
        print(f"\n{gpu}: DiT-L/2 {name} bf16, micro-batch 32: {peak_gb:.1f} GB at most")
    assert peak_gb > 458e6 * 20 / 1e9  # weights, gradients, Adam's moments and EMA, in fp32
