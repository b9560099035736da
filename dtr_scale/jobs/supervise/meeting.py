"""Let the supervisors of all nodes meet before each attempt: none begins without the others.

Node 0 listens at the endpoint. The others connect, say who they are, and are told when all are
there. Who is gone meanwhile connects again, so that a node may be lost and come back at any time.
"""

import json
import logging
import secrets
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from dtr_scale.engines.connection import keep_alive
from dtr_scale.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
_HELLO_SECONDS = 5.0
_MAX_LINE = 4096
_TELL_SECONDS = 30.0


class Attempt(NamedTuple):
    """One start of all ranks: its number from 0, and where the ranks find each other."""

    number: int
    launch: str
    """What tells this launch from others, the same at all of its attempts."""
    host: str
    port: int


class Host:
    """Node 0's side of the meetings; of one node alone, which meets nobody."""

    def __init__(
        self,
        nnodes: int = 1,
        endpoint: tuple[str, int] = ("127.0.0.1", 0),
        *,
        patience_seconds: float = 600.0,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._host = endpoint[0]
        self._others = set(range(1, nnodes))
        self._patience = patience_seconds
        self._check = check
        self._number = -1
        self._launch = f"supervise-{secrets.token_hex(4)}"
        self._guests: dict[int, socket.socket] = {}
        self._listener: socket.socket | None = None
        if not self._others:
            return
        try:
            self._listener = socket.create_server(("", endpoint[1]), backlog=nnodes + 16)
        except OSError as error:
            raise ConfigError(
                f"--rdzv-endpoint: port {endpoint[1]} cannot be listened on: {error.strerror}; "
                "give another one to all nodes"
            ) from None

    def begin(self) -> Attempt:
        """Return the next attempt, once all nodes are here; `check` may raise on the way.

        EngineError if one is missing for longer than the patience.
        """
        deadline = time.monotonic() + self._patience
        told_at = time.monotonic() + _TELL_SECONDS / 3
        while missing := sorted(self._others - self._present()):
            if self._check:
                self._check()
            now = time.monotonic()
            if now > deadline:
                raise _missing(f"nodes {missing} have not come", self._patience)
            if now > told_at:
                told_at = now + _TELL_SECONDS
                log.info("waiting for nodes %s of %d", missing, len(self._others) + 1)
            assert self._listener
            if select.select([self._listener], [], [], _AGAIN_SECONDS)[0]:
                self._welcome(self._listener.accept()[0])
        self._number += 1
        attempt = Attempt(self._number, self._launch, self._host, _free_port())
        for guest in self._guests.values():
            with guest, suppress(OSError):  # lost at this moment: it comes to the next meeting
                guest.sendall(json.dumps(attempt).encode() + b"\n")
        self._guests = {}
        return attempt

    def close(self) -> None:
        """Leave the meetings; who waits there knows at once."""
        for connection in filter(None, (self._listener, *self._guests.values())):
            connection.close()

    def _welcome(self, guest: socket.socket) -> None:
        guest.settimeout(_HELLO_SECONDS)
        with suppress(OSError, ValueError, KeyError, TypeError):
            node = int(_read_line(guest)["node"])
            if node in self._others:
                keep_alive(guest)
                if node in self._guests:  # of two of the same node, the later one is alive
                    self._guests[node].close()
                self._guests[node] = guest
                return
        guest.close()

    def _present(self) -> set[int]:
        """Return the nodes whose connection stands."""
        for node, guest in list(self._guests.items()):
            # A guest says nothing more: what is readable is the end of its connection.
            if select.select([guest], [], [], 0)[0]:
                self._guests.pop(node).close()
        return set(self._guests)


class Guest:
    """Another node's side of the meetings."""

    def __init__(
        self, node_rank: int, endpoint: tuple[str, int], *, patience_seconds: float = 600.0
    ) -> None:
        self._node = node_rank
        self._endpoint = endpoint
        self._patience = patience_seconds

    def begin(self) -> Attempt:
        """Return the next attempt, once all nodes are here.

        EngineError if node 0 is not there for longer than the patience.
        """
        seen = time.monotonic()
        while True:
            with (
                suppress(OSError, ValueError, TypeError),
                socket.create_connection(self._endpoint, timeout=_HELLO_SECONDS) as host,
            ):
                keep_alive(host)
                host.sendall(json.dumps({"node": self._node}).encode() + b"\n")
                # As long as it takes: node 0 waits for the others, or for its ranks to end.
                host.settimeout(None)
                answer = _read_line(host)
                seen = time.monotonic()
                return Attempt(*answer)
            if time.monotonic() - seen > self._patience:
                place = ":".join(map(str, self._endpoint))
                raise _missing(f"node 0 does not answer at {place}", self._patience)
            time.sleep(_AGAIN_SECONDS)


def _read_line(connection: socket.socket) -> Any:  # noqa: ANN401
    with connection.makefile("rb") as file:
        return json.loads(file.readline(_MAX_LINE))


def _missing(what: str, seconds: float) -> EngineError:
    error = EngineError(
        f"{what} for {seconds / 60:.0f} minutes; start the supervisor on every node, or start "
        "again with the nodes that you have: the run goes on from its newest checkpoint"
    )
    error.exit_code = 1
    return error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
