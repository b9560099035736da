"""MLflow shows what the journal holds, each step once, and training never waits for it."""

import json
import shutil
import time
from pathlib import Path

import pytest

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs import description
from dtr_scale.tracking import mlflow
from dtr_scale.tracking import run as run_module
from dtr_scale.tracking.names import GOODPUT
from dtr_scale.tracking.uri import artifact_home, runs_page, tracking_uri
from tests.support.mlflow_jobs import (
    DISTANCE,
    PARAMS,
    TAGS,
    Job,
    assert_steps,
    children_of,
    images_of,
    models_of,
    points_of,
    run_of,
)
from tests.support.processes import wait_for

pytestmark = pytest.mark.usefixtures("short_waits")
DEMO = Path(__file__).parents[2] / "configs" / "demo_digits.json"


def test_the_server_is_the_configured_one_then_the_environments(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    for run in ("a", "a/expert_3", "a/replaced_20260101T000000"):
        assert tracking_uri(None, runs / run) == f"sqlite:///{runs}/mlflow.db"
    assert artifact_home("postgresql://host/db", runs / "a") == runs / "mlartifacts"
    assert artifact_home("http://host", runs / "a") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert tracking_uri(None, tmp_path) == "http://environment"
    assert tracking_uri("http://configured", tmp_path) == "http://configured"


def test_the_page_of_the_runs_is_a_link_or_what_serves_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "a"
    page = "#/experiments/3/runs?compareRunsMode=CHART&workflowType=machine_learning"
    local = f"then http://127.0.0.1:5000/{page}"
    database = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert runs_page(database, "3", run_dir) == f"cd runs && mlflow server, {local}"
    assert runs_page("http://me:secret@host:80/", "3", run_dir) == f"http://host:80/{page}"
    other = runs_page("postgresql://me:secret@db/mlflow", "3", run_dir)
    assert other == f"mlflow server --backend-store-uri postgresql://db/mlflow, {local}"


def test_without_a_server_a_database_beside_the_runs_has_it_all(tmp_path):
    """Two runs share it, and the folder can be moved: a server started there shows everything."""
    overrides = ['--data.storage_options={"key": "KEY0", "secret": "SECRET0", "region": "here"}']
    experiment = load_experiment(DEMO, overrides)
    params = description.params(experiment, samples=1500, ranks=2, cost=None)
    runs = tmp_path / "runs"
    runs.mkdir()
    jobs = [Job(runs / name, None, params=params) for name in ("first", "second")]
    for job in jobs:
        job.log(range(1, 1200))  # more points than one call takes
        job.evaluate(2, fid=1.5)
        job.finish()
    uri = tracking_uri(None, runs / "first")
    for job in jobs:
        assert_steps(job.run_dir, uri, range(1, 1200))
        assert points_of(job.run_dir, uri, DISTANCE) == [(2, 1.5)]
        assert images_of(job.info) == [("samples", 2)]
    client, run = run_of(runs / "first", uri)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "a_run")
    assert len(client.search_runs([run.info.experiment_id])) == 4, "two runs of one attempt each"
    told = run.data.params
    assert (told["train.lr"], told["data.storage_options.region"]) == ("0.001", "here")
    assert (told["train.epochs"], told["engine.ranks"]) == ("85.333", "2")
    assert not told.keys() & {"model.variant", "engine.shard", "run_dir", "objective.k"}
    for path in tmp_path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"KEY0" not in content and b"SECRET0" not in content, path

    moved = tmp_path / "elsewhere" / "runs"
    shutil.copytree(runs, moved)
    shutil.rmtree(runs)
    job = Job(moved / "first", None, step=1199)
    job.log([1200])
    job.finish()
    assert_steps(job.run_dir, job.info.uri, range(1, 1201))
    assert images_of(job.info) == [("samples", 2)]
    assert str(runs) not in str(run_of(job.run_dir, job.info.uri)[1].info.artifact_uri)


