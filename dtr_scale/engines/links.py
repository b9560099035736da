"""Exchange lines of JSON between rank 0 and every other rank, and notice at once who is gone."""

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from dtr_scale.engines.connection import keep_alive, listen
from dtr_scale.errors import EngineError

_CONNECT_SECONDS = 30.0
_SEND_SECONDS = 5.0
# The port is open to strangers, too, and one of them may send without end.
_CHUNK, _MAX_LINE = 65536, 65536


class Address(NamedTuple):
    """Where rank 0 listens, and what a connection has to know to be a rank's."""

    host: str
    port: int
    token: str


class Link:
    """A connection to another rank."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        # For `send`: a process that is stopped reads nothing, and must not hold up other ranks.
        connection.settimeout(_SEND_SECONDS)
        keep_alive(connection)
        self._received = b""
        self.rank: int | None = None
        """Known once it has said so."""

    def lines(self) -> list[dict[str, Any]] | None:
        """Return what has come, None at the end; to be called when there is something to read."""
        try:
            chunk = self.connection.recv(_CHUNK)
        except OSError:
            return None
        *lines, self._received = (self._received + chunk).split(b"\n")
        if not chunk or len(self._received) > _MAX_LINE:
            return None
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None  # no rank


class Links:
    """The connections of a rank: rank 0 has one to every other rank, those have one to rank 0.

    `received(rank, line)` and `gone(rank)` are called by the thread that calls `wait`.
    """

    def __init__(
        self,
        rank: int,
        received: Callable[[int, dict[str, Any]], None],
        gone: Callable[[int], None],
    ) -> None:
        self._rank = rank
        self._received = received
        self._gone = gone
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = ""
        self._links: dict[int, Link] = {}

    def listen(self, host: str, backlog: int) -> Address:
        """Let other ranks connect, and return where."""
        self._listener = listen(0, backlog)
        self._selector.register(self._listener, selectors.EVENT_READ)
        # Whoever reaches the port could end the run with a line.
        self._token = secrets.token_hex(16)
        return Address(host, self._listener.getsockname()[1], self._token)

    def connect(self, address: Address, name: str) -> None:
        """Connect to rank 0; EngineError if it does not answer."""
        try:
            connection = socket.create_connection(address[:2], timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise EngineError(
                f"rank {self._rank} on {name} cannot reach rank 0 at "
                f"{address.host}:{address.port}: {error}; open the nodes' ports to each other, "
                "as NCCL and gloo need them too"
            ) from None
        link = Link(connection)
        link.rank = 0
        self._links[0] = link
        self._selector.register(connection, selectors.EVENT_READ, link)
        self.send({"rank": self._rank, "token": address.token, "host": name})

    def send(self, line: dict[str, Any]) -> None:
        """Send a line to every rank that this one is connected to; from any thread."""
        # The watch and the main thread both send: two lines at once would be cut into each other.
        content = json.dumps(line).encode() + b"\n"
        with self._lock:
            for link in self._links.values():
                with suppress(OSError):  # it is gone, as `wait` finds out
                    link.connection.sendall(content)

    def wait(self, seconds: float) -> None:
        """Take what comes within `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)

    def close(self) -> None:
        with self._lock:
            for link in self._links.values():
                link.connection.close()
            if self._listener:
                self._listener.close()
            self._selector.close()

    def _accept(self) -> None:
        assert self._listener
        with suppress(OSError):
            link = Link(self._listener.accept()[0])
            self._selector.register(link.connection, selectors.EVENT_READ, link)

    def _read(self, link: Link) -> None:
        lines = link.lines()
        for line in lines or ():
            if link.rank is None and line.get("token") == self._token:
                link.rank = int(line["rank"])
                with self._lock:
                    self._links[link.rank] = link
            if link.rank is None:
                lines = None  # a stranger
                break
            self._received(link.rank, line)
        if lines is None:
            self._selector.unregister(link.connection)
            link.connection.close()
            if link.rank is not None:
                with self._lock:
                    del self._links[link.rank]
                self._gone(link.rank)
