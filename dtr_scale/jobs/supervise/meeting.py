"""Let the supervisors of all nodes meet before each attempt: none begins without the others.

Node 0 listens at the endpoint. The others connect, say who they are, and are told when all are
there. Who is gone meanwhile connects again, so that a node may be lost and come back at any time.
The connections stand as long as the attempt: their end tells the other nodes that it has failed.
"""

import json
import logging
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from dtr_scale.engines.connection import keep_alive, listen
from dtr_scale.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

_AGAIN_SECONDS = 1.0
_HELLO_SECONDS = 5.0
_MAX_LINE = 4096
_TELL_SECONDS = 30.0
_FINISHED = b"finished\n"


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
        self._attempt = _Connections()
        self._listener: socket.socket | None = None
        if not self._others:
            return
        try:
            self._listener = listen(endpoint[1], backlog=nnodes + 16)
        except OSError as error:
            raise ConfigError(
                f"--rdzv-endpoint: port {endpoint[1]} cannot be listened on: {error.strerror}; "
                "give another one to all nodes"
            ) from None

    def begin(self) -> Attempt:
        """Return the next attempt, once all nodes are here; `check` may raise on the way.

        EngineError if one is missing for longer than the patience.
        """
        self._attempt.end(finished=False)
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
            with suppress(OSError):  # lost at this moment: it comes to the next meeting
                guest.sendall(json.dumps(attempt).encode() + b"\n")
        self._attempt = _Connections(self._guests.values())
        self._guests = {}
        return attempt

    def is_over(self) -> bool:
        """Tell whether the attempt has failed on another node, or that node is lost."""
        return self._attempt.are_lost()

    def end(self, *, finished: bool) -> None:
        """Let the other nodes know how this node's ranks have ended."""
        self._attempt.end(finished=finished)

    def close(self) -> None:
        """Leave the meetings; who waits there knows at once."""
        self._attempt.end(finished=False)
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
        self._attempt = _Connections()

    def begin(self) -> Attempt:
        """Return the next attempt, once all nodes are here.

        EngineError if node 0 is not there for longer than the patience.
        """
        self._attempt.end(finished=False)
        deadline = time.monotonic() + self._patience
        while True:
            with suppress(OSError, ValueError, TypeError), ExitStack() as stack:
                host = socket.create_connection(self._endpoint, timeout=_HELLO_SECONDS)
                stack.enter_context(host)
                keep_alive(host)
                host.sendall(json.dumps({"node": self._node}).encode() + b"\n")
                # As long as it takes: node 0 waits for the others, or for its ranks to end.
                host.settimeout(None)
                attempt = Attempt(*_read_line(host))
                stack.pop_all()  # the connection stands as long as the attempt
                self._attempt = _Connections([host])
                return attempt
            if time.monotonic() > deadline:
                place = ":".join(map(str, self._endpoint))
                raise _missing(f"node 0 does not answer at {place}", self._patience)
            time.sleep(_AGAIN_SECONDS)

    def is_over(self) -> bool:
        """Tell whether the attempt has failed on another node, or node 0 is lost."""
        return self._attempt.are_lost()

    def end(self, *, finished: bool) -> None:
        """Let the other nodes know how this node's ranks have ended."""
        self._attempt.end(finished=finished)

    def close(self) -> None:
        """Leave the meetings."""
        self._attempt.end(finished=False)


class _Connections:
    """The connections of one attempt."""

    def __init__(self, connections: Iterable[socket.socket] = ()) -> None:
        self._connections = list(connections)
        self._is_one_lost = False

    def are_lost(self) -> bool:
        """Tell whether one of them has ended without a word."""
        for connection in select.select(self._connections, [], [], 0)[0]:
            try:
                told = connection.recv(len(_FINISHED))
            except OSError:
                told = b""
            # A node that has finished may end before the others.
            self._is_one_lost = self._is_one_lost or told != _FINISHED
            self._connections.remove(connection)
            connection.close()
        return self._is_one_lost

    def end(self, *, finished: bool) -> None:
        for connection in self._connections:
            with connection, suppress(OSError):
                connection.sendall(_FINISHED if finished else b"")
        self._connections = []


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
