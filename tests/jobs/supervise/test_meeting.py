"""Supervisors of several nodes, over real connections."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest

from dtr_scale.errors import ConfigError, EngineError
from dtr_scale.jobs.supervise.meeting import Guest, Host
from tests.support.processes import free_port


@pytest.fixture
def endpoint():
    return "127.0.0.1", free_port()


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def open_guest(endpoint):
    with ExitStack() as stack:
        yield lambda node: stack.enter_context(closing(Guest(node, endpoint)))


def test_all_nodes_begin_the_same_attempts(endpoint, threads, open_guest):
    guests = [open_guest(node) for node in (1, 2)]
    early = threads.submit(guests[0].begin)  # before node 0 is there
    time.sleep(0.2)
    with closing(Host(3, endpoint)) as host:
        first = [early, threads.submit(guests[1].begin), threads.submit(host.begin)]
        (attempt,) = {future.result(timeout=20) for future in first}
        second = [threads.submit(meeting.begin) for meeting in (*guests, host)]
        (again,) = {future.result(timeout=20) for future in second}
    assert (attempt.number, again.number) == (0, 1)
    assert attempt.launch == again.launch and attempt.host == "127.0.0.1"


def test_a_node_that_is_lost_while_others_wait_comes_back(endpoint, threads, open_guest):
    with closing(Host(2, endpoint)) as host:
        with socket.create_connection(endpoint) as lost:
            lost.sendall(b'{"node": 1}\n')
        with socket.create_connection(endpoint) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        waiting = threads.submit(host.begin)
        time.sleep(0.5)
        assert not waiting.done()
        assert open_guest(1).begin() == waiting.result(timeout=20)


def test_a_node_outlives_node_0(endpoint, threads, open_guest):
    gone = socket.create_server(endpoint)
    begun = threads.submit(open_guest(1).begin)
    gone.accept()[0].close()
    gone.close()
    with closing(Host(2, endpoint)) as host:
        assert host.begin() == begun.result(timeout=20)


@pytest.mark.parametrize("who", ["host", "guest"])
def test_a_failure_on_one_node_ends_the_attempt_on_the_others(endpoint, threads, open_guest, who):
    with closing(Host(2, endpoint)) as host:
        guest = open_guest(1)
        failed, other = (host, guest) if who == "host" else (guest, host)
        for _ in range(2):
            begun = threads.submit(guest.begin)
            assert host.begin() == begun.result(timeout=20)
            assert not other.is_over()
            failed.end(finished=False)
            assert other.is_over() and other.is_over()
            other.end(finished=False)
        begun = threads.submit(guest.begin)
        assert host.begin() == begun.result(timeout=20)
        failed.end(finished=True)
        assert not other.is_over(), "it finishes by itself"
        other.end(finished=True)


def test_a_missing_node_ends_the_wait(endpoint):
    with (
        closing(Host(2, endpoint, patience_seconds=0.2)) as host,
        pytest.raises(EngineError, match=r"nodes \[1\] have not come for 0 minutes") as error,
    ):
        host.begin()
    assert error.value.exit_code == 1
    with pytest.raises(EngineError, match=r"node 0 does not answer at 127\.0\.0\.1:"):
        Guest(1, ("127.0.0.1", free_port()), patience_seconds=0.2).begin()


def test_a_port_in_use_is_told(endpoint):
    with socket.create_server(("", endpoint[1])), pytest.raises(ConfigError, match="in use"):
        Host(2, endpoint)
