"""Functions that run on the stub, in a process of their own; arguments and results are JSON."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import join_world
from dtr_scale.jobs.build import build_trainer
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.trainer import Trainer
from tests.gpu_stub import pretend
from tests.support.runs import ROOT

_stub = ctypes.CDLL(None)  # preloaded
SMALL = (
    "--data.type=synthetic", "--data.num_workers=0", "--tracking.type=none", "--train.log_every=1",
    "--evaluation.every_steps=0", "--checkpoint.every_steps=1000",
)  # fmt: skip
PARTS = ("engine.forward", "engine.backward", "engine.step", "ema.update", "objective.update")


def record_step(
    log: str, overrides: list[str], gpu: int, world_size: int, steps: int = 4
) -> dict[str, Any]:
    """Train some steps, the last of them with a log, marked by its parts; return its figures."""
    pretend.pretend_numbers()
    experiment = _experiment(Path(log).with_suffix(""), overrides, steps)
    counters.clear()
    with pretend.pretend_world(gpu, world_size):
        world = join_world(needs_process_group=experiment.engine.type != "single")
        trainer = build_trainer(experiment, world)
        _log_last_step(trainer, log)
        records: list[Any] = []
        trainer.run(LeaveRequest(), log=records.append)
        trainer.loader.close()
    return {
        "steps": [record["step"] for record in records],
        "graphs": counters["stats"].get("unique_graphs", 0),
        "breaks": sum(counters["graph_break"].values()),
    }


def _experiment(place: Path, overrides: list[str], steps: int) -> Experiment:
    own = [f"--run_dir={place}", f"--train.max_steps={steps}"]
    return load_experiment(ROOT / "configs" / "dit_l_dtr_antuw.json", [*SMALL, *own, *overrides])


def _log_last_step(trainer: Trainer, log: str) -> None:
    marked: Any = trainer
    for name in PARTS:
        owner, method = name.split(".")
        _mark(getattr(trainer, owner), method, name)
    train_step = trainer._train_step

    def logged(*args: Any) -> Any:
        last = trainer.step == trainer.max_steps - 1
        if last:
            _stub.stub_open_log(log.encode())
            torch.cuda.set_sync_debug_mode("warn")
        try:
            return train_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            _stub.stub_open_log(b"")

    marked._train_step = logged
    marked._save_for_certain = lambda *args: None


def _mark(owner: Any, method: str, name: str) -> None:
    """Tell the log where a part of the step begins and ends."""
    call = getattr(owner, method)

    def marked(*args: Any, **kwargs: Any) -> Any:
        _stub.stub_mark(name.encode())
        try:
            return call(*args, **kwargs)
        finally:
            _stub.stub_mark(f"after_{name}".encode())

    setattr(owner, method, marked)
