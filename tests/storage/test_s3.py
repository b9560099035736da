"""S3 where nobody answers, without a server: what is told, and how it ends."""

import logging
import socket

import pytest

from dtr_scale.cli.main import main
from dtr_scale.storage import s3
from dtr_scale.storage.folder import open_folder

KEYS = {"key": "k", "secret": "s", "region": "us-east-1"}


@pytest.fixture
def aws(monkeypatch):
    """An AWS environment with keys, in which nobody listens."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3, "_MAX_ATTEMPTS", 3)
    s3._FileSystem.clear_instance_cache()  # one per options: it knows another environment
    yield monkeypatch
    s3._FileSystem.clear_instance_cache()


def test_retries_are_told_at_most_every_few_seconds(aws, warnings_of):
    folder = open_folder("s3://bucket/x", {"max_attempts": 4})
    with pytest.raises(ConnectionError, match="Could not connect"):
        folder.read_bytes("a")
    (line,) = warnings_of("dtr_scale.storage.s3")
    assert line.startswith("s3://bucket/x/a: Could not connect")
    assert line.endswith("retrying (1 of 4)")
    aws.setattr(s3, "_TELL_SECONDS", 0.0)
    with pytest.raises(ConnectionError):
        folder.read_bytes("a")
    told = warnings_of("dtr_scale.storage.s3")[1:]
    assert [line.rpartition("; ")[2] for line in told] == [
        f"retrying ({i} of 4)" for i in (1, 2, 3)
    ]


def test_a_server_that_stays_silent_is_told(aws, warnings_of):
    aws.setattr(s3, "_PATIENCE_SECONDS", 0.1)
    aws.setattr(s3, "_REQUEST_SECONDS", 5.0)  # connecting takes some
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"no success within 5 s"):
            open_folder("s3://bucket/x", KEYS | {"endpoint_url": url}).read_bytes("a")
    assert warnings_of("dtr_scale.storage.s3")[0].startswith("s3://bucket/x/a: no answer for")


@pytest.mark.parametrize("bundle", ["/nowhere.pem", __file__])
def test_a_file_without_authorities_is_told_with_its_variable(aws, warnings_of, bundle):
    """At once: no retry helps. The client reads it once it is connected."""
    aws.setenv("AWS_CA_BUNDLE", bundle)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"is missing or holds none; set AWS_CA_BUNDLE"):
            open_folder("s3://bucket/x", KEYS | {"endpoint_url": url}).read_bytes("a")
    assert not warnings_of("dtr_scale.storage.s3")


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_looking_into_a_checkpoint_out_of_reach_ends_in_one_line(aws, capsys, action):
    package = logging.getLogger("dtr_scale")
    before = package.handlers, package.propagate
    try:
        assert main(["checkpoint", action, "s3://bucket/x"]) == 2
        (told, error) = capsys.readouterr().err.splitlines()
        assert "retrying (1 of 3)" in told
        assert error.startswith("error: s3://bucket/x cannot be read: ")
        assert "check AWS_ENDPOINT_URL" in error
        aws.delenv("AWS_ACCESS_KEY_ID")
        aws.delenv("AWS_SECRET_ACCESS_KEY")
        aws.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        aws.setenv("AWS_CONFIG_FILE", "/dev/null")
        s3._FileSystem.clear_instance_cache()
        assert main(["checkpoint", action, "s3://bucket/x"]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert "Unable to locate credentials" in error
    finally:
        package.handlers, package.propagate = before
