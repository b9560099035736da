"""Folders on disk and on S3 behave alike, and say clearly what went wrong."""

import contextlib
import pickle
import socket
import socketserver
import threading

import pytest

from dtr_scale.errors import ConfigError
from dtr_scale.storage import Folder


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
    assert folder.read_bytes("a.txt") == b"hello world"
    assert folder.read_bytes("a.txt", 6) == b"world"
    assert folder.read_bytes("a.txt", 2, 5) == b"llo"
    assert folder.read_bytes("a.txt", 5, 5) == b""
    assert folder.read_bytes("empty") == b""
    assert folder.child("deep").read_json("er/b.json") == {"x": 1}

    folder.write_bytes("a.txt", b"again")
    assert folder.read_bytes("a.txt") == b"again"
    folder.get("a.txt", tmp_path / "fetched" / "a.txt")
    assert (tmp_path / "fetched" / "a.txt").read_bytes() == b"again"
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["a.txt"]
    folder.put(tmp_path / "fetched" / "a.txt", "deep/copy")
    assert folder.read_bytes("deep/copy") == b"again"

    folder.remove("deep")
    folder.remove("empty")
    folder.remove("was never there")
    folder.fsync()
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
    monkeypatch.setattr("dtr_scale.storage._S3_PART_BYTES", 5 * 2**20)  # the least S3 takes
    content = bytes(range(256)) * 50_000
    Folder(s3_url).write_bytes("big", memoryview(content))
    assert Folder(s3_url).read_bytes("big") == content


def test_a_folder_crosses_processes(folder):
    folder.write_bytes("a", b"1")
    again = pickle.loads(pickle.dumps(folder))
    assert (again.url, again.is_local, again.read_bytes("a")) == (folder.url, folder.is_local, b"1")


def test_only_a_local_folder_renames_and_has_a_path(folder):
    folder.write_bytes("old/a", b"1")
    if folder.is_local:
        folder.rename("old", "new")
        assert (folder.local_path / "new" / "a").read_bytes() == b"1"
    else:
        with pytest.raises(OSError, match="cannot rename old to new"):
            folder.rename("old", "new")
        with pytest.raises(OSError, match="no local path"):
            _ = folder.local_path


def test_a_failed_write_leaves_the_old_file(tmp_path):
    folder = Folder(tmp_path)
    folder.write_bytes("a", b"old")
    with pytest.raises(TypeError):
        folder.write_bytes("a", "no bytes")  # pyright: ignore[reportArgumentType]
    assert folder.read_bytes("a") == b"old"
    assert folder.names() == ["a"]
    assert len(list(tmp_path.iterdir())) == 1


def test_urls_and_options_are_checked():
    assert Folder("file:///data/x/").url == "/data/x"
    with pytest.raises(ConfigError, match=r"unknown kind of folder gs://.*accepted: a local path"):
        Folder("gs://bucket/x")
    with pytest.raises(ConfigError, match="unknown storage option endpont; accepted: endpoint_url"):
        Folder("s3://bucket/x", {"endpont": "http://there"})
    assert "hidden" not in repr(Folder("s3://bucket/x", {"secret": "hidden"}))


def test_s3_errors_are_os_errors(s3_url):
    with pytest.raises(PermissionError):
        Folder(s3_url, {"key": "nobody", "secret": "wrong"}).read_bytes("a")
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        Folder("s3://nobucket/x").read_bytes("a")
    away = Folder(s3_url, {"endpoint_url": "http://127.0.0.1:9", "max_attempts": 1})
    with pytest.raises(ConnectionError, match="Could not connect"):
        away.read_bytes("a")


def test_a_call_survives_a_restart_of_the_server(s3_server, s3_url):
    folder = Folder(s3_url)
    folder.write_bytes("a", b"1")
    s3_server.stop()
    restart = threading.Timer(0.4, s3_server.start)
    restart.start()
    assert folder.read_bytes("a") == b"1"
    restart.join()


def test_a_body_cut_in_mid_stream_is_fetched_again(s3_server, s3_url, tmp_path):
    content = bytes(range(256)) * 12_000
    Folder(s3_url).write_bytes("big", content)
    with _cutting_proxy(s3_server.endpoint_url, cuts=2, after_bytes=1_000_000) as (url, served):
        folder = Folder(s3_url, {"endpoint_url": url})
        folder.get("big", tmp_path / "big")
        assert folder.read_bytes("big") == content
    assert len(served) >= 2
    assert (tmp_path / "big").read_bytes() == content


@contextlib.contextmanager
def _cutting_proxy(upstream_url, cuts, after_bytes):
    """Serve an S3 server whose first connections with a large answer break after some bytes."""
    host, port = upstream_url.removeprefix("http://").split(":")
    served: list[int] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection((host, int(port))) as upstream:
                threading.Thread(target=_pump, args=(self.request, upstream), daemon=True).start()
                limit = after_bytes if len(served) < cuts else None
                served.append(_pump(upstream, self.request, limit))
                self.request.shutdown(socket.SHUT_RDWR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", served
        server.shutdown()
        thread.join()


def _pump(source, target, limit=None):
    """Copy bytes until the source ends or `limit` is reached; return how many."""
    copied = 0
    with contextlib.suppress(OSError):
        while (limit is None or copied < limit) and (data := source.recv(65536)):
            target.sendall(data)
            copied += len(data)
    return copied
