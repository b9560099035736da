"""A run directory belongs to one job at a time and keeps what earlier runs left."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from dtr_scale.checkpoint import lease
from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import (
    LOCK,
    STATUS,
    RunDirectory,
    write_failure,
    write_saved_step,
    write_status,
)

HOLDER = """
import pathlib, sys, time
from dtr_scale.train.run_dir import RunDirectory, write_status
held = RunDirectory(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_job_is_refused_and_told_who_holds_the_directory(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(ConfigError, match=rf"is in use by pid {holder.pid} on .*--run_dir=PATH"):
        RunDirectory(tmp_path)


def test_kill_9_frees_the_directory_for_a_job_that_waits(holder, tmp_path):
    threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
    RunDirectory(tmp_path).close()


def test_a_closed_directory_can_be_held_again(tmp_path):
    lock, found = tmp_path / "new" / "run" / "lock", []
    for _ in range(2):
        run_dir = RunDirectory(lock.parent)
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        run_dir.close()
        found.append(json.loads(lock.read_text()))
    assert found[0] == found[1] and set(found[0]) == {"run", "run_dir"}


def test_a_place_that_cannot_be_written_is_named_with_the_fix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run' cannot be written: Not a dir.*--run_dir=PA"):
        RunDirectory(tmp_path / "file" / "run")


def test_status_and_config_are_json(tmp_path):
    run_dir = RunDirectory(tmp_path)
    run_dir.write_config({"name": "Überblick", "train": {"lr": 1e-4}})
    write_status(tmp_path, "running", step=0, saved_step=5)
    write_status(tmp_path, "failed", step=7, reason="step 8: loss nan")
    run_dir.close()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"name": "Überblick", "train": {"lr": 1e-4}}
    status = json.loads((tmp_path / "status.json").read_text())
    time = datetime.fromisoformat(status.pop("time"))
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    expected = {"outcome": "failed", "reason": "step 8: loss nan", "step": 7, "saved_step": 5}
    assert status == expected


def test_an_earlier_run_is_set_aside_whole(tmp_path):
    run_dir = RunDirectory(tmp_path)
    assert run_dir.set_aside() is None
    files = {
        "config.json": "{}", "status.json": "{}", "journal.jsonl": '{"step": 1}\n',
        "mlflow.json": "{}", "evaluation.json": "{}", "evaluations.jsonl": "{}",
        "attempts.jsonl": "{}", "tracking.json": "{}",
        "samples/step_00000001.png": "png",
        "checkpoints/step_00000001/index.json": "{}",
    }  # fmt: skip
    shared = {"mlflow.db": "database", "notes.txt": "the user's"}
    for name, text in (files | shared).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    place = run_dir.set_aside()
    assert place is not None and place.parent == tmp_path
    moved = {str(p.relative_to(place)): p.read_text() for p in place.rglob("*") if p.is_file()}
    assert moved == files
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"lock", "samples", place.name, *shared}
    assert not list((tmp_path / "samples").iterdir())

    assert run_dir.set_aside() is None
    run_dir.journal.write_text('{"step": 1}\n')
    second = run_dir.set_aside()
    assert second is not None and second != place
    run_dir.close()


@pytest.mark.parametrize("damaged", ["[]", "7", "{", "{}"])
def test_files_that_tell_nothing_are_written_anew(tmp_path, damaged):
    """As a disk that was full, or a hand, has left them."""
    (tmp_path / STATUS).write_text(damaged)
    (tmp_path / LOCK).write_text(damaged)
    with closing(RunDirectory(tmp_path)) as held:
        assert held.saved_step is None
        (tmp_path / STATUS).write_text(damaged)
        write_saved_step(tmp_path, 3)
        told = json.loads((tmp_path / STATUS).read_bytes())
        assert (told["outcome"], told["step"], told["saved_step"]) == ("running", 3, 3)
        (tmp_path / STATUS).write_text(damaged)
        (tmp_path / LOCK).write_text(damaged)
        assert write_failure(tmp_path, "loss nan", job=held.job)
    assert json.loads((tmp_path / STATUS).read_bytes())["reason"] == "loss nan"


def test_a_failure_is_told_once_and_never_in_a_directory_that_another_job_holds(tmp_path):
    with closing(RunDirectory(tmp_path)) as held:
        lock, before = (tmp_path / LOCK).read_bytes(), (tmp_path / STATUS).read_bytes()
        newcomer = json.dumps(json.loads(lock) | {"job": "another"})
        open_folder(tmp_path).write_bytes(LOCK, newcomer.encode())
        assert not write_failure(tmp_path, "rank 0 is gone", job=held.job)
        assert (tmp_path / STATUS).read_bytes() == before
        open_folder(tmp_path).write_bytes(LOCK, lock)
        assert write_failure(tmp_path, "rank 0 is gone", job=held.job)
        assert not write_failure(tmp_path, "so is rank 1", job=held.job)
    assert json.loads((tmp_path / STATUS).read_bytes())["reason"] == "rank 0 is gone"
    write_status(tmp_path, "running")
    assert write_failure(tmp_path, "released, and failed late", job="some")
