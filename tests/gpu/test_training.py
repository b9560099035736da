"""Ten steps of DiT-B/2 under DeepSpeed ZeRO-1 on one GPU, with the figures that people ask for."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.engines.world import join_world
from dtr_scale.jobs.build import build_trainer
from tests.support.ranks import run_on_ranks
from tests.support.runs import ROOT, run_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # torch.compile and DeepSpeed deprecate each other
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"),
]

STEPS, BATCH, GMACS = 10, 64, 23.01
"""GMACs of one DiT-B/2 forward of one sample: table 7 of the paper."""


def ten_steps(compiled: bool, place: Path) -> dict[str, Any]:
    """Train on the GPU, in a process of its own: DeepSpeed keeps state that outlives a run."""
    experiment = load_experiment(
        ROOT / "configs" / "dit_l_dtr_antuw.json",
        [
            "--model.variant=DiT-B/2", "--data.type=synthetic", f"--run_dir={place}",
            f"--train.max_steps={STEPS}", f"--train.global_batch_size={BATCH}",
            f"--train.micro_batch_size={BATCH}", "--train.log_every=1",
            f"--engine.compile={str(compiled).lower()}", "--tracking.type=none",
            "--evaluation.every_steps=0", "--checkpoint.every_steps=1000",
        ],
    )  # fmt: skip
    world = join_world(needs_process_group=True)
    records = run_trainer(build_trainer(experiment, world))
    figures = {
        "records": records,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    world.leave()
    return figures


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dit_b_steps_under_zero1(compiled, tmp_path, capsys):
    (figures,) = run_on_ranks(1, ten_steps, compiled, tmp_path)
    records = figures["records"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["mse"] == pytest.approx(1.0, abs=0.02)  # adaLN-Zero predicts no noise
    assert records[-1]["mse"] < records[0]["mse"]
    rates = sorted(record["samples_per_second"] for record in records[3:])
    rate = rates[len(rates) // 2]
    tflops = 3 * 2 * GMACS * rate / 1e3  # a backward costs two forwards
    with capsys.disabled():
        print(
            f"\n{figures['gpu']}: DiT-B/2 ZeRO-1 bf16 batch {BATCH} "
            f"{'compiled' if compiled else 'eager'}: {rate:.0f} images/s "
            f"({rates[0]:.0f} to {rates[-1]:.0f}), {tflops:.1f} TFLOP/s, "
            f"{figures['peak_gb']:.1f} GB"
        )
