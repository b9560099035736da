"""The benchmark of training measures the real trainer, and its figures fit each other."""

import json

import pytest

from dtr_scale.cli.main import main
from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.bench.train import bench_train
from dtr_scale.jobs.plan.compute import plan_compute
from tests.support.ranks import run_on_ranks
from tests.support.runs import DEMO, SINGLE, SMALL

SETTINGS = [*SMALL, "--data.type=synthetic", "--train.global_batch_size=8"]
PARTS = ["data_wait", "forward", "backward", "update", "ema", "rest"]
TRAIN = ["bench", "train", "--config", str(DEMO), *SETTINGS, *SINGLE, "--steps", "3"]


@pytest.fixture
def report(tmp_path, capsys):
    """What two micro-steps of four samples, three times, were measured as."""
    file = tmp_path / "report.json"
    place = ["--dir", str(tmp_path / "checkpoints"), "--json", str(file)]
    assert main([*TRAIN, *place, "--train.micro_batch_size=4", "--warm-up", "2"]) == 0
    assert list((tmp_path / "checkpoints").iterdir()) == []
    report = json.loads(file.read_text())
    out = capsys.readouterr().out
    assert f"samples/s {report['samples_per_second']:>23.2f}" in out
    assert all(f"\n  {part.replace('_', ' ')} " in out for part in PARTS)
    return report


def test_the_figures_of_a_report_fit_each_other(report):
    step, parts = report["step_seconds"], report["parts"]
    assert (report["bench"], report["steps"], report["warm_up_steps"]) == ("train", 3, 2)
    assert step["min"] <= step["median"] <= step["max"]
    assert report["samples_per_second"] == pytest.approx(8 / step["median"])
    assert list(parts) == PARTS
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert all(parts[name]["min"] > 0 for name in ("forward", "backward", "update", "ema"))
    flops = plan_compute(load_experiment(DEMO, SETTINGS)).training_flops_per_image
    assert report["model_flops_per_second"] == pytest.approx(report["samples_per_second"] * flops)
    peak = report["matmul_flops_per_second"]
    assert report["mfu"] == pytest.approx(report["model_flops_per_second"] / peak)
    assert report["mfu_nominal"] is None and report["collective_seconds"] is None
    stall = report["save_stall_seconds"]
    assert report["save_stall_share"] == pytest.approx(stall / (1000 * step["median"]))
    assert report["memory_peak_bytes"] > 1e8
    assert report["machine"]["ranks"] == 1 and report["config"]["train.max_steps"] == 2000


def test_a_report_is_compared_with_an_earlier_one(report, tmp_path, capsys):
    before = ["--compare", str(tmp_path / "report.json")]
    assert main([*TRAIN, *before, "--train.micro_batch_size=8", "--warm-up", "1"]) == 0
    out = capsys.readouterr().out
    assert f"samples_per_second {report['samples_per_second']:27.4g} -> " in out
    told = [line for line in out.splitlines() if line.startswith("not the same: ")]
    assert told == ["not the same: config's train.micro_batch_size was 4, is 8"]


def test_ranks_are_measured_together(tmp_path):
    first, second = run_on_ranks(2, _two_ranks, str(tmp_path))
    assert second is None
    assert first["machine"]["ranks"] == 2
    assert first["collective_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def _two_ranks(place):
    settings = [*SETTINGS, "--train.micro_batch_size=4", "--engine.type=fsdp2"]
    return bench_train(load_experiment(DEMO, settings), steps=2, warm_up=1, place=place)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.json", None, "missing.json cannot be read: No such file"),
        ("report.json", "[]", "report.json is no report of a benchmark"),
        ("report.json", '{"bench": "sample"}', "is of `dtr-scale bench sample`; give one of"),
    ],
)
def test_what_is_no_earlier_report_is_refused_first(name, content, told, tmp_path, capsys):
    if content:
        (tmp_path / name).write_text(content)
    assert main([*TRAIN, "--compare", str(tmp_path / name)]) == 2
    assert told in capsys.readouterr().err


def test_a_place_for_the_figures_is_refused_first(tmp_path, capsys):
    assert main([*TRAIN, "--json", str(tmp_path / "report.txt")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --json={tmp_path}/report.txt is not accepted; give a file that")
