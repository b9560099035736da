"""Gradients that are summed over ranks in bf16, under each engine that has ranks."""

import pytest

from tests.support.engine_jobs import (
    HALF_WAY,
    LONE,
    Job,
    losses,
    setting,
    train_all,
    train_on_ranks,
)
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.slow

ENGINES = ("flat", "fsdp2", "zero1")
BF16 = "--engine.exchange=bf16"


def test_losses_differ_from_those_of_one_process_by_the_sums_rounding_alone(digits, tmp_path):
    alone = [Job("single", (*setting("single_fp32"), HALF_WAY, BF16))]
    expected = losses(train_all(digits, tmp_path, alone, LONE)["single"])
    jobs = [Job(engine, (*setting(f"{engine}_fp32"), HALF_WAY, BF16)) for engine in ENGINES]
    for rank in run_on_ranks(2, train_on_ranks, digits, tmp_path, jobs):
        for engine in ENGINES:
            found = losses(rank[engine])
            assert found == pytest.approx(expected, rel=1e-2), engine
            # In fp32 they agree to 1e-7.
            assert found != pytest.approx(expected, rel=3e-7), engine
