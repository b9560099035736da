"""Start the supervisor of a node, alone or with those of other nodes."""

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from dtr_scale.errors import ConfigError
from dtr_scale.jobs.supervise.loop import supervise
from dtr_scale.jobs.supervise.meeting import Guest, Host
from dtr_scale.jobs.supervise.signals import SIGNALS, START_AGAIN, hand_signals_on, signal_ranks
from dtr_scale.jobs.supervise.ssh import RemoteSupervisors, follow_parent, read_hostfile
from dtr_scale.signals import LAUNCHER_PID

_PORT = 29400
"""Where supervisors meet that are started by ssh; torchrun's own default."""


class Nodes(NamedTuple):
    """Which node this is, of how many, and where they meet."""

    nnodes: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    """HOST:PORT."""
    patience_seconds: float = 600.0


def start_supervisor(
    training: Sequence[str],
    run_path: Path,
    nodes: Nodes,
    *,
    nproc: int | None = None,
    restarts: int,
    hostfile: Path | None = None,
    by_ssh: bool = False,
) -> int:
    """Supervise a training on this node, and with a hostfile on others; return the exit code.

    `by_ssh`: another host has started this one, and holds its stdin.
    """
    address = _address(nodes)
    if by_ssh:
        follow_parent(_leave)
    # Ranks leave when this process is gone.
    os.environ[LAUNCHER_PID] = str(os.getpid())
    hand_signals_on((*SIGNALS, signal.SIGHUP))
    with ExitStack() as stack:
        remote = None
        if hostfile:
            hosts = read_hostfile(hostfile)
            address = hosts[0].name, _PORT
            nodes = nodes._replace(nnodes=len(hosts), endpoint=f"{hosts[0].name}:{_PORT}")
            slots, nproc = nproc, nproc or hosts[0].slots
            remote = RemoteSupervisors(
                hosts,
                lambda node: _arguments(
                    training, nodes, node, slots or hosts[node].slots, restarts
                ),
            )
            stack.callback(remote.close)
        patience = nodes.patience_seconds
        if nodes.node_rank == 0:
            check = remote and remote.check
            meeting = Host(nodes.nnodes, address, patience_seconds=patience, check=check)
            stack.callback(meeting.close)
        else:
            meeting = Guest(nodes.node_rank, address, patience_seconds=patience)
        return supervise(
            training,
            run_path,
            meeting,
            nproc=nproc or torch.cuda.device_count() or 1,
            nnodes=nodes.nnodes,
            node_rank=nodes.node_rank,
            restarts=restarts,
        )


def _address(nodes: Nodes) -> tuple[str, int]:
    if nodes.node_rank >= nodes.nnodes:
        raise ConfigError(
            f"--node-rank = {nodes.node_rank} with --nnodes = {nodes.nnodes}; give 0 to "
            f"{nodes.nnodes - 1}"
        )
    if nodes.endpoint is None:
        if nodes.nnodes > 1:
            raise ConfigError(
                f"--nnodes = {nodes.nnodes} needs --rdzv-endpoint HOST:PORT: node 0 and a free "
                "port there, the same on all nodes"
            )
        return "127.0.0.1", 0
    host, _, port = nodes.endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"--rdzv-endpoint = {nodes.endpoint!r} is not accepted; give HOST:PORT as node1:29400"
        )
    return host, int(port)


def _arguments(
    training: Sequence[str], nodes: Nodes, node_rank: int, nproc: int | None, restarts: int
) -> list[str]:
    """Return what the supervisor of another host is started with."""
    options = {
        "--nnodes": nodes.nnodes,
        "--node-rank": node_rank,
        "--rdzv-endpoint": nodes.endpoint,
        "--restarts": restarts,
        "--wait-minutes": nodes.patience_seconds / 60,
    }
    if nproc:
        options["--nproc"] = nproc
    given = [word for name, value in options.items() for word in (name, str(value))]
    return [*given, "--by-ssh", "--", *training]


def _leave() -> None:
    """Let the ranks checkpoint and leave; without any there is nothing to save."""
    if not signal_ranks(signal.SIGTERM):
        os._exit(START_AGAIN)