def test_every_job_of_a_run_directory_goes_on_with_one_run(server, tmp_path):
    run_ids = set()
    jobs = [("preempted", "KILLED"), ("failed", "FAILED"), ("finished", "FINISHED")]
    for number, (outcome, status) in enumerate(jobs):
        # Params never change in MLflow, even where a later job has others; tags do.
        params, tags = PARAMS | {"added": number, "train.lr": number + 1e-4}, {"host": outcome}
        # Each job stands 5 steps before the end of the last one, whose steps are on the server.
        step = max(0, 10 * number - 5)
        job = Job(tmp_path, server.uri, step=step, params=params, tags=tags)
        wait_for((tmp_path / "mlflow.json").exists)
        wait_for(lambda: run_of(tmp_path, server.uri)[1].info.status == "RUNNING")
        job.log(range(step + 1, 10 * number + 11))
        job.finish(outcome, goodput=(0.5 + number / 10, 0.25 + number / 10))
        _, run = run_of(tmp_path, server.uri)
        assert run.info.status == status
        assert (run.data.tags["host"], run.data.params["added"]) == (outcome, "0")
        assert run.data.params["train.lr"] == "0.0001"
        run_ids.add(run.info.run_id)
    assert len(run_ids) == 1
    _, run = run_of(tmp_path, server.uri)
    assert run.data.tags["changed.train.lr"] == "1.0001 from step 5; 2.0001 from step 15"
    assert run.data.tags["changed.added"] == "1 from step 5; 2 from step 15"
    assert "changed.model.type" not in run.data.tags
    assert_steps(tmp_path, server.uri, range(1, 31))

    killed = Job(tmp_path, server.uri, step=30)  # kill -9: nothing is written any more
    wait_for(lambda: len(children_of(tmp_path, server.uri)) == 4)
    killed.tracker._leaving.set()  # its thread would outlive the test
    killed.journal.close()
    Job(tmp_path, server.uri, step=30).finish()
    attempts = children_of(tmp_path, server.uri)
    assert [a.info.status for a in attempts] == [
        "KILLED", "FAILED", "FINISHED", "KILLED", "FINISHED"
    ]  # fmt: skip
    assert [a.info.run_name for a in attempts] == [f"attempt {n}" for n in range(1, 6)]
    assert [a.data.tags["from_step"] for a in attempts] == ["0", "5", "15", "30", "30"]
    assert [a.data.tags["to_step"] for a in attempts][:3] == ["10", "20", "30"]
    assert attempts[0].data.tags["hosts"] == "a, b"
    assert attempts[0].data.tags["reason"] == "asked"
    assert attempts[3].data.tags["reason"] == "it ended without a word"
    assert all((a.info.end_time or 0) >= a.info.start_time for a in attempts)
    # Each job looks at all attempts anew, and sends what the run does not have.
    run_goodput = [(10, 0.25), (20, 0.35), (30, 0.45)]
    assert points_of(tmp_path, server.uri, GOODPUT) == run_goodput
    assert [a.data.metrics.get(GOODPUT) for a in attempts[:3]] == [0.5, 0.6, 0.7]


def test_another_host_finds_the_run_by_what_is_kept_with_the_checkpoints(server, tmp_path):
    """Its journal begins where the checkpoint ended; after a fall back the rest is copied."""
    here, there = tmp_path / "here", tmp_path / "there"
    job = Job(here, server.uri, training="one")
    job.log(range(1, 21))
    job.evaluate(10, fid=5.0)
    job.finish("failed")
    first = run_of(here, server.uri)[1]
    job = Job(there, server.uri, training="one", step=10)
    job.log(range(11, 26))  # to 20 as before
    job.finish("failed")
    assert run_of(there, server.uri)[1].info.run_id == first.info.run_id
    assert_steps(there, server.uri, range(1, 26))
    assert [a.info.run_name for a in children_of(there, server.uri)] == ["attempt 1", "attempt 2"]

    elsewhere = tmp_path / "elsewhere"
    job = Job(elsewhere, server.uri, training="one", step=15)
    job.log(range(16, 18), scale=3)
    job.finish()
    _, new = run_of(elsewhere, server.uri)
    assert new.data.tags["continues"] == first.info.run_id
    expected = [(step, (3 if step > 15 else 1) / step) for step in range(1, 18)]
    assert sorted(points_of(elsewhere, server.uri)) == expected
    assert points_of(elsewhere, server.uri, DISTANCE) == [(10, 5.0)]
    below = [str(run.info.run_name) for run in children_of(elsewhere, server.uri)]
    assert sorted(below) == [
        "a_run (superseded at step 15)", "attempt 1", "attempt 2", "attempt 3"
    ]  # fmt: skip


