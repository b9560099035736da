"""`train --dry-run` refuses what a training would, tells what it would do, and writes nothing."""

import pytest

from dtr_scale.cli.main import main
from tests.support.runs import DEMO, SINGLE, SMALL, TINY, tiny


def dry_run(digits, run_dir, *overrides):
    places = (f"--data.shards={digits}", f"--run_dir={run_dir}")
    return main(["train", "--config", str(DEMO), "--dry-run", *SMALL, *SINGLE, *TINY, *places,
                 *overrides])  # fmt: skip


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_would_begin_is_told_and_leaves_no_trace(digits, tmp_path, capsys):
    assert dry_run(digits, tmp_path / "runs" / "new", "--tracking.type=mlflow") == 0
    out = capsys.readouterr().out
    assert "1,500 samples, 10 classes; 0.0853 epochs to come" in out
    assert f"run      {tmp_path}/runs/new" in out
    assert "batch    32 = micro-batch 32 x accumulation 1 x 1 rank" in out
    assert "begins   at step 0" in out
    assert "nothing was written" in out.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_run_that_would_go_on_is_told_and_stays_as_it_is(digits, tmp_path, capsys):
    assert tiny(digits, tmp_path) == 0
    before = files_of(tmp_path)
    assert dry_run(digits, tmp_path, "--train.max_steps=8") == 0
    assert "begins   at step 4, with the newest checkpoint" in capsys.readouterr().out
    assert dry_run(digits, tmp_path, "--checkpoint.resume=never") == 0
    assert "begins   afresh, and sets the earlier run aside" in capsys.readouterr().out
    assert dry_run(digits, tmp_path, "--train.seed=7") == 2
    assert "train.seed was 0 and is 7" in capsys.readouterr().err
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.shards=nowhere", "manifest.json is missing"),
        ("--model.num_classes=7", "set --model.num_classes=10"),
        ("--tracking.type=mlflow --tracking.uri=foo://x", "tracking.uri = 'foo://x'"),
        ("--evaluation.every_steps=2 --evaluation.reference=none.npz", "none.npz"),
        (f"--run_dir={DEMO}/run", "cannot be written: "),
    ],
)
def test_what_a_training_would_refuse_is_refused(digits, tmp_path, capsys, override, message):
    assert dry_run(digits, tmp_path, *override.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
