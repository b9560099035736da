"""A training on two hosts outlives faults of every kind, with the journal of one left in peace."""

import pytest

from dtr_scale.jobs.bench.faults import bench_faults, faults_table
from tests.support.runs import DEMO, SMALL, demo_experiment


@pytest.mark.slow
@pytest.mark.services
def test_eight_faults_on_two_hosts_change_nothing(digits, tmp_path, capsys):
    arguments = [*SMALL, f"--data.shards={digits}", "--engine.precision=fp32"]
    report = bench_faults(
        demo_experiment(digits, tmp_path),
        ["--config", str(DEMO), *arguments],
        num=8,
        num_hosts=2,
        seed=0,
        place=str(tmp_path),
    )
    with capsys.disabled():
        print(f"\n{faults_table(report)}")
    faults = report["faults"]
    assert len({fault["kind"] for fault in faults}) == 6
    assert report["journals_equal"] == 8
    dead = {"killed", "cut", "lost"}
    for fault in faults:
        assert fault["noticed_seconds"] < (10 if fault["kind"] in dead else 30), fault
