"""What an update depends on is the same under every engine: the rate of a step, Adam, decay."""

import pytest

from tests.support.engine_jobs import (
    HALF_WAY,
    LONE,
    Job,
    assert_same,
    setting,
    train_all,
    train_on_ranks,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2", "flat")
# Large enough that the rate, the betas and what is decayed show in the losses.
SETTINGS = (
    HALF_WAY, "--train.lr=5e-3", "--train.warmup_steps=3", "--train.schedule=cosine",
    "--train.betas=[0.8, 0.95]", "--train.eps=1e-6", "--train.weight_decay=5",
    "--train.decayed=matrices",
)  # fmt: skip
FORGOTTEN = {
    "the schedule": ("--train.schedule=constant",),
    "the warm-up": ("--train.warmup_steps=0",),
    "the betas": ("--train.betas=[0.9, 0.999]",),
    "what is decayed": ("--train.decayed=all",),
}


def test_two_ranks_make_the_updates_of_one_process(digits, tmp_path):
    single = (*setting("single_fp32"), *SETTINGS)
    alone = train_all(
        digits,
        tmp_path,
        [Job("single", single)] + [Job(k, (*single, *v)) for k, v in FORGOTTEN.items()],
        LONE,
    )
    expected = alone.pop("single")
    for what, records in alone.items():
        with pytest.raises(AssertionError):  # this test would notice
            assert_same(records, expected, "fp32")
        assert len(records) == len(expected), what
    jobs = [Job(engine, (*setting(f"{engine}_fp32"), *SETTINGS)) for engine in ENGINES]
    for rank in run_on_ranks(2, train_on_ranks, digits, tmp_path, jobs):
        for engine, records in rank.items():
            assert_same(records, expected, "fp32")
            assert [r["lr"] for r in records] == [r["lr"] for r in expected], engine
