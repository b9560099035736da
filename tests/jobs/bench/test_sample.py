"""The benchmark of sampling counts what the network is asked, and its figures fit each other."""

import json

import pytest

from dtr_scale.cli.main import main
from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.bench.sample import bench_sample
from dtr_scale.jobs.plan.compute import plan_compute
from tests.support.ranks import run_on_ranks
from tests.support.runs import DEMO, SMALL

STEPS = "--evaluation.num_sampling_steps=5"
SETTINGS = [*SMALL, STEPS, "--evaluation.batch_size=4"]
SAMPLE = ["bench", "sample", "--config", str(DEMO), *SETTINGS]


@pytest.mark.parametrize(
    ("num_samples", "overrides", "evaluations"),
    [
        (4, [], 4 * 5 * 2),
        (6, ["--evaluation.precision=bf16"], 8 * 5 * 2),  # two batches of four
        (3, ["--evaluation.cfg_scale=1"], 3 * 5),
        # Of timesteps 0, 250, 500, 749 and 999 the middle ones are guided.
        (4, ["--evaluation.cfg_interval=[200,800]"], 4 * (3 * 2 + 2)),
        (4, ["--evaluation.sampler=dpm_solver"], 4 * 5 * 2),
    ],
)
def test_every_evaluation_is_counted(num_samples, overrides, evaluations, tmp_path, capsys):
    file = tmp_path / "report.json"
    asked = ["--num-samples", str(num_samples), "--json", str(file)]
    assert main([*SAMPLE, *overrides, *asked]) == 0
    report = json.loads(file.read_text())
    rate = report["network_evaluations_per_second"]
    assert f"network evaluations/s {rate:11.2f}  of {evaluations}\n" in capsys.readouterr().out
    assert report["network_evaluations"] == evaluations
    drawn, seconds = report["samples"], report["network_evaluations"] / rate
    assert report["samples_per_second"] == pytest.approx(drawn / seconds)
    assert report["step_seconds"]["min"] * 5 * drawn / report["batch_size"] <= seconds
    macs = plan_compute(load_experiment(DEMO, SETTINGS)).forward.total.macs
    assert report["model_flops_per_second"] == pytest.approx(2 * macs * rate)
    peak = report["matmul_flops_per_second"]
    assert report["mfu"] == pytest.approx(report["model_flops_per_second"] / peak)
    assert report["precision"] == ("bf16" if "bf16" in str(overrides) else "fp32")
    assert report["machine"]["threads"] == 1, "as samples are drawn"


def test_ranks_share_the_batches():
    first, second = run_on_ranks(2, _two_ranks)
    assert second is None
    assert (first["samples"], first["network_evaluations"]) == (8, 8 * 5 * 2)
    assert first["machine"]["ranks"] == 2


def _two_ranks():
    return bench_sample(load_experiment(DEMO, SETTINGS), num_samples=8)


def test_what_cannot_be_sampled_is_refused(capsys):
    assert main([*SAMPLE, "--evaluation.precision=tf32"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
