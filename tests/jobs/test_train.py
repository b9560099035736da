"""Whole runs in this process: resuming, splitting, leaving, and what is refused."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, ConfigError, DataError, EngineError, UnsavedError
from dtr_scale.jobs import train as run
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.storage.folder import Folder
from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.signals import LeaveRequest
from tests.support.disks import fill, small_disk
from tests.support.runs import DEMO, ROOT, SINGLE, SMALL, journal, train

BATCH = ("--train.global_batch_size=32", "--train.micro_batch_size=32")
TINY = (*BATCH, "--train.max_steps=4", "--checkpoint.every_steps=2")


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text(encoding="utf-8"))


def tiny(digits, run_dir, *overrides):
    return train(digits, run_dir, *TINY, *overrides)


def test_a_resumed_run_is_the_run_that_was_not_stopped(digits, tmp_path):
    """To the last bit: stopped at step 50 and resumed to 100, against straight through."""
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    assert train(digits, through, *BATCH, "--train.max_steps=100") == 0
    assert train(digits, resumed, *BATCH, "--train.max_steps=50") == 0
    assert train(digits, resumed, *BATCH, "--train.max_steps=100") == 0
    assert journal(resumed) == journal(through)
    assert len(journal(through)) == 100
    weights = "checkpoints/step_00000100/rank_00000.safetensors"
    assert (resumed / weights).read_bytes() == (through / weights).read_bytes()


@pytest.mark.parametrize("objective", ["ant_uw", "vanilla"])
def test_the_journal_does_not_depend_on_the_micro_batch_size(digits, tmp_path, objective):
    records = {}
    for micro in (64, 32, 16):
        size = ("--train.global_batch_size=64", f"--train.micro_batch_size={micro}")
        steps = ("--train.max_steps=20", f"--objective.type={objective}")
        assert train(digits, tmp_path / str(micro), *size, *steps) == 0
        records[micro] = journal(tmp_path / str(micro))
    for micro in (32, 16):
        for found, expected in zip(records[micro], records[64], strict=True):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_journal_has_the_agreed_keys(digits, tmp_path):
    tiny(digits, tmp_path, "--train.log_every=2")
    lines = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    clusters = [f"{name}_{k}" for name in ("loss_cluster", "uw_log_var") for k in range(8)]
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    for line in lines:
        record = json.loads(line)
        assert list(record) == [
            "step", "samples_seen", "loss", "objective", "mse", "vb", *clusters,
            "lr", "grad_norm", "samples_per_second", "data_wait_fraction",
        ]  # fmt: skip
        assert record["samples_seen"] == 32 * record["step"]
        assert record["loss"] == record["mse"] + record["vb"]
        # 32 samples go round 8 clusters evenly, so the loss is the mean of theirs.
        mean = sum(record[f"loss_cluster_{k}"] for k in range(8)) / 8
        assert record["loss"] == pytest.approx(mean)


def test_workers_and_evaluation_change_nothing(digits, tmp_path):
    """Reading ahead and sampling with the averaged weights leave the training as it is."""
    evaluation = (
        "--evaluation.every_steps=2",
        "--evaluation.num_samples=20",
        "--evaluation.num_sampling_steps=4",
    )
    tiny(digits, tmp_path / "plain")
    tiny(digits, tmp_path / "busy", "--data.num_workers=2", *evaluation)
    assert journal(tmp_path / "busy") == journal(tmp_path / "plain")
    pictures = sorted(path.name for path in (tmp_path / "busy" / "samples").iterdir())
    assert pictures == ["step_00000002.png", "step_00000004.png"]


def test_shards_and_checkpoints_in_object_storage(digits, tmp_path, s3_url):
    """The same journal from s3:// as from disk, resumed from a checkpoint in s3://.

    The keys given in the experiment are in nothing that was written.
    """
    prepare_digits(Folder(f"{s3_url}/digits"))
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    keys = json.dumps({"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": secret})
    remote = (
        f"--checkpoint.dir={s3_url}/checkpoints",
        f"--data.cache_dir={tmp_path}/cache",
        f"--data.storage_options={keys}",
    )
    run_dir = tmp_path / "remote"
    assert train(f"{s3_url}/digits", run_dir, *TINY, *remote, "--train.max_steps=2") == 0
    assert train(f"{s3_url}/digits", run_dir, *TINY, *remote) == 0
    tiny(digits, tmp_path / "local")
    assert journal(run_dir) == journal(tmp_path / "local")
    stored = Folder(f"{s3_url}/checkpoints")
    assert stored.names() == ["owner.json", "step_00000002", "step_00000004"]
    step = stored.child("step_00000004")
    written = [step.read_bytes(name) for name in step.names()]
    written += [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in written)
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(digits, tmp_path, number):
    run_dir, long = tmp_path / "run", (*BATCH, "--train.max_steps=1000000")

    def send_when_training():
        path = run_dir / "journal.jsonl"
        while not (path.exists() and path.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    assert train(digits, run_dir, *long) == 75
    sender.join()
    left = status(run_dir)
    assert (left["outcome"], left["reason"]) == ("preempted", number.name)
    last = int(journal(run_dir)[-1]["step"])
    assert left["step"] == last
    further = last + 2
    assert train(digits, run_dir, *BATCH, f"--train.max_steps={further}") == 0
    assert [record["step"] for record in journal(run_dir)] == list(range(1, further + 1))
    assert status(run_dir)["outcome"] == "finished"


# Trains with saves that hang, and with a loop that fails at step 5 if asked to.
HANGING = """
import sys, time
from dtr_scale.checkpoint import manager, snapshot
from dtr_scale.train import trainer
from dtr_scale.cli.main import main
snapshot.Snapshot.entry = lambda self, file: time.sleep(600)
manager._LAST_SAVE_SECONDS = 0.5
if sys.argv.pop(1) == "fail":
    trainer.Trainer._refuse_divergence = lambda self, result: 1 / (5 - self.step)
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("ending", ["interrupt", "fail"])
def test_a_save_that_hangs_does_not_keep_the_process(digits, tmp_path, ending):
    """Neither after a second Ctrl-C, during the last save, nor after an exception in the loop."""
    every = (*SMALL, *SINGLE, *BATCH, "--checkpoint.every_steps=5", "--train.max_steps=1000000")
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={tmp_path}")
    command = [sys.executable, "-c", HANGING, ending, *places, *every]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    told, watchdog = [], threading.Timer(60, process.kill)
    watchdog.start()
    for line in process.stderr:
        told.append(line)
        if ending == "interrupt" and ("step 4/" in line or "leaving after this step" in line):
            time.sleep(0.5)  # by then the loop waits for a save
            process.send_signal(signal.SIGINT)
    with process:
        code = process.wait()
    watchdog.cancel()
    assert code == (130 if ending == "interrupt" else 1), "".join(told)
    if ending == "fail":
        assert "ZeroDivisionError" in told[-1]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_a_checkpoint_cut_short_is_passed_over(digits, tmp_path, warnings_of):
    through, cut = tmp_path / "through", tmp_path / "cut"
    tiny(digits, through)
    tiny(digits, cut)
    part = cut / "checkpoints" / "step_00000004" / "rank_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    tiny(digits, cut)
    (warning,) = warnings_of("dtr_scale.checkpoint.manager")
    assert "step_00000004: rank_00000.safetensors has" in warning
    assert journal(cut) == journal(through)


