"""`engine.type = "single"` as a GPU has it in bf16, the flat engine with one rank, on a CPU."""

import pytest

from dtr_scale.engines.flat import FlatEngine
from dtr_scale.engines.single import SingleEngine
from dtr_scale.jobs import build
from dtr_scale.jobs.build import build_trainer
from tests.support.engine_jobs import HALF, HALF_WAY, LONE, losses, setting
from tests.support.runs import demo_experiment, run_trainer, train_on

# With micro-steps, whose gradients are added in fp32.
BF16 = (*setting("single_bf16"), "--train.micro_batch_size=4")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Choose as on a GPU, from when it is called."""
    chosen = lambda experiment, device: experiment.engine.precision == "bf16"  # noqa: E731
    return lambda: monkeypatch.setattr(build, "casts_weights_once", chosen)


def test_its_losses_are_those_of_autocast(digits, tmp_path, on_a_gpu):
    trained = {}
    for kind in (SingleEngine, FlatEngine):
        trainer = build_trainer(demo_experiment(digits, tmp_path / kind.__name__, *BF16), LONE)
        assert type(trainer.engine) is kind
        trained[kind] = losses(run_trainer(trainer))
        on_a_gpu()
    assert trained[FlatEngine] == pytest.approx(trained[SingleEngine], rel=1e-2)
    assert trained[FlatEngine] != trained[SingleEngine]


def test_it_resumes_to_the_last_bit(digits, tmp_path, on_a_gpu):
    on_a_gpu()
    through = train_on(LONE, demo_experiment(digits, tmp_path / "through", *BF16))
    resumed = tmp_path / "resumed"
    train_on(LONE, demo_experiment(digits, resumed, *BF16, HALF_WAY))
    rest = train_on(LONE, demo_experiment(digits, resumed, *BF16), resume=True)
    assert losses(rest) == losses(through)[HALF:]


def test_in_fp32_it_is_itself_everywhere(digits, tmp_path, on_a_gpu):
    on_a_gpu()
    experiment = demo_experiment(digits, tmp_path, *setting("single_fp32"))
    assert type(build_trainer(experiment, LONE).engine) is SingleEngine
