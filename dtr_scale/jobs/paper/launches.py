"""Say and start what is missing of a table: its trainings, then their measurements."""

import json
import logging
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dtr_scale.errors import ConfigError
from dtr_scale.jobs.paper.collect import Training, run_place
from dtr_scale.jobs.paper.tables import Column, Row
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_GO_ON = 1, 75
ARRAY = "trainings.txt"


class Places(NamedTuple):
    """Where things are."""

    configs: Path
    runs: Path
    references: Path | None
    """Files of `dtr-scale evaluate reference`, named as the data sets: imagenet-256.npz."""
    data_root: str | None = None
    """Where prepared data is, in place of the experiments' own."""
    tracked: Sequence[Path] = ()
    """Run directories that are not below `runs`, such as those that MLflow has told of."""

    @property
    def launch(self) -> Path:
        return self.configs.parent / "launch"


def train_command(training: Training, places: Places) -> list[str]:
    """Return what starts a training on this machine, or goes on with it."""
    match training.experiment.engine.type:
        case "single":
            launcher = ["dtr-scale", "train"]
        case "fsdp2" | "flat":
            gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1
            launcher = ["torchrun", f"--nproc_per_node={gpus}", str(places.launch / "train.py")]
        case _:
            launcher = ["deepspeed", str(places.launch / "train.py")]
    return [*launcher, "--config", *train_arguments(training, places)]


def train_arguments(training: Training, places: Places) -> list[str]:
    run_dir = run_place(training.experiment, places.runs)
    return [str(training.config), f"--run_dir={run_dir}", *training.overrides]


def measure_commands(
    row: Row, columns: Sequence[Column], training: Training, places: Places
) -> Iterator[list[str]]:
    """Yield what measures a row when it is trained; curves are measured in training."""
    run_dir = run_place(training.experiment, places.runs)
    metrics = {column.metric for column in columns}
    if "cka" in metrics:
        yield ["dtr-scale", "cka", str(run_dir)]
    counts = {column.num_samples for column in columns if column.step is None} - {None}
    for count in sorted(filter(None, counts)):
        command = ["dtr-scale", "evaluate", str(run_dir), "--features=inception"]
        command.append(f"--num-samples={count}")
        if places.references is not None:
            command.append(f"--reference={places.references / training.data_set}.npz")
        # `--num-samples` has said it already.
        more = {k: v for k, v in row.measured_with.items() if k != "evaluation.num_samples"}
        yield [*command, *(f"--{key}={json.dumps(value)}" for key, value in more.items())]


def start(command: Sequence[str]) -> int:
    """Run a command to its end, with its output here; return its exit code."""
    log.info("%s", shlex.join(command))
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} is not found; activate the environment that has dtr-scale first"
        ) from None


def array_command(
    trainings: Sequence[Training], places: Places, options: str, name: str
) -> list[str]:
    """Write the trainings of a job array, one a line; return what submits it."""
    lines = [shlex.join(train_arguments(training, places)) for training in trainings]
    folder = places.runs / "reproduce" / name
    open_folder(folder).write_bytes(ARRAY, ("\n".join(lines) + "\n").encode())
    return [
        "sbatch",
        f"--array=0-{len(lines) - 1}",
        *shlex.split(options),
        str(places.launch / "slurm" / "train.sbatch"),
        "--array-of",
        str(folder / ARRAY),
    ]
