"""Attention is measured by every way that is there."""

import json

from dtr_scale.cli.main import main
from tests.support.runs import DEMO

ATTENTION = ["bench", "attention", "--config", str(DEMO), "--engine.device=cpu"]


def test_every_way_is_timed_or_told_why_not(tmp_path, capsys):
    file = tmp_path / "report.json"
    small = ["--rounds", "2", "--train.micro_batch_size=4", "--train.global_batch_size=8"]
    assert main([*ATTENTION, *small, "--json", str(file)]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    (shape,) = report["shapes"]
    assert (shape["queries"], shape["layers"], report["batch_size"]) == (16, 4, 4)
    there = {name for name, way in shape["ways"].items() if way["forward"]}
    assert there == {"sdpa_flash", "sdpa_math", "model.attention=sdpa"}
    for name in there:
        for part in ("forward", "backward"):
            times = shape["ways"][name][part]
            assert 0 < times["min"] <= times["median"] <= times["max"]
    assert all(shape["ways"][name]["obstacle"] in out for name in shape["ways"].keys() - there)
    assert "4 layers: batch 4, 16 tokens to 16, 4 heads of 32, bf16, cpu" in out
