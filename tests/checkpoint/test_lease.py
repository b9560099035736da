"""A folder belongs to one run, and to one job of it at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dtr_scale.checkpoint import lease as lease_module
from dtr_scale.checkpoint.lease import Lease
from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import Folder, open_folder

NAME = "owner.json"
HOLDER = """
import sys, time
from pathlib import Path
from dtr_scale.checkpoint.lease import Lease
from dtr_scale.storage.folder import open_folder
folder, run_dir, run = sys.argv[1:]
lease = Lease(open_folder(folder), "owner.json", key="checkpoint.dir", run_dir=Path(run_dir),
              lost=print)
lease.take(run or None)
print("held", flush=True)
time.sleep(60)
"""


def lease_of(folder: Folder, run_dir: Path, lost=pytest.fail) -> Lease:
    return Lease(folder, NAME, key="checkpoint.dir", run_dir=run_dir, lost=lost)


def of_another_machine(folder: Folder, **changes) -> None:
    """Make the holder one that cannot be seen from here."""
    folder.write_bytes(
        NAME, json.dumps(folder.read_json(NAME) | {"boot_id": "?", **changes}).encode()
    )


@pytest.fixture
def quick(monkeypatch):
    """Leases that run out in a second and a half."""
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(lease_module, "_RENEW_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "_PATIENCE_SECONDS", 3.0)


@pytest.fixture
def holder(folder, tmp_path):
    """Another process of this machine that holds the folder for run "a" in tmp_path."""
    command = [sys.executable, "-c", HOLDER, folder.url, str(tmp_path), "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_holder_that_is_alive_is_named(folder, tmp_path, holder, quick):
    with pytest.raises(ConfigError, match=rf"in use by pid {holder.pid} on .*--checkpoint.dir=PA"):
        lease_of(folder, tmp_path).take("a")


def test_one_that_was_killed_here_is_taken_over_at_once(folder, tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1e9)
    holder.send_signal(signal.SIGKILL)  # and not waited for: a zombie
    lease = lease_of(folder, tmp_path)
    lease.take("a")
    assert folder.read_json(NAME)["pid"] == os.getpid()
    lease.release()


def test_one_of_another_machine_is_waited_for_until_its_lease_runs_out(
    folder, tmp_path, holder, quick, caplog
):
    holder.kill()
    of_another_machine(folder)
    caplog.set_level("INFO", "dtr_scale")
    lease, start = lease_of(folder, tmp_path), time.monotonic()
    lease.take("a")
    assert time.monotonic() - start >= 1.5
    assert f"is held by pid {holder.pid} on " in caplog.text and "waiting up to 3 s" in caplog.text
    lease.release()


def test_one_of_another_machine_that_renews_its_lease_is_left_alone(
    folder, tmp_path, holder, quick
):
    ended = threading.Event()

    def renew():
        number = 0
        while not ended.wait(0.3):
            number += 1
            of_another_machine(folder, time=str(number))

    holder.kill()
    of_another_machine(folder)
    elsewhere = threading.Thread(target=renew)
    elsewhere.start()
    with pytest.raises(ConfigError, match="in use by pid"):
        lease_of(folder, tmp_path).take("a")
    ended.set()
    elsewhere.join()


def test_what_is_released_is_handed_on_to_its_run_alone(folder, tmp_path):
    first = lease_of(folder, tmp_path / "one")
    first.take("a")
    first.release()
    assert folder.read_json(NAME) == {"run": "a", "run_dir": str(tmp_path / "one")}
    again = lease_of(folder, tmp_path / "moved")
    again.take("a")
    assert not again.created
    again.release()
    for place in ("two", "moved"):
        with pytest.raises(ConfigError, match=r"belongs to the run in '.*moved'; .*remove owner"):
            lease_of(folder, tmp_path / place).take("b", is_new_run=False)


def test_a_new_directory_of_the_same_name_is_that_run_on_another_node(folder, tmp_path):
    first = lease_of(folder, tmp_path)
    first.take("a")
    first.release()
    second = lease_of(folder, tmp_path)
    second.take("b", is_new_run=True)
    assert second.run == "a"
    second.release()


def test_a_folder_that_an_earlier_version_marked_is_taken_over(folder, tmp_path):
    folder.write_bytes(NAME, json.dumps({"run_dir": str(tmp_path)}).encode())
    with pytest.raises(ConfigError, match="belongs to the run in"):
        lease_of(folder, tmp_path / "another").take("a")
    lease = lease_of(folder, tmp_path)
    lease.take("a", is_new_run=False)
    lease.release()
    assert folder.read_json(NAME)["run"] == "a"


def test_a_mark_that_names_no_run_is_refused_by_name(folder, tmp_path):
    folder.write_bytes(NAME, b"[]")
    with pytest.raises(ConfigError, match=r"owner.json that names no run; .*remove that file"):
        lease_of(folder, tmp_path).take("a")
    lease = lease_of(folder, tmp_path)
    lease.take()  # a run directory, which asks for no run
    lease.release()
    assert folder.read_json(NAME)["run_dir"] == str(tmp_path)


def test_of_two_that_start_at_once_one_has_it(folder, tmp_path, quick):
    taken, refused = [], []

    def take(number):
        lease = lease_of(folder, tmp_path / str(number))
        try:
            lease.take(str(number))
            taken.append(lease)
        except ConfigError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 3)
    taken[0].release()


# Takes the folder when it is told to; its disk is slow, so that others read what it has read.
RACER = """
import sys, time
from pathlib import Path
from dtr_scale.checkpoint import lease as leases
from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import open_folder
leases.LEASE_SECONDS, leases._PATIENCE_SECONDS = 0.5, 2.0
# Longer than a busy machine keeps one of them from running between its read and its write.
leases._LOCAL_SETTLE_SECONDS = leases._SETTLE_SECONDS = 1.0
folder = open_folder(sys.argv[1])
write = folder.write_bytes
folder.write_bytes = lambda *content: time.sleep(0.05) or write(*content)
lease = leases.Lease(folder, "owner.json", key="checkpoint.dir", run_dir=Path(sys.argv[2]),
                     lost=print)
