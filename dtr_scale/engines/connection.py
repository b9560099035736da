"""Listen, and notice within seconds that the other end of a TCP connection is gone."""

import socket

IDLE_SECONDS, PROBE_SECONDS, NUM_PROBES = 2, 2, 2
LOST_SECONDS = IDLE_SECONDS + PROBE_SECONDS * NUM_PROBES
"""By when a host that does not answer, as behind a cut cable, is taken for lost."""


def listen(port: int, backlog: int) -> socket.socket:
    """Listen on a port of all addresses, IPv6 as well where there is any; 0 is any free port."""
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel ask the other host every few seconds whether it is there.

    The other kernel answers, whatever its process does: one that is stopped, or holds the GIL, is
    not lost. The end of a process is told by its kernel at once, without being asked.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)
    # Probes are not sent while data wait for an answer: the same limit for those.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS)
