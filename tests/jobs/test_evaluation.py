"""Evaluate while training: what was missed is made up for, the best is kept."""

import itertools
import json

import pytest

from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.signals import LeaveRequest
from tests.support.runs import journal, kept, tiny


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
