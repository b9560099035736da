"""What a job tells at its start."""

import os
import re

import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.jobs.banner import Place, banner
from dtr_scale.logs import setup_logging
from tests.support.runs import ROOT, tiny
from tests.support.terminal import terminal

COST = LayerCost(macs=80_730_000_000, num_parameters=458_100_000)


def told(config: str, place: Place, *overrides: str) -> dict[str, str]:
    experiment = load_experiment(ROOT / "configs" / f"{config}.json", list(overrides))
    lines = banner(experiment, place, COST if config.startswith("dit_l") else None)
    return {line.split()[0]: line.split(None, 1)[1] for line in lines}


def test_a_run_on_two_hosts_is_told_in_seven_lines():
    place = Place(
        hosts=["gpu001"] * 4 + ["gpu002"] * 4,
        device="NVIDIA A100-SXM4-80GB",
        micro_batch_size=16,
        num_samples=1_281_167,
        samples_seen=256 * 100_000,
        is_compiled=True,
    )
    overrides = ("--train.max_steps=400000", "--run_dir=runs/mine", "--data.shards=s3://b/latents")
    assert told("dit_l_dtr_antuw", place, *overrides, "--data.num_workers=0") == {
        "network": "DiT-L/2, 458.1M parameters, 80.73G MACs a forward; routing dtr, "
        "objective ant_uw",
        "device": "8 x NVIDIA A100-SXM4-80GB, on 2 hosts (gpu001, gpu002)",
        "engine": "zero-1, bf16, compiled",
        "data": "s3://b/latents: 1,281,167 samples, 1,000 classes; 59.9 epochs to come",
        "batch": "256 = micro-batch 16 x accumulation 2 x 8 ranks",
        "run": "runs/mine, its log is runs/mine/journal.jsonl",
        "stop": "Ctrl-C saves; the same command goes on",
    }


def test_more_workers_than_cores_are_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    place = Place(["here"] * 2, "cpu", 32, 1500, 0, is_compiled=False)
    alone = ("--model.conditioning=none", "--evaluation.cfg_scale=1")
    found = told("demo_digits", place, "--data.num_workers=2", *alone)
    assert found["device"] == "2 x cpu, 1 thread each, on here"
    assert found["data"].endswith("epochs to come; 4 workers on 2 cores")
    assert "classes" not in found["data"] and "parameters" not in found["network"]
    fewer = told("demo_digits", place, "--data.num_workers=1")["data"]
    assert fewer.endswith("10 classes; 85.3 epochs to come")
    small = Place(["here"], "cpu", 32, 90, 0, is_compiled=False)
    assert told("demo_digits", small)["data"].endswith("10 classes; 1,422 epochs to come")


@pytest.mark.parametrize("workers", [0, 3])
def test_a_log_holds_nothing_but_lines_of_ours(digits, tmp_path, capfd, monkeypatch, workers):
    """torch says nothing of workers that are more than the cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    setup_logging(0)
    engine = ("--engine.type=fsdp2", "--engine.precision=bf16", f"--data.num_workers={workers}")
    assert tiny(digits, tmp_path, *engine, "--train.max_steps=2") == 0
    out, err = capfd.readouterr()
    assert out == ""  # gloo's C++ would say here how many ranks it has reached
    lines = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in err.splitlines()]
    assert [line.split()[0] for line in lines] == [
        "network", "device", "engine", "data", "batch", "run", "stop", "step", "step", "finished",
    ]  # fmt: skip
    assert lines[-1].endswith(f"; next: dtr-scale sample {tmp_path}")
    assert lines[3].endswith("; 3 workers on 1 cores") == (workers == 3)


def test_on_a_terminal_the_banner_is_whole_before_a_bar_is_drawn(digits, tmp_path):
    with terminal(80) as screen:
        setup_logging(0)
        assert tiny(digits, tmp_path, "--train.max_steps=2") == 0
        shown = os.read(screen, 100_000).decode()
        os.close(screen)
    assert 0 < shown.index("stop     Ctrl-C saves") < shown.index("0.0%|")
