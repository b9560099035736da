"""Evaluate while training: what was missed is made up for, the best is kept."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dtr_scale.cli.main import main
from dtr_scale.jobs.train import train_experiment
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.evaluate import PeriodicEvaluation
from tests.support.ranks import run_on_ranks
from tests.support.runs import TINY, demo_experiment, journal, kept, status, tiny

# Three batches a step.
LONG = (
    "--evaluation.every_steps=2", "--evaluation.num_samples=20", "--evaluation.batch_size=8",
    "--evaluation.num_sampling_steps=4", "--checkpoint.every_steps=1000",
    "--evaluation.loss_samples=64",
)  # fmt: skip


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
    by_distance = "--checkpoint.best_metric=pixel_frechet_distance"
    tiny(digits, tmp_path / "distance", *every, *evaluation, by_distance, "--train.lr=1e-2")
    noted = json.loads((tmp_path / "distance" / "checkpoints" / "metrics.json").read_text())
    distances = {int(step): figures["pixel_frechet_distance"] for step, figures in noted.items()}
    assert kept(tmp_path / "distance") == sorted(distances)
    assert 4 in distances and len(distances) <= 2


def test_the_best_checkpoint_of_the_evaluations_is_tagged_and_kept(digits, tmp_path, capsys):
    every = ("--checkpoint.every_steps=1", "--checkpoint.keep_last=1", "--train.lr=1e-2")
    assert tiny(digits, tmp_path, *LONG, *every, "--evaluation.every_steps=1") == 0
    distances = {m["step"]: found["pixel_frechet_distance"] for found, m in evaluations(tmp_path)}
    best = min(distances, key=lambda step: distances[step])
    assert {best, 4} <= set(kept(tmp_path)) and len(kept(tmp_path)) <= 2
    capsys.readouterr()
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(kept(tmp_path))
    tag = f"best, pixel_frechet_distance {distances[best]:.6g}"
    assert [line.split()[0] for line in lines if line.endswith(tag)] == [str(best)]
    assert main(["checkpoint", "inspect", f"{tmp_path}/checkpoints/step_{best:08d}"]) == 0
    assert f"tag             {tag}\n" in capsys.readouterr().out


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
            asked = itertools.count()  # before the first step, and once a step
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
    assert_same(cut, whole)
    made = (cut / "samples" / name).stat().st_mtime_ns
    assert tiny(digits, cut, *evaluation) == 0
    assert (cut / "samples" / name).stat().st_mtime_ns == made, "once"


def evaluations(run_dir: Path) -> list[tuple[dict[str, float], dict[str, Any]]]:
    """Return numbers and manifests of all evaluations of a run."""
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    return [(each["metrics"], each["manifest"]) for each in map(json.loads, lines)]


def assert_same(run: Path, other: Path) -> None:
    """Two runs have evaluated the same steps with the same numbers and the same pictures."""
    assert names_in(run / "samples") == names_in(other / "samples")
    for path in (other / "samples").iterdir():
        assert (run / "samples" / path.name).read_bytes() == path.read_bytes()
    assert journal(run) == journal(other)
    found, expected = evaluations(run), evaluations(other)
    assert [metrics for metrics, _ in found] == [metrics for metrics, _ in expected]
    assert [manifest["step"] for _, manifest in found] == [m["step"] for _, m in expected]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def terminated_at(call: int, before=PeriodicEvaluation._draw_batch):
    """Return a `_draw_batch` whose `call`-th call is in the middle when SIGTERM comes."""
    calls = itertools.count(1)

    def draw_batch(self, batch, step):
        if len(batch) and next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batch, step)

    return draw_batch


def counted(drawn: list[range], before=PeriodicEvaluation._draw_batch):
    def draw_batch(self, batch, step):
        drawn.extend([batch] if len(batch) else [])
        return before(self, batch, step)

    return draw_batch


def test_a_request_to_leave_is_heard_while_it_samples_and_the_samples_are_kept(
    digits, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny(digits, whole, *LONG)
    with monkeypatch.context() as patch:
        patch.setattr(PeriodicEvaluation, "_draw_batch", terminated_at(2))
        assert tiny(digits, cut, *LONG) == 75
    left = status(cut)
    assert (left["outcome"], left["reason"], left["saved_step"]) == ("preempted", "SIGTERM", 2)
    assert not list((cut / "samples").glob("step_*"))
    drawn = []
    monkeypatch.setattr(PeriodicEvaluation, "_draw_batch", counted(drawn))
    assert tiny(digits, cut, *LONG) == 0
    assert drawn == [range(i, i + 8) for i in (8, 16, 0, 8, 16)]
    assert_same(cut, whole)


def test_a_time_limit_shorter_than_an_evaluation_does_not_keep_a_run_from_its_end(
    digits, tmp_path, caplog
):
    caplog.set_level("INFO", "dtr_scale")
    short = ("--train.max_minutes=1e-9", "--evaluation.every_steps=1")
    starts = 1
    while tiny(digits, tmp_path, *LONG, *short) == 75:
        assert status(tmp_path)["saved_step"] == min(starts, 4)
        starts += 1
    assert starts <= 6
    assert "are kept" not in caplog.text and "no time for its evaluation" in caplog.text
    assert [record["step"] for record in journal(tmp_path)] == [1, 2, 3, 4]


def failing(self, *args):
    raise TypeError("an evaluation's bug")


@pytest.mark.parametrize("part", ["_draw_batch", "_publish"])
def test_an_evaluation_that_fails_never_ends_a_run(
    digits, tmp_path, monkeypatch, warnings_of, part
):
    plain = tmp_path / "plain"
    tiny(digits, plain)
    monkeypatch.setattr(PeriodicEvaluation, "check", lambda self: None)
    monkeypatch.setattr(PeriodicEvaluation, part, failing)
    assert tiny(digits, tmp_path / "run", *LONG) == 0
    told = "evaluation failed, training goes on: TypeError: an evaluation's bug"
    assert warnings_of("dtr_scale.train.evaluate") == [f"step 2: {told}", f"step 4: {told}"]
    assert journal(tmp_path / "run") == journal(plain)


def on_ranks(digits: Path, run_dir: Path, fault: str) -> int:
    """Runs on each rank: rank 1 alone fails in its second batch, or is asked to leave there."""
    before = PeriodicEvaluation._draw_batch
    if os.environ["RANK"] == "1":
        calls = itertools.count(1)

        def fails(self, batch, step):
            if len(batch) and next(calls) == 2:
                failing(self)
            return before(self, batch, step)

        PeriodicEvaluation._draw_batch = fails if fault == "fails" else terminated_at(2)
    two = ("--engine.type=fsdp2", "--engine.precision=fp32", "--train.micro_batch_size=16")
    many = "--evaluation.num_samples=40"
    return train_experiment(demo_experiment(digits, run_dir, *TINY, *two, *LONG, many))


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [("fails", 0), ("leaves", 75)])
def test_what_happens_to_one_rank_while_it_samples_is_what_all_do(digits, tmp_path, fault, code):
    assert run_on_ranks(2, on_ranks, digits, tmp_path, fault) == [code, code]
    names = names_in(tmp_path / "samples")
    if fault == "fails":
        assert names == ["step_00000004.png"]
    else:
        assert names == [".step_00000002"]
        # Rank 1 was in the middle of its second batch, so all have finished their first.
        assert names_in(tmp_path / "samples" / names[0]) == ["0.npz", "1.npz", "plan.json"]
        assert status(tmp_path)["saved_step"] == 2
