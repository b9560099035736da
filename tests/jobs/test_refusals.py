"""Refuse bad data and places in use, with one line and nothing lost."""

import json
import subprocess
import sys

import pytest

from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.errors import CheckpointError, ConfigError, DataError, EvaluationError
from dtr_scale.jobs.trained import write_whole
from dtr_scale.storage.folder import open_folder
from tests.support.runs import DEMO, ROOT, SINGLE, SMALL, copied, journal, status, tiny


def without_a_shard(place):
    (place / "train-000001.tar").unlink()


def with_a_cut_shard(place):
    path = place / "train-000001.tar"
    path.write_bytes(path.read_bytes()[: 512 * 100])


def with_an_altered_shard(place):
    path = place / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))


def with_an_empty_manifest(place):
    (place / "manifest.json").write_text("")


def without_manifest(place):
    (place / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_shard, r"train-000001\.tar .*is missing"),
        (with_a_cut_shard, r"train-000001\.tar.*1034240.*51200"),
        (with_an_altered_shard, r"train-000001\.tar.*sha256"),
        (with_an_empty_manifest, "manifest.json is empty"),
        (without_manifest, "manifest.json is missing"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_data_is_one_line_and_nothing_is_lost(digits, tmp_path, damage, message, num_workers):
    place, run_dir = copied(digits, tmp_path), tmp_path / "run"
    workers = f"--data.num_workers={num_workers}"
    assert tiny(place, run_dir, "--train.max_steps=2") == 0
    before = journal(run_dir)
    damage(place)
    with pytest.raises(DataError, match=message) as caught:
        tiny(place, run_dir, "--train.max_steps=60", workers)
    assert "\n" not in str(caught.value)
    assert "fix: " in str(caught.value)
    assert journal(run_dir)[:2] == before
    assert (run_dir / "checkpoints" / "step_00000002" / "COMPLETE").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.in_channels=3", r"make samples \[3, 8, 8\], the manifest in .* has \[1, 8, 8\]"),
        ("--model.num_classes=7", "set --model.num_classes=10"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused(digits, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny(digits, tmp_path, override)


@pytest.mark.parametrize(
    "override",
    ["--data.shards=nowhere", "--model.num_classes=7", "--checkpoint.start_from=missing.pt"],
    ids=["data", "network", "start"],
)
def test_a_start_that_is_refused_leaves_nothing_that_was_not_there(digits, tmp_path, override):
    with pytest.raises((ConfigError, DataError, CheckpointError)):
        tiny(digits, tmp_path / "runs" / "new", override)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("the user's")
    with pytest.raises((ConfigError, DataError, CheckpointError)):
        tiny(digits, tmp_path / "run", override)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_evaluation_that_is_refused_leaves_nothing_that_was_not_there(digits, tmp_path):
    """Nor does it set aside the run that was to be begun afresh."""
    reference = f"--evaluation.reference={tmp_path}/missing.npz"
    evaluation = ("--evaluation.every_steps=2", "--evaluation.features=efficientnet", reference)
    with pytest.raises(EvaluationError, match=r"missing\.npz"):
        tiny(digits, tmp_path / "runs" / "new", *evaluation)
    assert not (tmp_path / "runs").exists()
    assert tiny(digits, tmp_path / "run", "--evaluation.every_steps=0") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(EvaluationError, match=r"missing\.npz"):
        tiny(digits, tmp_path / "run", *evaluation, "--checkpoint.resume=never")
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    told = {tmp_path / "run" / "status.json", tmp_path / "run" / "lock"}
    assert {path for path in after if after[path] != before.get(path)} <= told
    assert after.keys() == before.keys()


def test_a_run_that_has_begun_keeps_what_it_has_where_a_start_is_refused(digits, tmp_path):
    tiny(digits, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError):
        tiny(digits, tmp_path, "--model.num_classes=7")
    assert sorted(tmp_path.rglob("*")) == before
    assert status(tmp_path)["outcome"] == "failed"


def test_a_checkpoint_dir_is_that_of_one_run(digits, tmp_path):
    dir_ = f"--checkpoint.dir={tmp_path / 'shared'}"
    assert tiny(digits, tmp_path / "one", dir_) == 0
    with pytest.raises(ConfigError, match=r"belongs to the run in '.*one'; choose another"):
        tiny(digits, tmp_path / "two", dir_)
    assert find_checkpoint(str(tmp_path / "one")).meta["step"] == 4


def test_a_second_job_on_a_run_directory_is_refused(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dtr_scale.checkpoint.lease._PATIENCE_SECONDS", 0.2)
    holder = (
        "import sys, time; from pathlib import Path;"
        "from dtr_scale.train.run_dir import RunDirectory;"
        f"held = RunDirectory(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=f"is in use by pid {process.pid} on "):
            tiny(digits, tmp_path)
    finally:
        process.kill()
        process.communicate()
    assert tiny(digits, tmp_path) == 0  # a killed holder holds nothing


def test_a_job_whose_directory_was_taken_over_ends_and_writes_nothing_more(digits, tmp_path):
    endless = (*SMALL, *SINGLE, "--train.max_steps=1000000", "--evaluation.every_steps=0")
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={tmp_path}")
    command = [sys.executable, "launch/train.py", *places, *endless]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stderr is not None
            while "step 3/" not in process.stderr.readline():
                assert process.poll() is None
            before, lock = status(tmp_path), json.loads((tmp_path / "lock").read_text())
            other = json.dumps(lock | {"job": "another", "pid": 7, "host": "node7"})
            open_folder(tmp_path).write_bytes("lock", other.encode())
            told = process.stderr.read()
            process.wait()
        finally:
            process.kill()
    assert process.returncode == 1, told
    assert f"run_dir = {str(tmp_path)!r} was taken over by pid 7 on node7" in told
    assert status(tmp_path) == before
    assert (tmp_path / "lock").read_text() == other


def test_a_batch_of_more_than_all_samples_is_told(digits, tmp_path, caplog):
    many = ("--train.global_batch_size=1504", "--train.micro_batch_size=32")
    assert tiny(digits, tmp_path / "all", *many, "--train.max_steps=1") == 0
    (told,) = [text for text in caplog.messages if "global_batch_size" in text]
    assert "= 1504 is more than the 1500 samples of" in told and "each of them 1.0 times" in told
    caplog.clear()
    assert tiny(digits, tmp_path / "some", "--train.max_steps=1") == 0
    assert not [text for text in caplog.messages if "global_batch_size" in text]


def test_what_is_interrupted_while_it_writes_leaves_what_was_there(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "old.png").write_bytes(b"old")
    for name in ("old.png", "new.png"):
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / name, interrupted)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_one_process_cannot_be_many(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, the launcher started 2"):
        tiny(digits, tmp_path)
