"""What a run tells of its saves: no start begins again, or goes on elsewhere, in silence."""

import json
import shutil
import subprocess
import sys

import pytest

from dtr_scale.checkpoint.layout import COMPLETE, INDEX, complete_mark
from dtr_scale.errors import CheckpointError
from tests.support.runs import BATCH, DEMO, ROOT, SINGLE, SMALL, journal, status, tiny

# Dies as a power cut would have it, once the second checkpoint is complete.
KILLED = """
import os, signal, sys
from dtr_scale.checkpoint.retention import Retention
from dtr_scale.cli.main import main
Retention.retire = lambda self, step: os.kill(os.getpid(), signal.SIGKILL) if step == 4 else None
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_save_is_told_when_it_is_complete_and_not_at_the_next_logged_step(digits, tmp_path):
    places = ("--config", str(DEMO), f"--data.shards={digits}", f"--run_dir={tmp_path}")
    steps = ("--train.log_every=1000", "--checkpoint.every_steps=2", "--train.max_steps=1000000")
    command = [sys.executable, "-c", KILLED, *places, *SMALL, *SINGLE, *BATCH, *steps]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert killed.returncode == -9, killed.stderr
    left = status(tmp_path)
    assert (left["outcome"], left["saved_step"]) == ("running", 4)
    assert not (tmp_path / "journal.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="was saved at step 4, but there is no") as caught:
        tiny(digits, tmp_path)
    assert caught.value.exit_code == 2
    assert tiny(digits, tmp_path, "--checkpoint.resume=never") == 0


def test_a_journal_that_ends_before_its_checkpoint_is_told(digits, tmp_path, warnings_of):
    tiny(digits, tmp_path)
    tiny(digits, tmp_path, "--train.max_steps=5")
    assert not warnings_of("dtr_scale.jobs.resume")
    path = tmp_path / "journal.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    tiny(digits, tmp_path, "--train.max_steps=6")
    (warning,) = warnings_of("dtr_scale.jobs.resume")
    assert f"{path} ends at step 2 and the checkpoint is of step 5" in warning
    assert "the records of steps 3 to 5 are lost" in warning
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda probe: probe | {"loss": 1.01 * probe["loss"]}, "the loss of its next 4 samples"),
        (lambda probe: probe | {"sample_ids": [[0, 0]]}, "the next samples were"),
    ],
)
def test_a_probe_that_differs_stops_a_resume(digits, tmp_path, change, message):
    tiny(digits, tmp_path)
    place = tmp_path / "checkpoints" / "step_00000004"
    content = json.loads((place / INDEX).read_text())
    content["meta"]["probe"] = change(content["meta"]["probe"])
    index = json.dumps(content).encode()
    (place / INDEX).write_bytes(index)
    (place / COMPLETE).write_bytes(complete_mark(index))
    with pytest.raises(CheckpointError, match=message):
        tiny(digits, tmp_path, "--train.max_steps=6")
    assert len(journal(tmp_path)) == 4
    allowed = "--checkpoint.allow_changes=train.seed"  # what is changed on purpose may differ
    assert tiny(digits, tmp_path, "--train.max_steps=6", allowed) == 0
