"""Measure what saving and loading cost here, beside what they are to be compared with."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import xxhash

from dtr_scale.checkpoint.layout import BLOCK_BYTES, ITEM_BYTES, rank_file
from dtr_scale.config.load import validate
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.jobs.bench.place import temporary_folder
from dtr_scale.jobs.build import build_trainer
from dtr_scale.launchers import launched_world_size
from dtr_scale.logs import watched
from dtr_scale.signals import LeaveRequest
from dtr_scale.storage.folder import Folder, open_folder
from dtr_scale.tracking.journal import Record


def bench_checkpoint(model: str, *, rounds: int, place: str | None = None) -> str:
    """Return rank 0's table of times and GB/s for a DiT variant.

    The checkpoints, two at a time, go to a folder below `place`, local or s3://, by default the
    temporary one, and are removed. Under a launcher all its ranks share them, with ZeRO-1.
    """
    several = launched_world_size() > 1
    world = join_world(needs_process_group=several)
    on_gpu = world.device.type == "cuda"
    batch_size = 32 if on_gpu else 4
    settings: dict[str, Any] = {
        "name": "bench",
        "model": {"type": "dit", "variant": model, "routing": {"type": "dtr"}},
        "objective": {"type": "ant_uw"},
        "data": {"type": "synthetic", "num_workers": 0},
        "train": {
            "max_steps": rounds + 1,
            "global_batch_size": batch_size * world.world_size,
            "micro_batch_size": batch_size,
            "log_every": 1,
        },
        "engine": {"type": "deepspeed" if several else "single", "compile": on_gpu},
        "checkpoint": {"keep_last": 1, "keep_every": 0},
    }
    with temporary_folder(place, world) as folder:
        settings["checkpoint"]["dir"] = folder.url
        table = measure(validate(settings, "bench"), world, rounds)
    world.leave()
    return table


def measure(experiment: Experiment, world: World, rounds: int) -> str:
    """Return the table for an experiment, after training it to its end for the time of a step."""
    trainer = build_trainer(experiment, world)
    checkpoints, step = trainer.checkpoints, experiment.train.max_steps
    checkpoints.check_folder()
    records: list[Record] = []
    trainer.run(LeaveRequest(), log=records.append, evaluate=lambda step: None)
    trainer.loader.close()
    state = trainer.state.pieces()
    num_bytes = sum(ITEM_BYTES * piece.data.numel() for piece in state.values())
    batch_size, precision = experiment.train.global_batch_size, experiment.engine.precision
    # Without the first step, in which torch compiles and allocates.
    steps = [batch_size / record["samples_per_second"] for record in records[1:]]
    stalls, saves, loads, readings = [], [], [], []
    numbers = range(step + 1, step + rounds + 1)
    for number in watched(numbers, "saves and restores", rounds, shown=world.is_main):
        # Before each timing: a rank that comes late would be measured as slow saving by the others.
        world.barrier()
        stall = _seconds(lambda n=number: checkpoints.save(n, state, trainer.meta))
        stalls.append(stall)
        saves.append(stall + _seconds(checkpoints.wait))
        world.barrier()
        loads.append(_seconds(lambda: checkpoints.load_newest(state)))
        world.barrier()
        stored = open_folder(checkpoints.url(number), experiment.data.storage_options)
        readings.append(_seconds(lambda f=stored: _read_and_hash(f, rank_file(world.rank))))
    return "\n".join(
        [
            f"{experiment.model.title}, {num_bytes / 1e9:.3g} GB on rank 0 of {world.world_size}, "
            f"{world.device.type}; {rounds} rounds in {experiment.checkpoint.dir}",
            f"{'':38}{'median':>8}{'min':>8}{'max':>8} s{'GB/s':>7}",
            _row(f"training step, batch {batch_size}, {precision}", steps),
            _row("save: the loop stands still", stalls, num_bytes),
            _row("save: until it is complete", saves, num_bytes),
            _row("restore", loads, num_bytes),
            _row("reading and hashing the same bytes", readings, num_bytes),
            f"{'stall per training step':38}{median(stalls) / median(steps):8.2f}  below 1 wanted",
            f"{'speed of restoring, of reading alone':38}"
            f"{median(readings) / median(loads):8.2f}  0.5 or more wanted",
        ]
    )


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _read_and_hash(folder: Folder, file: str) -> None:
    """Read and hash a rank's file, the least that a load has to do."""
    buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8).numpy().data
    num_bytes = folder.size(file)
    for start in range(0, num_bytes, BLOCK_BYTES):
        block = buffer[: num_bytes - start]
        folder.read_into(file, start, [block])
        xxhash.xxh3_64_hexdigest(block)


def _row(name: str, seconds: list[float], num_bytes: int = 0) -> str:
    speed = f"{num_bytes / median(seconds) / 1e9:7.2f}" if num_bytes else ""
    figures = "".join(f"{value:8.3f}" for value in (median(seconds), min(seconds), max(seconds)))
    return f"{name:38}{figures}  {speed}"
