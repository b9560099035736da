"""What makes a step fast changes its losses by rounding alone."""

import pytest

from dtr_scale.jobs.train import train_experiment
from tests.support.runs import demo_experiment, journal

PLAIN = ("--engine.type=single", "--engine.compile=false")
FAST = ("--engine.type=flat", "--engine.compile=true")
STEPS = ("--train.max_steps=50", "--evaluation.every_steps=0")


# torch.compile warns of what its own code has deprecated.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "figures", "most"),
    [
        ("fp32", ("loss", "objective"), 1e-5),
        # Not vb, of which one sample of the last timestep makes most, and bf16 keeps two digits.
        ("bf16", ("mse", "objective"), 1e-2),
    ],
)
def test_fifty_compiled_steps_lose_what_plain_ones_do(digits, tmp_path, precision, figures, most):
    for name, settings in (("plain", PLAIN), ("fast", FAST)):
        given = (*settings, f"--engine.precision={precision}", *STEPS)
        assert train_experiment(demo_experiment(digits, tmp_path / name, *given)) == 0
    plain, fast = journal(tmp_path / "plain"), journal(tmp_path / "fast")
    assert len(plain) == len(fast) == 50
    for figure in figures:
        found = [record[figure] for record in fast]
        assert found == pytest.approx([record[figure] for record in plain], abs=most), figure