def test_a_fresh_start_on_purpose_loses_nothing(digits, tmp_path):
    tiny(digits, tmp_path)
    tiny(digits, tmp_path, "--checkpoint.resume=never", "--train.seed=1")
    (replaced,) = tmp_path.glob("replaced_*")
    assert journal(replaced) != journal(tmp_path)
    assert [record["step"] for record in journal(replaced)] == [1, 2, 3, 4]
    assert (replaced / "checkpoints" / "step_00000004").is_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.routing.alpha=2", "model.routing.alpha was 4.0 and is 2.0"),
        ("--train.global_batch_size=64", "train.global_batch_size was 32 and is 64"),
        ("--model.depth=3", "model.depth was 2 and is 3; .*--checkpoint.allow_changes=model.depth"),
        ("--objective.type=vanilla", "objective.type was 'ant_uw' and is 'vanilla'"),
        ("--data.num_lanes=2", "data.num_lanes was 1 and is 2"),
        ("--data.window_shards=4", "data.window_shards was 8 and is 4"),
        ("--data.horizontal_flip=true", "data.horizontal_flip was False and is True"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path, override, message):
    tiny(digits, tmp_path)
    with pytest.raises(ConfigError, match=message):
        tiny(digits, tmp_path, override, "--train.max_steps=8")
    assert len(journal(tmp_path)) == 4


