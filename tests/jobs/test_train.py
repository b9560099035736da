"""Train whole runs in this process: the journal, storage, and what ends a run."""

import json
import os

import pytest
from PIL import Image

from dtr_scale.engines.world import World
from dtr_scale.errors import EngineError, UnsavedError
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.trainer import Trainer
from tests.support.disks import fill, small_disk
from tests.support.runs import TINY, journal, status, tiny, train


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
            "lr", "grad_norm", "loss_mean", "mse_mean", "vb_mean", "skipped_steps", "rollbacks",
                "samples_per_second",
            "data_wait_fraction", "step_seconds", "checkpoint_stall_seconds", "gpu_hours",
            "memory_gb", "tokens_per_second", "tflops",
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
    with Image.open(tmp_path / "busy" / "samples" / pictures[0]) as grid:
        assert grid.width == 10 * 66 + 2, "a column for each class"
        assert 10 < grid.height - (2 * 66 + 2) < 30, "with its name"


def test_shards_and_checkpoints_in_object_storage(digits, tmp_path, s3_url):
    """The same journal from s3:// as from disk, resumed from a checkpoint in s3://.

    The keys given in the experiment are in nothing that was written.
    """
    prepare_digits(open_folder(f"{s3_url}/digits"))
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
    stored = open_folder(f"{s3_url}/checkpoints")
    assert stored.names() == ["owner.json", "step_00000002", "step_00000004"]
    step = stored.child("step_00000004")
    written = [step.read_bytes(name) for name in step.names()]
    written += [path.read_bytes() for path in run_dir.rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in written)
    assert not (run_dir / "checkpoints").exists()


def test_an_unconditional_network_trains_without_labels(digits, tmp_path):
    unconditional = ("--model.conditioning=none", "--evaluation.cfg_scale=1")
    assert tiny(digits, tmp_path, *unconditional) == 0


def test_losing_the_loss_stops_before_a_checkpoint(digits, tmp_path):
    assert tiny(digits, tmp_path, "--train.max_steps=2") == 0
    with pytest.raises(EngineError, match=r"the newest checkpoint is of step 2.*lower train\.lr"):
        tiny(digits, tmp_path, "--train.max_steps=40", "--train.lr=1e30")
    assert status(tmp_path)["outcome"] == "failed"


def test_a_run_whose_end_cannot_be_written_has_failed(digits, tmp_path, monkeypatch):
    run_dir, elsewhere = tmp_path / "disk" / "run", f"--checkpoint.dir={tmp_path}/checkpoints"
    with small_disk(run_dir.parent, 2**20):
        run_before = Trainer.run

        def run_on_full_disk(*args, **options):
            fill(run_dir.parent / "filler")
            return run_before(*args, **options)

        monkeypatch.setattr(Trainer, "run", run_on_full_disk)
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
