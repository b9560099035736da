"""The benchmark of checkpoints runs, prints its table and leaves nothing behind."""

import re

import torch

from dtr_scale.cli.main import main
from dtr_scale.engines.world import World
from dtr_scale.jobs.bench.checkpoint import measure
from tests.support.runs import SINGLE, demo_experiment

ROWS = [
    r"training step, batch \d+, (bf16|fp32)( +\d+\.\d{3}){3}",
    r"save: the loop stands still( +\d+\.\d{3}){3} +\d+\.\d\d",
    r"save: until it is complete( +\d+\.\d{3}){3} +\d+\.\d\d",
    r"restore( +\d+\.\d{3}){3} +\d+\.\d\d",
    r"reading and hashing the same bytes( +\d+\.\d{3}){3} +\d+\.\d\d",
    r"stall per training step +\d+\.\d\d  below 1 wanted",
    r"speed of restoring, of reading alone +\d+\.\d\d  0\.5 or more wanted",
]


def assert_is_the_table(text, title):
    first, header, *rows = text.splitlines()
    assert re.fullmatch(rf"{title}, [\d.e-]+ GB on rank 0 of 1, cpu; 2 rounds in .*", first)
    assert header.split() == ["median", "min", "max", "s", "GB/s"]
    assert len(rows) == len(ROWS)
    assert all(re.fullmatch(pattern, row.rstrip()) for pattern, row in zip(ROWS, rows, strict=True))
    assert len({len(row.rstrip()) for row in [header, *rows[1:5]]}) == 1, "aligned"


def test_a_tiny_network_is_measured(digits, tmp_path):
    place = f"--checkpoint.dir={tmp_path}/checkpoints"
    steps = ("--train.max_steps=3", "--train.global_batch_size=8", "--train.micro_batch_size=8")
    experiment = demo_experiment(digits, tmp_path, *SINGLE, *steps, place)
    table = measure(experiment, World(0, 0, 1, torch.device("cpu")), rounds=2)
    assert_is_the_table(table, "DiT 32x2")


def test_the_command_prints_a_table_and_clears_up(tmp_path, capsys):
    arguments = ["bench", "checkpoint", "--model", "DiT-S/8", "--rounds", "2"]
    assert main([*arguments, "--dir", str(tmp_path)]) == 0
    assert_is_the_table(capsys.readouterr().out, "DiT-S/8")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    assert main(["bench", "checkpoint", "--model", "DiT-M/2"]) == 2
    assert "accepted are DiT-S/2" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    small = ["bench", "checkpoint", "--model", "DiT-S/8", "--dir", str(tmp_path / "file")]
    assert main(small) == 2
    assert "give another checkpoint.dir" in capsys.readouterr().err