def test_another_manifest_is_another_run(digits, tmp_path):
    place = copied(digits, tmp_path)
    run_dir = tmp_path / "run"
    tiny(place, run_dir)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["shards"] = [s for s in manifest["shards"] if s["name"] != "train-000002.tar"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.shards was 'manifest .*' and is 'manifest "):
        tiny(place, run_dir, "--train.max_steps=8")
    allowed = ("--checkpoint.allow_changes=data.shards", "--train.max_steps=8")
    assert tiny(place, run_dir, *allowed) == 0


def test_harmless_changes_go_on_and_are_told(digits, tmp_path, caplog):
    tiny(digits, tmp_path)
    changes = ("--train.lr=1e-4", "--train.micro_batch_size=8", "--train.grad_clip=1")
    caplog.set_level("INFO", "dtr_scale")
    assert tiny(digits, tmp_path, *changes, "--train.max_steps=6") == 0
    assert len(journal(tmp_path)) == 6
    assert [text for text in caplog.messages if "since then" in text] == [
        "since then: train.grad_clip was None and is 1.0",
        "since then: train.lr was 0.001 and is 0.0001",
        "since then: train.max_steps was 4 and is 6",
        "since then: train.micro_batch_size was 32 and is 8",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"objective.type": "vanilla"},
        {"objective.num_clusters": 4},
        {"train.global_batch_size": 64, "train.seed": 5},
        {"model.routing.alpha": 2},
    ],
)
def test_changes_that_are_allowed_by_name_go_on(digits, tmp_path, changed, caplog):
    """There and back: an objective that was not there before starts afresh."""
    tiny(digits, tmp_path)
    overrides = [f"--{key}={value}" for key, value in changed.items()]
    caplog.set_level("INFO", "dtr_scale")
    for max_steps, extra in ((6, overrides), (8, [])):
        with pytest.raises(ConfigError, match=f"{next(iter(changed))} was .* and is "):
            tiny(digits, tmp_path, *extra, f"--train.max_steps={max_steps}")
        allowed = f"--checkpoint.allow_changes={','.join(changed)}"
        assert tiny(digits, tmp_path, *extra, allowed, f"--train.max_steps={max_steps}") == 0
        told = [text for text in caplog.messages if "by checkpoint.allow_changes" in text]
        assert len(told) == len(changed)
        caplog.clear()
    assert [record["step"] for record in journal(tmp_path)] == list(range(1, 9))


def test_a_change_that_does_not_fit_the_weights_is_refused_all_the_same(digits, tmp_path):
    tiny(digits, tmp_path)
    allowed = ("--model.depth=3", "--checkpoint.allow_changes=model.depth", "--train.max_steps=8")
    with pytest.raises(ConfigError, match=r"of another network.*blocks\.2.* has shape None"):
        tiny(digits, tmp_path, *allowed)


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(digits, tmp_path):
    tiny(digits, tmp_path)
    before = journal(tmp_path)
    for part in tmp_path.glob("checkpoints/*/index.json"):
        part.unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        tiny(digits, tmp_path)
    assert journal(tmp_path) == before


