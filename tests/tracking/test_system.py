"""MLflow shows how busy a node is, with nothing asked of the run but its id."""

import socket
import time

import pytest

from dtr_scale.tracking import mlflow, system
from dtr_scale.tracking.attempt_runs import TRAINING
from dtr_scale.tracking.description import Description, RunInfo
from dtr_scale.tracking.system import SystemMetrics


@pytest.mark.slow
def test_a_node_is_sampled_once_its_run_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "_SAMPLE_SECONDS", 0.2)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    told = Description("one", "tests", "a_run", step=0)
    info = RunInfo(tmp_path, tmp_path / "journal.jsonl", uri, tmp_path, told)
    server = mlflow.Server(uri, tmp_path)
    metrics = SystemMetrics(info)
    run_id = server.create_run(server.experiment("tests"), "a_run", {TRAINING: "one"})
    name = f"system/{socket.gethostname()}/cpu_utilization_percentage"
    deadline = time.monotonic() + 60
    while len(points := server.history(run_id, name)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    metrics.close()
    assert [point.step for point in points][:2] == [0, 1]
    assert all(0 <= point.value <= 100 for point in points)
