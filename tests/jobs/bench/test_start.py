"""The benchmark of starts runs real trainings, cold and resumed, and leaves nothing behind."""

import json

import pytest

from dtr_scale.cli.main import main
from tests.support.runs import BATCH, DEMO, SINGLE, SMALL

START = ["bench", "start", "--config", str(DEMO), *SMALL, *SINGLE, *BATCH, "--rounds", "1"]


@pytest.mark.slow
def test_a_run_is_started_cold_and_resumed(tmp_path, capsys):
    file = tmp_path / "report.json"
    place = tmp_path / "place"
    place.mkdir()
    arguments = ["--data.type=synthetic", "--dir", str(place), "--json", str(file)]
    assert main([*START, *arguments]) == 0
    report = json.loads(file.read_text())
    assert 0 < report["cold_first_step_seconds"] <= report["cold_total_seconds"]
    assert 0 < report["resumed_first_step_seconds"] == report["resumed"]["max"]
    assert f"resumed, 1 times {report['resumed']['median']:15.2f}" in capsys.readouterr().out
    assert list(place.iterdir()) == []


@pytest.mark.slow
def test_a_training_that_fails_is_told_with_its_last_words(tmp_path, capsys):
    place = ["--dir", str(tmp_path), f"--data.shards={tmp_path}/missing"]
    assert main([*START, *place]) == 2
    told = capsys.readouterr().err
    assert "ended with exit code 2 before its step 1: error: " in told and "missing" in told
    assert list(tmp_path.iterdir()) == []