def test_checkpoints_that_are_gone_are_an_error_and_no_fresh_start(digits, tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    dir_ = f"--checkpoint.dir={elsewhere}"
    assert tiny(digits, run_dir, dir_) == 0
    assert status(run_dir)["saved_step"] == 4
    before = journal(run_dir)
    elsewhere.rename(tmp_path / "unmounted")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"saved at step 4, but there is no checkpoint"):
            tiny(digits, run_dir, dir_)
    assert journal(run_dir) == before
    shutil.rmtree(elsewhere)
    (tmp_path / "unmounted").rename(elsewhere)
    assert tiny(digits, run_dir, dir_, "--train.max_steps=6") == 0
    assert len(journal(run_dir)) == 6


def test_a_checkpoint_dir_is_that_of_one_run(digits, tmp_path):
    dir_ = f"--checkpoint.dir={tmp_path / 'shared'}"
    assert tiny(digits, tmp_path / "one", dir_) == 0
    with pytest.raises(ConfigError, match=r"belongs to the run in '.*one'; choose another"):
        tiny(digits, tmp_path / "two", dir_)
    assert find_checkpoint(str(tmp_path / "one")).meta["step"] == 4


def test_a_new_average_begins_at_the_weights(digits, tmp_path, caplog):
    tiny(digits, tmp_path)
    caplog.set_level("INFO", "dtr_scale")
    added = ("--train.ema_decays=[0.5]", "--train.ema_sigma_rel=[0.1]", "--train.max_steps=5")
    assert tiny(digits, tmp_path, *added) == 0
    assert "the average ema_0.5 is new and begins at the weights" in caplog.text
    reader = find_checkpoint(str(tmp_path))
    before = find_checkpoint(str(tmp_path / "checkpoints" / "step_00000004"))
    name = "blocks.0.attn.qkv.weight"
    start = before.read([f"master/{name}"])[f"master/{name}"]
    after, half = reader.read([f"master/{name}", f"ema_0.5/{name}"]).values()
    torch.testing.assert_close(half, (start + after) / 2)


def test_a_fresh_start_on_purpose_begins_where_it_is_told(digits, tmp_path, caplog):
    caplog.set_level("INFO", "dtr_scale")
    never = ("--checkpoint.resume=never", f"--checkpoint.start_from={tmp_path / 'missing.pt'}")
    with pytest.raises(CheckpointError, match="missing"):
        tiny(digits, tmp_path / "run", *never)
    assert "moved" not in caplog.text


def copied(digits, tmp_path):
    place = tmp_path / "digits"
    place.mkdir()
    for path in digits.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


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


def test_an_unconditional_network_trains_without_labels(digits, tmp_path):
    unconditional = ("--model.conditioning=none", "--evaluation.cfg_scale=1")
    assert tiny(digits, tmp_path, *unconditional) == 0


