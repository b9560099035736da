"""Parse the commands that run an experiment: train and health."""

import argparse
import os
from pathlib import Path

from dtr_scale.cli.arguments import (
    OVERRIDES,
    Commands,
    add_config,
    positive_number,
    runs,
)
from dtr_scale.cli.config import add_config_commands
from dtr_scale.cli.plan import add_plan
from dtr_scale.errors import ConfigError
from dtr_scale.heartbeat import HEARTBEAT, check_heartbeat, launched_heartbeat
from dtr_scale.logs import telling
from dtr_scale.signals import LeaveRequest


def add_experiments(commands: Commands) -> None:
    """Add the commands to their groups."""
    add_config_commands(commands)
    add_plan(commands)
    _add_train(commands)
    _add_health(commands)


def _add_train(commands: Commands) -> None:
    parser = commands.add(
        "train",
        "train",
        f"train an experiment, or go on with it; {OVERRIDES}",
        "dtr-scale train --config configs/dit_l_dtr_antuw.json --dry-run\n"
        "  deepspeed launch/train.py --config configs/dit_l_dtr_antuw.json --train.lr=2e-4",
    )
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check all that the training needs and tell what it would do; nothing is written",
    )
    runs(parser, _train, overrides=True, on_ranks=True)


def _add_health(commands: Commands) -> None:
    parser = commands.add(
        "health",
        "train",
        "tell a container's probe whether the training on this node lives; exit code 1 if its "
        f"heartbeat has stopped, 0 if it beats or nothing trains here; {HEARTBEAT} names the file",
        "dtr-scale health /tmp/heartbeat --max-minutes 5",
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help=f"what the training renews (default: ${HEARTBEAT})"
    )
    parser.add_argument(
        "--max-minutes", type=positive_number, default=5, help="the oldest that is accepted"
    )
    runs(parser, _health)


def _train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.dry_run:
        return _dry_run(arguments, overrides)
    heartbeat = launched_heartbeat()
    leave = LeaveRequest(at_once=heartbeat.remove)
    # Before torch is imported, which takes seconds: a job may be preempted in its first one.
    with leave.listening(), heartbeat.beating():
        from dtr_scale.config.load import load_experiment

        # The same here: a mistake in the file is told at once.
        experiment = load_experiment(arguments.config, overrides)
        # From a shared file system it may take a minute.
        with telling("loading PyTorch and what trains with it"):
            from dtr_scale.jobs.train import train_experiment

        return train_experiment(experiment, heartbeat, leave)


def _dry_run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from dtr_scale.config.load import load_experiment

    experiment = load_experiment(arguments.config, overrides)
    from dtr_scale.jobs.dry_run import dry_run

    dry_run(experiment)
    return 0


def _health(arguments: argparse.Namespace) -> int:
    path = arguments.file or os.environ.get(HEARTBEAT)
    if not path:
        raise ConfigError(f"health needs a file: give FILE, or set {HEARTBEAT}")
    is_well, told = check_heartbeat(Path(path), 60 * arguments.max_minutes)
    print(told)
    return 0 if is_well else 1
