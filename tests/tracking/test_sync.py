"""What MLflow has missed of a whole job is sent from the run directory, once."""

import contextlib
import json

import pytest

from dtr_scale.cli.main import main
from dtr_scale.tracking import mirror, mlflow
from dtr_scale.tracking.uri import artifact_home
from tests.support.mlflow_server import mlflow_server
from tests.support.runs import TIMINGS, tiny

EVALUATED = (
    "--evaluation.every_steps=2", "--evaluation.num_samples=20",
    "--evaluation.num_sampling_steps=2", "--evaluation.batch_size=20",
)  # fmt: skip
AWAY = "http://127.0.0.1:9"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def uri(request, tmp_path):
    """The address of a database, and of a server over one."""
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            yield f"sqlite:///{tmp_path}/mlflow.db"
        else:
            yield stack.enter_context(mlflow_server(tmp_path, "127.0.0.1"))


def journal(run_dir):
    lines = (run_dir / "journal.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(s).items() if k not in TIMINGS} for s in lines]


def assert_link_opens_the_runs(run_dir, uri, server, capsys):
    assert main(["tracking", "link", str(run_dir), "--uri", uri]) == 0
    served, _, page = capsys.readouterr().out.strip().partition("/#/experiments/")
    experiment = server.find_experiment("demo")
    assert page == f"{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    started = f"mlflow server --backend-store-uri {uri}, then http://127.0.0.1:5000"
    assert served == (uri if uri.startswith("http") else started)
    other = f"sqlite:///{run_dir}/other.db"
    assert main(["tracking", "link", str(run_dir), "--uri", other]) == 2
    assert "has no experiment 'demo'; send it by dtr-scale tracking" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_whose_server_is_away_loses_nothing(digits, tmp_path, monkeypatch, uri, capsys):
    monkeypatch.setattr(mirror, "_FINISH_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away, alone = tmp_path / "runs" / "away", tmp_path / "runs" / "alone"
    mirrored = ("--tracking.type=mlflow", f"--tracking.uri={AWAY}")
    assert tiny(digits, away, *EVALUATED, *mirrored) == 0
    assert tiny(digits, alone, *EVALUATED) == 0
    assert journal(away) == journal(alone)

    assert main(["tracking", "sync", str(away)]) == 1
    assert "Connection refused" in capsys.readouterr().err
    for _ in range(2):
        assert main(["tracking", "sync", str(away), "--uri", uri]) == 0
    run_id = json.loads((away / "mlflow.json").read_text())["run_id"]
    assert run_id in capsys.readouterr().out

    home = artifact_home(uri, away)
    server = mlflow.Server(uri, home)
    assert_link_opens_the_runs(away, uri, server, capsys)
    run = server.run(run_id)
    assert run is not None and run.info.status == "FINISHED"
    losses = [(p.step, p.value) for p in server.history(run_id, "train/loss")]
    assert losses == [(record["step"], record["loss"]) for record in journal(away)]
    evaluations = [json.loads(s) for s in (away / "evaluations.jsonl").read_text().splitlines()]
    found = {}
    for name in run.data.metrics:
        if name.startswith("eval/"):
            found |= {(name.split("/")[1], p.step): p.value for p in server.history(run_id, name)}
    assert len(found) >= 2
    for line in evaluations:
        for key, value in line["metrics"].items():
            (sent,) = [
                v
                for (name, step), v in found.items()
                if name.startswith(key) and step == line["manifest"]["step"]
                and name.removeprefix(key).strip("_k0123456789") == ""
            ]  # fmt: skip
            assert sent == pytest.approx(value)
    pictures = {int(path.stem.split("_")[1]) for path in (away / "samples").glob("step_*.png")}
    images = [step for key, step, _ in server.images(run_id) if key == "samples"]
    assert sorted(images) == sorted(pictures) and len(images) >= 2
    models = server.models(run.info.experiment_id, run_id)
    assert {m.tags["checkpoint"] for m in models} == {
        str(path) for path in (away / "checkpoints").glob("step_*")
    }
    assert run.data.tags["weighting"] == "ant_uw" and run.inputs and run.inputs.dataset_inputs
    attempts = server.runs(run.info.experiment_id, ("mlflow.parentRunId", run_id))
    assert [a.info.status for a in attempts] == ["FINISHED"]


def test_a_directory_without_a_tracked_run_is_refused(tmp_path, capsys):
    assert main(["tracking", "sync", str(tmp_path)]) == 2
    assert "has no tracking.json; give the directory of a run" in capsys.readouterr().err