def test_another_server_gets_a_run_of_its_own_with_all_steps(server, tmp_path):
    job = Job(tmp_path, None)
    job.log(range(1, 6))
    job.finish("preempted")
    first = json.loads((tmp_path / "mlflow.json").read_text())
    job = Job(tmp_path, server.uri, step=5)
    job.log([6])
    job.finish()
    second = json.loads((tmp_path / "mlflow.json").read_text())
    assert first["run_id"] != second["run_id"]
    assert_steps(tmp_path, server.uri, range(1, 7))


def test_a_journal_that_took_another_way_gets_a_run_of_its_own(server, tmp_path):
    """After a fall back each step stands once in the new run; the old one tells what it was."""
    run_dir = tmp_path / "run"
    job = Job(run_dir, server.uri, checkpoints=lambda: {10: "c/10", 30: "c/30"})
    job.log(range(1, 31))
    job.evaluate(10, fid=5.0)
    job.evaluate(30, fid=4.0)
    job.finish("failed")
    client, old = run_of(run_dir, server.uri)
    assert [m.tags["checkpoint"] for m in models_of(run_dir, server.uri)] == ["c/10", "c/30"]

    time.sleep(1)  # evaluations tell whole seconds
    changed = PARAMS | {"train.lr": 5e-4}
    kept = {10: "c/10", 25: "c/25"}
    job = Job(run_dir, server.uri, step=20, params=changed, checkpoints=lambda: kept)
    job.log(range(21, 23))  # as before: the points are there
    job.log(range(23, 26), scale=3)
    job.evaluate(25, fid=3.0)
    job.finish("preempted")
    _, new = run_of(run_dir, server.uri)
    assert images_of(job.info) == [("samples", 10), ("samples", 25)]
    models = models_of(run_dir, server.uri)
    assert [m.tags["checkpoint"] for m in models] == ["c/10", "c/25"]
    found = [x for m in models for x in m.metrics or []]
    assert [(x.key, x.step, x.value) for x in found] == [(DISTANCE, 10, 5.0), (DISTANCE, 25, 3.0)]
    assert {(x.dataset_name, x.dataset_digest) for x in found} == {("digits", "f" * 36)}
    assert new.info.run_id != old.info.run_id
    steps = [(step, (3 if step > 22 else 1) / step) for step in range(1, 26)]
    assert sorted(points_of(run_dir, server.uri)) == steps
    assert points_of(run_dir, server.uri, DISTANCE) == [(10, 5.0), (25, 3.0)]
    assert (new.info.run_name, new.info.status) == ("a_run", "KILLED")
    assert new.data.params["train.lr"] == "0.0005"
    assert new.data.tags["continues"] == old.info.run_id
    assert new.data.tags["continues_at_step"] == "20"

    old = client.get_run(old.info.run_id)
    assert old.info.run_name == "a_run (superseded at step 20)"
    assert old.data.tags["superseded_by"] == new.info.run_id
    assert old.data.params["train.lr"] == "0.0001"
    assert "changed.train.lr" not in old.data.tags  # it never had another
    assert old.info.status != "RUNNING"
    job = Job(run_dir, server.uri, step=25)
    job.log([26])
    job.finish()
    assert run_of(run_dir, server.uri)[1].info.run_id == new.info.run_id
    assert sorted(points_of(run_dir, server.uri)) == [*steps, (26, 1 / 26)]


