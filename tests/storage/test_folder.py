"""Folders on disk and on S3 behave alike, and say clearly what went wrong."""

import errno
import os
import pickle
import resource
import threading
import time
import traceback

import pytest

from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import open_folder


def test_a_folder_reads_what_was_written(folder, tmp_path):
    assert folder.names() == []
    assert not folder.exists("a.txt")
    folder.write_bytes("a.txt", b"hello world")
    folder.write_bytes("deep/er/b.json", b'{"x": 1}')
    folder.write_bytes("empty", b"")

    assert folder.names() == ["a.txt", "deep", "empty"]
    assert folder.child("deep").names() == ["er"]
    assert folder.exists("a.txt")
    assert folder.exists("deep")
    assert folder.size("a.txt") == 11
    assert abs(folder.modified("a.txt") - time.time()) < 60
    assert folder.read_bytes("a.txt") == b"hello world"
    assert folder.read_bytes("a.txt", 6) == b"world"
    assert folder.read_bytes("a.txt", 2, 5) == b"llo"
    assert folder.read_bytes("a.txt", 5, 5) == b""
    assert folder.read_bytes("empty") == b""
    ranges = [("a.txt", 0, 0), ("a.txt", 2, 5), ("empty", 0, 0), ("a.txt", 5, 5)]
    assert folder.read_ranges(ranges) == [b"", b"llo", b"", b""]
    assert folder.read_ranges(ranges[:1]) == [b""]
    assert folder.child("deep").read_json("er/b.json") == {"x": 1}

    folder.write_bytes("a.txt", b"again")
    assert folder.read_bytes("a.txt") == b"again"
    folder.get("a.txt", tmp_path / "fetched" / "a.txt")
    assert (tmp_path / "fetched" / "a.txt").read_bytes() == b"again"
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["a.txt"]

    folder.remove("deep")
    folder.remove("empty")
    folder.remove("was never there")
    assert folder.names() == ["a.txt"]


def test_what_is_missing_is_a_file_not_found(folder, tmp_path):
    folder.write_bytes("a", b"1")
    for read in (folder.read_bytes, folder.size, lambda name: folder.get(name, tmp_path / "b")):
        with pytest.raises(FileNotFoundError):
            read("missing")
    assert not (tmp_path / "b").exists()


def test_bytes_are_read_into_memory_that_is_there(folder):
    """Also into more pieces than one system call takes; a file that ends before is an error."""
    content = bytes(range(256)) * 20
    folder.write_bytes("a", content)
    pieces = [memoryview(bytearray(2)) for _ in range(2000)]
    folder.read_into("a", 7, pieces)
    assert b"".join(pieces) == content[7:4007]
    with pytest.raises(OSError, match=r"ends before byte 5121"):
        folder.read_into("a", 5000, [memoryview(bytearray(100)), memoryview(bytearray(21))])
    with pytest.raises(FileNotFoundError):
        folder.read_into("missing", 0, pieces)


def test_memory_larger_than_one_request_is_uploaded_in_parts(s3_url, monkeypatch):
    monkeypatch.setattr("dtr_scale.storage.s3._PART_BYTES", 5 * 2**20)  # the least S3 takes
    content = bytes(range(256)) * 50_000
    open_folder(s3_url).write_bytes("big", memoryview(content))
    assert open_folder(s3_url).read_bytes("big") == content


