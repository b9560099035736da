"""Updates that are not made: what stays as it was, what goes on, and the way back."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_scale.errors import DivergenceError
from dtr_scale.jobs import train as job
from dtr_scale.jobs.build import build_trainer
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.attempts import read_attempts
from dtr_scale.train import guard
from dtr_scale.train.skipped import SkipLog, SkippedStep
from dtr_scale.train.trainer import Trainer
from tests.support.engine_jobs import LONE
from tests.support.poison import poison
from tests.support.runs import (
    BATCH,
    SINGLE,
    TIMINGS,
    demo_experiment,
    journal,
    kept,
    run_trainer,
    status,
    train,
)

STEPS = (*BATCH, "--train.max_steps=8", "--checkpoint.every_steps=2")
BACK = ("--train.rollback_after=2",)


def built(digits: Path, place: Path, *overrides: str) -> Any:
    return build_trainer(demo_experiment(digits, place, *SINGLE, *STEPS, *overrides), LONE)


def figures(records):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def state(trainer) -> dict[str, Any]:
    pieces = {key: piece.data.clone() for key, piece in trainer.state.pieces().items()}
    return pieces | {"updates": torch.tensor(trainer.engine.optimizer_step)}


@pytest.mark.parametrize("broken", ["gradient", "loss", "spike"])
@pytest.mark.parametrize("clip", ["null", "0.5"])
def test_a_skipped_update_changes_nothing_but_the_position(
    digits, tmp_path, broken, clip, monkeypatch
):
    monkeypatch.setattr(guard, "_FEWEST", 2)
    averages = ("--train.ema_decays=[0.5]", "--train.ema_sigma_rel=[0.1]")
    spiky = ("--train.spike_factor=100", f"--train.grad_clip={clip}", "--train.weight_decay=0.1")
    trainer = built(digits, tmp_path, *averages, *spiky, "--objective.type=ant_uw")
    factor = 1e5 if broken == "spike" else math.nan
    poison(trainer, lambda step, salt: step in (5, 6), factor, loss=broken == "loss")
    states = [state(trainer)]
    trainer.loader.seek(0)
    told, records = [], []
    trainer.run(
        LeaveRequest(),
        log=lambda record: (states.append(state(trainer)), records.append(record)),
        on_skip=told.append,
    )
    trainer.loader.close()
    for step in range(1, 9):
        before, now = states[step - 1], states[step]
        same = {key for key in now if torch.equal(now[key], before[key])}
        kinds = {key.partition("/")[0] for key in now.keys() - same}
        if step in (5, 6):
            assert same == now.keys()
        else:
            assert kinds >= {
                "master", "exp_avg", "exp_avg_sq", "ema", "ema_0.5", "ema_power_0.1", "objective",
                "updates",
            }  # fmt: skip
    assert trainer.engine.optimizer_step == 6
    assert [record["samples_seen"] for record in records] == [32 * k for k in range(1, 9)]
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 0, 1, 2, 2, 2]
    assert [(step.step, step.in_a_row) for step in told] == [(5, 1), (6, 2)]
    order = trainer.loader._assembler.order
    located = order.samples(range(4 * 32, 5 * 32))
    names = [shard.name for shard in trainer.loader.samples.manifest.split("train")]
    assert told[0].samples == [(names[shard], index) for shard, index in located.tolist()]
    assert all(math.isfinite(record["loss_mean"]) for record in records[6:])


def resumed(digits: Path, place: Path, overrides: tuple[str, ...], cuts: list[int], **broken: Any):
    """Return the records of a run that ends and goes on after each of `cuts`."""
    records = []
    for end in (*cuts, 8):
        trainer = built(digits, place, *overrides, f"--train.max_steps={end}")
        poison(trainer, **broken)
        trainer.resume()
        records += run_trainer(trainer)
    return repr(figures(records))  # which nan is no less


@pytest.mark.parametrize("cuts", [[5], [6], [7], [5, 6]])
@pytest.mark.parametrize("factor", [math.nan, 1e5])
def test_a_resumed_run_decides_the_same(digits, tmp_path, cuts, factor, monkeypatch):
    """Also one that ends between two skipped steps, or in the window of a limit."""
    monkeypatch.setattr(guard, "_FEWEST", 2)
    settings = ("--train.spike_factor=100", "--train.ema_sigma_rel=[0.1]")
    broken: Any = {"steps": lambda step, salt: step in (5, 6), "factor": factor}
    through = resumed(digits, tmp_path / "through", settings, [], **broken)
    assert "'skipped_steps': 2" in through
    assert resumed(digits, tmp_path / "resumed", settings, cuts, **broken) == through


def test_limits_are_those_of_figures_that_are_read_late(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_FEWEST", 2)
    found = []
    for steps_late in (0, 1):
        # So close that some steps are spikes, which the limits of other steps would not be.
        tight = ("--train.spike_factor=1.05", "--train.rollback_after=9")
        trainer = built(digits, tmp_path / str(steps_late), *tight, "--checkpoint.every_steps=3")
        trainer.readback.steps_late = steps_late
        told = []
        records = []
        trainer.run(LeaveRequest(), log=records.append, on_skip=told.append)
        trainer.loader.close()
        found.append((figures(records), told))
    assert found[0] == found[1]
    assert 0 < len(found[0][1]) < 7


def test_a_save_that_falls_on_a_skipped_step_waits_for_the_next_update(digits, tmp_path):
    trainer = built(digits, tmp_path, "--checkpoint.keep_last=9")
    poison(trainer, lambda step, salt: step in (2, 6, 7))
    run_trainer(trainer)
    assert kept(tmp_path) == [3, 4, 8]


@pytest.fixture
def poisoned(monkeypatch):
    """Let every job of a test train with broken gradients at these steps."""

    def break_at(steps):
        def build(experiment, world):
            trainer = build_trainer(experiment, world)
            poison(trainer, steps)
            return trainer

        monkeypatch.setattr(job, "build_trainer", build)

    return break_at


def skipped(run_dir: Path) -> list[tuple[int, int]]:
    lines = (run_dir / "skipped.jsonl").read_text().splitlines()
    return [(entry["step"], entry["salt"]) for entry in map(json.loads, lines)]


def test_a_run_goes_back_and_draws_anew(digits, tmp_path, poisoned):
    poisoned(lambda step, salt: salt == 0 and step >= 5)
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    assert train(digits, broken, *STEPS, *BACK) == 0
    poisoned(lambda step, salt: False)
    assert train(digits, clean, *STEPS, *BACK) == 0
    found, expected = journal(broken), journal(clean)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert found[:4] == expected[:4]
    assert [record["rollbacks"] for record in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    # The same samples at the same places, with other noise and timesteps.
    assert all(a["loss"] != b["loss"] for a, b in zip(found[4:], expected[4:], strict=True))
    assert skipped(broken) == [(5, 0), (6, 0)]
    assert not (clean / "skipped.jsonl").exists()
    assert kept(broken) == [4, 6, 8]
    assert status(broken)["outcome"] == "finished"
    attempts = [(a.step, a.end_step, a.outcome) for a in read_attempts(broken)]
    assert attempts == [(0, 6, "rolled back"), (4, 8, "finished")]


@pytest.mark.parametrize("cut", [5, 6, 7])
def test_a_run_that_was_stopped_on_its_way_back_takes_the_same_way(digits, tmp_path, poisoned, cut):
    """Before the skipped steps are enough, at the rollback, and after it, before it was saved."""
    poisoned(lambda step, salt: salt == 0 and step >= 5)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train(digits, through, *STEPS, *BACK, "--checkpoint.every_steps=4")
    leaving = LeaveRequest()
    before = Trainer._train_step

    def train_step(self, batches):
        if self.step + 1 == cut and (cut < 7 or self.guard.rollbacks):
            leaving._signal = "test"  # as a signal would
        return before(self, batches)

    experiment = demo_experiment(
        digits, stopped, *SINGLE, *STEPS, *BACK, "--checkpoint.every_steps=4"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        assert job.train_experiment(experiment, leave=leaving) == 75
    assert job.train_experiment(experiment) == 0
    assert journal(stopped) == journal(through)
    assert skipped(stopped) == skipped(through)
    # Step 7 is on the way that was taken; what was saved at step 5 was given up with the other.
    assert set(kept(stopped)) - {7} == set(kept(through))


def test_a_run_that_comes_back_in_vain_has_diverged(digits, tmp_path, poisoned):
    poisoned(lambda step, salt: step >= 6)
    told = "step 7: .*diverged; updates skipped in a row: 2, rollbacks: 2; the newest .* step 4"
    with pytest.raises(DivergenceError, match=told) as caught:
        train(digits, tmp_path, *STEPS, *BACK, "--train.max_rollbacks=2")
    assert caught.value.exit_code == 1
    assert skipped(tmp_path) == [(step, salt) for salt in range(3) for step in (6, 7)]
    assert status(tmp_path)["outcome"] == "failed"
    assert status(tmp_path)["saved_step"] == 4


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(digits, tmp_path, poisoned):
    poisoned(lambda step, salt: step >= 2)
    with pytest.raises(DivergenceError, match=r"step 3: .*nothing was saved yet"):
        train(digits, tmp_path, *STEPS, *BACK, "--checkpoint.every_steps=5")


def test_each_checkpoint_has_its_own_rollbacks(digits, tmp_path, poisoned):
    """A run that gets further after each of them goes on."""
    poisoned(lambda step, salt: (step in (3, 4) and salt == 0) or (step in (7, 8) and salt < 3))
    assert train(digits, tmp_path, *STEPS, *BACK, "--train.max_rollbacks=2") == 0
    assert [record["rollbacks"] for record in journal(tmp_path)] == [0, 0, 1, 1, 1, 1, 3, 3]


def test_every_rank_reads_other_draws_after_a_rollback(digits, tmp_path):
    trainer = built(digits, tmp_path, *BACK)
    poison(trainer, lambda step, salt: salt == 0 and step >= 5)
    seen: dict[tuple[int, int], Any] = {}
    loss = trainer._loss

    def watched(output, x_t, batch, counts):
        seen[trainer.step + 1, trainer.guard.rollbacks] = batch
        return loss(output, x_t, batch, counts)

    trainer._loss = watched
    run_trainer(trainer)
    first, again = seen[5, 0], seen[5, 1]
    assert torch.equal(first.cluster, again.cluster)
    assert not torch.equal(first.noise, again.noise)
    assert not torch.equal(first.t, again.t)


def test_what_a_kill_has_cut_off_is_made_again(tmp_path):
    step = SkippedStep(3, 0, 1.0, 0.5, math.nan, (math.inf, math.inf), 1, [("a.tar", 7)])
    log = SkipLog(tmp_path / "skipped.jsonl", step=0, salt=0)
    log.write(step)
    log.write(replace(step, step=5))
    log.write(replace(step, step=8))
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"step": 9, "sa')
    SkipLog(tmp_path / "skipped.jsonl", step=5, salt=0).write(replace(step, step=6, salt=1))
    assert skipped(tmp_path) == [(3, 0), (5, 0), (6, 1)]
    # A way that was given up stays; what the run makes again goes.
    SkipLog(tmp_path / "skipped.jsonl", step=4, salt=1)
    assert skipped(tmp_path) == [(3, 0), (5, 0)]