def test_a_job_that_repeats_fewer_steps_waits_for_the_next_to_differ(tmp_path):
    """A journal at other intervals is another one, too: its steps would stand between the old."""
    uri = tracking_uri(None, tmp_path)
    job = Job(tmp_path, None)
    job.log(range(2, 31, 2))
    job.finish("failed")
    first = run_of(tmp_path, uri)[1].info.run_id
    job = Job(tmp_path, None, step=20)
    job.log([22, 24])
    job.finish("preempted")
    assert run_of(tmp_path, uri)[1].info.run_id == first
    job = Job(tmp_path, None, step=24)
    job.log([27, 30])
    job.finish()
    assert run_of(tmp_path, uri)[1].info.run_id != first
    assert_steps(tmp_path, uri, [*range(2, 25, 2), 27, 30])


def test_an_odd_key_costs_nothing_but_its_characters(server, tmp_path, warnings_of):
    odd = {"expected.FID@50k": 2.06, "expected.FID 50k": 3, "expected.FID_50k": 4, "a//b": 5}
    run_dir = tmp_path / "run"
    told = {"experiment": "odd / name" * 100, "expected": {"FID@50k": 2.06}}
    tags = TAGS | {"~user": "me", "mlflow.note.content": "x" * 9000}
    job = Job(run_dir, server.uri, params=PARAMS | odd, tags=tags, **told)
    job.log(range(1, 4))
    job.evaluate(3, **{"FID@50k": 2.0, "legibility": 0.5})
    job.finish()
    _, run = run_of(run_dir, server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "train.lr": "0.0001", "model.type": "dit", "expected.FID_50k": "2.06",
        "expected.FID 50k": "3", "expected.FID_50k_2": "4", "a__b": "5",
    }  # fmt: skip
    assert (run.data.tags["_user"], run.data.metrics["eval/FID_50k"]) == ("me", 2.0)
    assert run.data.metrics["eval/legibility_10k"] == 0.5
    assert run.data.metrics["expected/FID_50k"] == 2.06


def test_what_a_server_refuses_by_rules_of_its_own_costs_nothing_else(
    server, tmp_path, monkeypatch, warnings_of
):
    for module in (mlflow, run_module):
        monkeypatch.setattr(module, "valid_names", lambda entries: entries)
    job = Job(tmp_path, server.uri, params=PARAMS | {"FID@5k": 1, "last": 2})
    job.log([1])
    job.finish()
    _, run = run_of(tmp_path, server.uri)
    assert (run.info.status, run.data.params["last"]) == ("FINISHED", "2")
    assert_steps(tmp_path, server.uri, [1])
    assert warnings_of("dtr_scale.tracking.mlflow") == ["MLflow takes no param 'FID@5k'"]


def test_an_experiment_that_was_deleted_is_restored(server, tmp_path, warnings_of):
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    client.delete_experiment(client.create_experiment("gone"))
    job = Job(tmp_path, server.uri, experiment="gone")
    job.log([1])
    job.finish()
    assert_steps(tmp_path, server.uri, [1])
    assert "is restored" in warnings_of("dtr_scale.tracking.mlflow")[0]


def test_a_run_that_the_server_or_its_file_no_longer_has_is_made_anew(tmp_path):
    uri = tracking_uri(None, tmp_path)
    job = Job(tmp_path, None)
    job.log(range(1, 4))
    job.finish("preempted")
    client, run = run_of(tmp_path, uri)
    client.delete_run(run.info.run_id)
    for step in (3, 4):
        job = Job(tmp_path, None, step=step)
        job.log([step + 1])
        job.finish("preempted")
        assert_steps(tmp_path, uri, range(1, step + 2))
        (tmp_path / "mlflow.json").write_text("[]")