print("ready", flush=True)
sys.stdin.readline()
try:
    lease.take("a")
    print("held", flush=True)
except ConfigError:
    print("refused", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("state", ["released", "run out"])
def test_of_several_that_take_over_at_once_one_has_it(folder, tmp_path, state):
    first = lease_of(folder, tmp_path)
    first.take("a")
    held = folder.read_json(NAME)
    first.release()
    if state == "run out":
        folder.write_bytes(NAME, json.dumps(held | {"boot_id": "?"}).encode())
    command = [sys.executable, "-c", RACER, folder.url, str(tmp_path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        assert [racer.stdout.readline() for racer in racers if racer.stdout] == 3 * ["ready\n"]
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("\n")
            racer.stdin.flush()
        told = [racer.stdout.readline() for racer in racers if racer.stdout]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(told) == ["held\n", "refused\n", "refused\n"]


def test_one_that_was_taken_over_is_told_by_whom(folder, tmp_path, quick):
    told = []
    lease = lease_of(folder, tmp_path, told.append)
    lease.take("a")
    of_another_machine(folder, job="another", pid=7, host="node7")
    lease._thread.join(10)
    (message,) = told
    assert f"{folder.url!r} was taken over by pid 7 on node7" in message
    lease.release()
    assert folder.read_json(NAME)["job"] == "another"


def test_storage_that_is_away_ends_nothing_and_what_was_lost_meanwhile_is_made_again(
    tmp_path, quick, warnings_of
):
    folder = open_folder(tmp_path / "folder")
    lease = lease_of(folder, tmp_path)
    lease.take("a")
    (tmp_path / "folder").rename(tmp_path / "away")
    (tmp_path / "folder").write_text("no folder")
    time.sleep(2)
    (warning,) = warnings_of("dtr_scale.checkpoint.lease")
    assert "cannot be renewed, training goes on: " in warning
    (tmp_path / "folder").unlink()
    deadline = time.monotonic() + 20
    while not folder.exists(NAME):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lease.release()


def test_a_start_that_is_refused_leaves_no_trace_where_there_was_none(folder, tmp_path):
    lease = lease_of(folder, tmp_path)
    lease.take("a")
    lease.release(forget=True)
    assert folder.names() == []