def test_a_second_job_on_a_run_directory_is_refused(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dtr_scale.train.run_dir._LOCK_PATIENCE_SECONDS", 0.2)
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


def test_the_best_by_a_figure_of_the_journal_and_of_the_evaluation_are_kept(digits, tmp_path):
    """Four checkpoints, one kept as the last and one as the best, by two kinds of figures."""
    every = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=1", "--checkpoint.keep_best=1")
    evaluation = (
        "--evaluation.every_steps=1",
        "--evaluation.num_samples=20",
        "--evaluation.num_sampling_steps=4",
    )
    tiny(digits, tmp_path / "loss", *every)
    losses = {record["step"]: record["loss"] for record in journal(tmp_path / "loss")}
    assert kept(tmp_path / "loss") == sorted({min(losses, key=lambda step: losses[step]), 4})
    by_distance = "--checkpoint.best_metric=frechet_distance"
    tiny(digits, tmp_path / "distance", *every, *evaluation, by_distance, "--train.lr=1e-2")
    noted = json.loads((tmp_path / "distance" / "checkpoints" / "metrics.json").read_text())
    distances = {int(step): figures["frechet_distance"] for step, figures in noted.items()}
    assert kept(tmp_path / "distance") == sorted(distances)
    assert 4 in distances and len(distances) <= 2


@pytest.mark.parametrize("resumed_at", ["kill", "leave", "end"])
def test_an_evaluation_that_was_missed_after_a_save_is_made_up_for(
    digits, tmp_path, monkeypatch, resumed_at
):
    """A job is killed while it evaluates, or asked to leave at a step that is to be evaluated."""
    evaluation = (
        "--evaluation.every_steps=2",
        "--evaluation.num_samples=20",
        "--evaluation.num_sampling_steps=4",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny(digits, whole, *evaluation)
    lost_step = 4 if resumed_at == "end" else 2
    with monkeypatch.context() as patch:
        if resumed_at == "leave":
            asked = itertools.count(1)  # once a step
            reason = property(lambda self: "SIGTERM" if next(asked) > 1 else None)
            patch.setattr(LeaveRequest, "reason", reason)
            assert tiny(digits, cut, *evaluation) == 75
        else:
            evaluate = PeriodicEvaluation._publish

            def killed(self, step, *args):
                if step == lost_step:
                    raise KeyboardInterrupt
                evaluate(self, step, *args)

            patch.setattr(PeriodicEvaluation, "_publish", killed)
            with pytest.raises(KeyboardInterrupt):
                tiny(digits, cut, *evaluation)
    name = f"step_{lost_step:08d}.png"
    assert not (cut / "samples" / name).exists()
    assert tiny(digits, cut, *evaluation) == 0
    assert (cut / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()
    assert journal(cut) == journal(whole)
    made = (cut / "samples" / name).stat().st_mtime_ns
    assert tiny(digits, cut, *evaluation) == 0
    assert (cut / "samples" / name).stat().st_mtime_ns == made, "once"


def kept(run_dir):
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def test_losing_the_loss_stops_before_a_checkpoint(digits, tmp_path):
    assert tiny(digits, tmp_path, "--train.max_steps=2") == 0
    with pytest.raises(EngineError, match=r"the newest checkpoint is of step 2.*lower train\.lr"):
        tiny(digits, tmp_path, "--train.max_steps=40", "--train.lr=1e30")
    assert status(tmp_path)["outcome"] == "failed"


def test_a_time_limit_makes_a_run_save_and_leave(digits, tmp_path):
    assert tiny(digits, tmp_path, "--train.max_minutes=0.000001") == 75
    assert status(tmp_path)["outcome"] == "preempted"
    assert status(tmp_path)["reason"] == "train.max_minutes = 1e-06 are over"
    assert (tmp_path / "checkpoints" / "step_00000001" / "COMPLETE").exists()
    assert tiny(digits, tmp_path) == 0
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 3, 4]


def test_a_run_whose_end_cannot_be_written_has_failed(digits, tmp_path, monkeypatch):
    run_dir, elsewhere = tmp_path / "disk" / "run", f"--checkpoint.dir={tmp_path}/checkpoints"
    with small_disk(run_dir.parent, 2**20):
        build = run.build_evaluation

        def build_late(*args):
            fill(run_dir.parent / "filler")
            return build(*args)

        monkeypatch.setattr(run, "build_evaluation", build_late)
        with pytest.raises(
            UnsavedError, match=r"written to .*: No space left.*of step 4"
        ) as failed:
            tiny(digits, run_dir, elsewhere)
        assert failed.value.exit_code == 1
        (run_dir.parent / "filler").unlink()
        monkeypatch.undo()
        assert tiny(digits, run_dir, elsewhere) == 0
        assert status(run_dir)["outcome"] == "finished"


def test_what_fails_after_the_end_is_told_and_nothing_else(digits, tmp_path, monkeypatch):
    def barrier(self):
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr(World, "barrier", barrier)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        tiny(digits, tmp_path)
    assert status(tmp_path)["outcome"] == "failed"


def test_one_process_cannot_be_many(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, the launcher started 2"):
        tiny(digits, tmp_path)
