"""Parse `supervise`, which starts a training again after a failure."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dtr_scale.cli.arguments import (
    Commands,
    Parser,
    add_config,
    positive_integer,
    positive_number,
    runs,
    whole_number,
)
from dtr_scale.errors import ConfigError
from dtr_scale.launchers import restarting_launcher

log = logging.getLogger(__name__)

_EXAMPLES = """dtr-scale supervise --nproc 8 --restarts 5 -- --config configs/dit_l_dtr_antuw.json
  dtr-scale supervise --hostfile hostfile -- --config configs/dit_l_dtr_antuw.json
  dtr-scale supervise --nproc 8 --nnodes 2 --node-rank 0 --rdzv-endpoint node1:29400 \\
      -- --config configs/dit_l_dtr_antuw.json"""


def add_supervise(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "supervise",
        "train",
        "train, and start all ranks again when one fails; on one node or several, from the newest "
        "complete checkpoint, not after a mistake (2) or a request to leave (75); torchrun, SLURM "
        "and Kubernetes do so by themselves, and are left to it",
        _EXAMPLES,
    )
    add = parser.add_argument
    add("--nproc", type=positive_integer, help="ranks on each node (default: its GPUs, or 1)")
    add("--restarts", type=whole_number, default=10, help="of all ranks, at most")
    add(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="hosts, as in launch/hostfile.example: the first is this one, ssh starts the others'",
    )
    add("--nnodes", type=positive_integer, default=1, help="nodes, each with its own supervisor")
    add("--node-rank", type=whole_number, default=0, help="which of them this one is")
    add("--rdzv-endpoint", metavar="HOST:PORT", help="node 0, and a free port there")
    add("--wait-minutes", type=positive_number, default=10, help="for a node that is missing")
    add("--by-ssh", action="store_true", help=argparse.SUPPRESS)
    add("training", nargs="+", metavar="-- --config FILE", help="what train takes, after a --")
    runs(parser, _supervise, on_ranks=True)


def _supervise(arguments: argparse.Namespace) -> int:
    training, restarts = arguments.training, arguments.restarts
    if launcher := restarting_launcher():
        log.info("%s starts again what has failed; here it is started once", launcher)
        restarts = 0
    if "RANK" in os.environ:  # this is a rank already
        from dtr_scale.cli.main import main

        return main(["train", *training])
    # Before torch is imported, and before any rank is started: a mistake is told at once.
    run_path = _run_path(training)
    if arguments.hostfile and arguments.nnodes > 1:
        raise ConfigError("--hostfile names all nodes; leave out --nnodes, or the file")
    from dtr_scale.jobs.supervise.start import Nodes, start_supervisor

    return start_supervisor(
        training,
        run_path,
        Nodes(
            arguments.nnodes,
            arguments.node_rank,
            arguments.rdzv_endpoint,
            60 * arguments.wait_minutes,
        ),
        nproc=arguments.nproc,
        restarts=restarts,
        hostfile=arguments.hostfile,
        by_ssh=arguments.by_ssh,
    )


def _run_path(training: Sequence[str]) -> Path:
    """Return the run directory of a training; ConfigError if it cannot be run as it is given."""
    from dtr_scale.config.load import load_experiment

    parser = Parser(prog="dtr-scale supervise ... --", usage="%(prog)s --config FILE [overrides]")
    add_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="the ranks' own matter")
    found, overrides = parser.parse_known_args(training)
    return load_experiment(found.config, overrides).run_path
