"""DiT-XL/2 on two ranks of one machine: no rank may need what only all of them have room for."""

import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dtr_scale.config.load import load_experiment
from dtr_scale.engines.world import join_world
from dtr_scale.jobs.build import build_trainer
from tests.support.ranks import run_on_ranks
from tests.support.runs import ROOT, run_trainer

MAX_GB = 24
ENGINES = {
    "zero3": ("--engine.type=deepspeed", "--engine.zero_stage=3"),
    "fsdp2": ("--engine.type=fsdp2",),
}


class Figures(NamedTuple):
    mse: float
    num_elements: int
    peak_gb: float
    build_seconds: float
    step_seconds: float


def one_step(place: Path, engine: tuple[str, ...]) -> Figures:
    world = join_world(needs_process_group=True)
    experiment = load_experiment(
        ROOT / "configs" / "dit_xl_imagenet_none_vanilla.json",
        [
            "--data.type=synthetic", "--data.num_workers=0", f"--run_dir={place}",
            "--train.global_batch_size=2", "--train.micro_batch_size=1", "--train.max_steps=1",
            "--train.log_every=1", "--tracking.type=none",
            "--engine.precision=bf16", "--engine.compile=false",
            "--engine.activation_checkpointing=true", *engine,
        ],
    )  # fmt: skip
    start = time.perf_counter()
    trainer = build_trainer(experiment, world)
    built = time.perf_counter()
    unsaved: Any = trainer
    unsaved._save_for_certain = lambda result: None  # 11 GB on disk
    (record,) = run_trainer(trainer)
    figures = Figures(
        mse=record["mse"],
        num_elements=sum(piece.data.numel() for piece in trainer.engine.masters().values()),
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        build_seconds=built - start,
        step_seconds=time.perf_counter() - built,
    )
    world.leave()
    return figures


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("name", ENGINES)
def test_dit_xl_on_two_ranks(tmp_path, capsys, name):
    ranks = run_on_ranks(2, one_step, tmp_path, ENGINES[name], timeout_seconds=900)
    peak_gb = sum(rank.peak_gb for rank in ranks)
    with capsys.disabled():
        print(
            f"\nDiT-XL/2 {name} bf16, two ranks: {peak_gb:.1f} GB at most, built in "
            f"{ranks[0].build_seconds:.0f} s, a step of 2 samples {ranks[0].step_seconds:.0f} s"
        )
    assert ranks[0].mse == pytest.approx(1.0, abs=0.05)  # adaLN-Zero predicts no noise
    assert sum(rank.num_elements for rank in ranks) == pytest.approx(675e6, rel=0.01)
    assert peak_gb < MAX_GB
