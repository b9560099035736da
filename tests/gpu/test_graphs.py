"""CUDA graphs on a GPU: the training of the same engine without them, faster for small networks."""

from pathlib import Path
from statistics import median

import pytest
import torch

from dtr_scale.tracking.journal import Record
from tests.gpu.test_engines import ENGINES, STEPS, experiment, losses, one_gpu
from tests.support.ranks import run_on_ranks
from tests.support.runs import train_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and -m gpu"),
]

GRAPHS = "--engine.cuda_graphs=true"
HALF = STEPS // 2


def trainings(place: Path, compiled: bool) -> dict[str, list[Record]]:
    """Runs in a process of its own: without graphs, with them, and with them in two runs."""
    settings = (*ENGINES["flat"], f"--engine.compile={str(compiled).lower()}")
    half = (*settings, GRAPHS, f"--train.max_steps={HALF}")
    with one_gpu() as world:
        return {
            "plain": train_on(world, experiment(place / "plain", "DiT-S/2", 32, *settings)),
            "graphs": train_on(
                world, experiment(place / "graphs", "DiT-S/2", 32, *settings, GRAPHS)
            ),
            "begun": train_on(world, experiment(place / "parts", "DiT-S/2", 32, *half)),
            "resumed": train_on(
                world, experiment(place / "parts", "DiT-S/2", 32, *settings, GRAPHS), resume=True
            ),
        }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_graphs_train_as_the_engine_does_without(compiled, tmp_path, capsys):
    (found,) = run_on_ranks(1, trainings, tmp_path, compiled)
    # Attention adds up its gradients in any order, so equal runs differ in their last bits.
    expected = pytest.approx(losses(found["plain"]), rel=1e-2)
    assert losses(found["graphs"]) == expected
    assert losses(found["begun"]) + losses(found["resumed"]) == expected
    rates = {
        name: median(record["samples_per_second"] for record in found[name][HALF:])
        for name in ("plain", "graphs")
    }
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}: DiT-S/2 flat, micro-batch 32, "
            f"{'compiled' if compiled else 'eager'}: {rates['plain']:.0f} images/s without CUDA "
            f"graphs, {rates['graphs']:.0f} with"
        )