@pytest.mark.parametrize("code", [None, errno.EPERM, errno.EOPNOTSUPP])
def test_of_two_who_create_a_file_one_does(folder, monkeypatch, code):
    """Also on file systems without hard links."""
    if code:

        def refuse(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("os.link", refuse)
    assert folder.create("deep/a", b"first") is True
    assert folder.create("deep/a", b"second") is False
    assert folder.read_bytes("deep/a") == b"first"
    assert folder.child("deep").names() == ["a"]


def test_a_file_that_does_not_fit_is_not_created(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            open_folder(tmp_path).create("a", b"too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_crosses_processes(folder):
    folder.write_bytes("a", b"1")
    again = pickle.loads(pickle.dumps(folder))
    assert (again.url, again.is_local, again.read_bytes("a")) == (folder.url, folder.is_local, b"1")


def test_only_a_local_folder_has_a_path(folder):
    folder.write_bytes("a", b"1")
    if folder.is_local:
        assert (folder.local_path / "a").read_bytes() == b"1"
    else:
        with pytest.raises(OSError, match="no local path"):
            _ = folder.local_path


def test_a_staged_folder_counts_once_it_is_published(folder):
    folder.stage("x")
    folder.staged("x").write_bytes("a", b"half")
    assert not any(folder.is_published(name, "MARK") for name in folder.names())
    folder.stage("x")
    assert folder.staged("x").names() == ([] if folder.is_local else ["UNFINISHED"])
    for content in (b"old", b"new"):
        folder.staged("x").write_bytes("a", content)
        folder.publish("x", "MARK", b"whole")
        assert folder.is_published("x", "MARK")
        assert folder.names() == ["x"]
        assert folder.child("x").names() == ["MARK", "a"]
        assert folder.child("x").read_bytes("a") == content
    folder.discard("x")
    assert folder.names() == []


def test_giving_a_staged_folder_up_frees_the_disk(folder):
    folder.staged("x").write_bytes("a", b"half")
    folder.unstage("x")
    assert folder.names() == ([] if folder.is_local else ["x"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    folder = open_folder(tmp_path)
    folder.write_bytes("a", b"old")
    with pytest.raises(TypeError):
        folder.write_bytes("a", "no bytes")  # pyright: ignore[reportArgumentType]
    assert folder.read_bytes("a") == b"old"
    assert folder.names() == ["a"]
    assert len(list(tmp_path.iterdir())) == 1


def test_urls_and_options_are_checked():
    assert open_folder("file:///data/x/").url == "/data/x"
    with pytest.raises(ConfigError, match=r"unknown kind of folder gs://.*accepted: a local path"):
        open_folder("gs://bucket/x")
    with pytest.raises(ConfigError, match="unknown storage option endpont; accepted: endpoint_url"):
        open_folder("s3://bucket/x", {"endpont": "http://there"})
    assert "hidden" not in repr(open_folder("s3://bucket/x", {"secret": "hidden"}))


def test_s3_errors_are_os_errors(s3_url):
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        open_folder("s3://nobucket/x").read_bytes("a")
    away = open_folder(s3_url, {"endpoint_url": "http://127.0.0.1:9", "max_attempts": 1})
    with pytest.raises(ConnectionError, match="Could not connect"):
        away.read_bytes("a")


CALLS = {
    "read_bytes": lambda folder, path: folder.read_bytes("a"),
    "read_into": lambda folder, path: folder.read_into("a", 0, [memoryview(bytearray(5))]),
    "write_bytes": lambda folder, path: folder.write_bytes("new", b"hello"),
    "get": lambda folder, path: folder.get("a", path),
    "names": lambda folder, path: folder.names(),
    "exists": lambda folder, path: folder.exists("a"),
    "size": lambda folder, path: folder.size("a"),
    "remove": lambda folder, path: folder.remove("a"),
}


@pytest.fixture(params=CALLS)
def call(request, s3_url, tmp_path):
    """One call of a folder that holds a file, to be made through any server."""
    open_folder(s3_url).write_bytes("a", b"hello")
    return lambda options: CALLS[request.param](open_folder(s3_url, options), tmp_path / "file")


@pytest.mark.parametrize(
    "fault", [("refusals", 1), ("lost_answers", 1), ("cuts", 1), ("delay_seconds", 0.2)], ids=str
)
def test_every_call_survives_a_server_in_trouble(s3_proxy, call, fault):
    setattr(s3_proxy, *fault)
    call({"endpoint_url": s3_proxy.endpoint_url})
    assert s3_proxy.refusals == s3_proxy.lost_answers == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key": "testkey"}, "SignatureDoesNotMatch|403: Forbidden"),
        ({"key": "nobody"}, "InvalidAccessKeyId|403: Forbidden"),
    ],
)
def test_wrong_keys_are_told_at_once_in_one_line_without_them(s3_proxy, call, options, reason):
    options |= {"endpoint_url": s3_proxy.endpoint_url, "secret": "very-secret"}
    started = time.monotonic()
    with pytest.raises(PermissionError, match=rf"^s3://bucket/test-\d+: ({reason})$") as caught:
        call(options)
    assert time.monotonic() - started < 20
    assert s3_proxy.requests.total() == 1, "the server was asked again"
    assert "very-secret" not in "".join(traceback.format_exception(caught.value))


def test_half_a_key_is_a_permission_error(s3_url):
    with pytest.raises(PermissionError, match="missing: aws_secret_access_key"):
        open_folder(s3_url, {"key": "testkey"}).read_bytes("a")


@pytest.mark.parametrize("call", ["read_bytes", "write_bytes", "size"], indirect=True)
def test_a_server_that_refuses_all_is_a_connection_error(s3_proxy, call):
    s3_proxy.refusals = 10**6
    with pytest.raises(ConnectionError, match=r"SlowDown: Please reduce|503: ") as caught:
        call({"endpoint_url": s3_proxy.endpoint_url, "max_attempts": 1})
    assert "\n" not in str(caught.value)


def test_a_server_that_says_nothing_is_a_connection_error_in_time(s3_proxy, call, monkeypatch):
    monkeypatch.setattr("dtr_scale.storage.s3._REQUEST_SECONDS", 0.5)
    s3_proxy.delay_seconds = 3600
    started = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no success within 0\.5 s$"):
        call({"endpoint_url": s3_proxy.endpoint_url})
    assert time.monotonic() - started < 60


def test_a_server_that_is_gone_is_a_connection_error_in_time(s3_server, call):
    s3_server.stop()
    try:
        started = time.monotonic()
        with pytest.raises(ConnectionError, match="Could not connect"):
            call({"max_attempts": 1})
        assert time.monotonic() - started < 60
    finally:
        s3_server.start()


def test_a_call_survives_a_restart_of_the_server(s3_server, s3_url):
    folder = open_folder(s3_url)
    folder.write_bytes("a", b"1")
    s3_server.stop()
    restart = threading.Timer(0.4, s3_server.start)
    restart.start()
    assert folder.read_bytes("a") == b"1"
    restart.join()


def test_a_body_cut_in_mid_stream_is_fetched_again(s3_proxy, s3_url, tmp_path):
    content = bytes(range(256)) * 12_000
    folder = open_folder(s3_url, {"endpoint_url": s3_proxy.endpoint_url})
    folder.write_bytes("big", content)
    path = f"/{s3_url.removeprefix('s3://')}/big"
    s3_proxy.cut_after_bytes, s3_proxy.cuts = 1_000_000, 2
    folder.get("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == content
    assert s3_proxy.requests["GET", path] == 3
    s3_proxy.cuts = 2
    assert folder.read_bytes("big") == content
    assert s3_proxy.cuts == 0


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_large_transfer_survives_a_kill_of_the_server(
    s3_server, s3_proxy, s3_url, tmp_path, method
):
    """100 MB in four parts; the gateway is killed in the middle and back after a second."""
    content = os.urandom(2**20) * 100
    direct, proxied = (
        open_folder(s3_url),
        open_folder(s3_url, {"endpoint_url": s3_proxy.endpoint_url}),
    )
    path = f"/{s3_url.removeprefix('s3://')}/big"
    if method == "GET":
        direct.write_bytes("big", content)

    def kill_and_restart():
        while s3_proxy.transferred_bytes[method, path] < 30 * 2**20:
            time.sleep(0.001)
        s3_server.stop()
        time.sleep(1)
        s3_server.start()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    if method == "GET":
        proxied.get("big", tmp_path / "back")
    else:
        proxied.write_bytes("big", content)
        direct.get("big", tmp_path / "back")
    killer.join()
    assert s3_proxy.requests[method, path] > {"GET": 1, "PUT": 4}[method], "killed too late"
    assert (tmp_path / "back").read_bytes() == content
    direct.remove("big")
