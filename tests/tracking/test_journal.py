"""The journal: each step once, whatever happened to the process that wrote it."""

import os
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.tracking.journal import Journal, read_journal, read_new_records
from tests.support.disks import fill, small_disk

figures = st.dictionaries(
    st.text(string.ascii_letters + string.digits + "_", min_size=1), st.floats(), max_size=4
)


def write_steps(path, steps, *, after=0):
    journal = Journal(path, step=after)
    for step in steps:
        journal.write({"step": step, "loss": 1 / step})
    journal.close()


def steps_of(path, **limits):
    return [record["step"] for record in read_journal(path, **limits)]


@given(st.lists(figures))
def test_what_was_written_is_read_back_bit_by_bit(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    records = [figures | {"step": step} for step, figures in enumerate(rows, 1)]
    journal = Journal(path, step=0)
    for record in records:
        journal.write(record)
    journal.close()
    assert [repr(record) for record in read_journal(path)] == [repr(r) for r in records]

    before = path.read_bytes()
    Journal(path, step=len(rows)).close()
    assert path.read_bytes() == before


def test_a_resumed_run_writes_the_steps_after_its_checkpoint_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_steps(path, range(1, 10))
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:5])

    journal = Journal(path, step=5)
    assert path.read_bytes() == kept
    journal.write({"step": 6, "loss": 0.5})
    journal.close()
    assert path.read_bytes() == kept + b'{"step": 6, "loss": 0.5}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]


@pytest.mark.parametrize("cut", [b"{", b'{"step": 4, "lo', b'{"step": 4, "loss": 0.25}', b"\0\0"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    assert steps_of(path) == [1, 2, 3]
    assert steps_of(path, last_step=2) == [1, 2]
    Journal(path, step=100).close()
    assert path.read_bytes() == whole


def test_a_written_step_outlives_kill_9(tmp_path):
    path = tmp_path / "journal.jsonl"
    script = (
        "import os, pathlib, sys; from dtr_scale.tracking.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), step=0)\n"
        "journal.write({'step': 1, 'loss': 0.5}); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, path], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert list(read_journal(path)) == [{"step": 1, "loss": 0.5}]


def test_what_a_full_disk_did_not_take_is_written_once_there_is_room(tmp_path, warnings_of):
    """The disk takes a part of a line, as real ones do; each step stands in the journal once."""
    path = tmp_path / "disk" / "journal.jsonl"
    with small_disk(path.parent, 2**16):
        journal = Journal(path, step=0)
        filler = path.with_name("filler")
        filler.write_bytes(b"\0" * (2**16 - 4096 - 100))
        before = 0
        for step in range(1, 1000):
            journal.write({"step": step, "loss": 1 / step})
            before = before or (step if warnings_of("dtr_scale.tracking.journal") else 0)
        assert 0 < before < 999
        assert not path.read_bytes().endswith(b"\n")
        assert steps_of(path) == list(range(1, before)), "a line that is cut is no record"
        assert len(warnings_of("dtr_scale.tracking.journal")) == 1
        with pytest.raises(OSError, match="No space left"):
            journal.close()
        journal.close()  # what failed once is not told again


def test_the_journal_catches_up_with_the_next_record_and_at_the_end(tmp_path, caplog, warnings_of):
    path = tmp_path / "disk" / "journal.jsonl"
    with small_disk(path.parent, 2**16):
        filler = path.with_name("filler")
        journal = Journal(path, step=0)
        fill(filler)
        for step in range(1, 4):
            journal.write({"step": step, "loss": 1 / step})
        filler.unlink()
        assert steps_of(path) == []
        with caplog.at_level("INFO", "dtr_scale"):
            journal.write({"step": 4, "loss": 0.25})
        assert "is written again" in caplog.text
        assert steps_of(path) == [1, 2, 3, 4]
        size = path.stat().st_size
        fill(filler)
        for step in range(5, 200):
            journal.write({"step": step, "loss": 1 / step})
        assert len(warnings_of("dtr_scale.tracking.journal")) == 2, "once each time"
        assert path.stat().st_size - size < 4096
        filler.unlink()
        journal.close()
        journal.close()
        assert steps_of(path) == list(range(1, 200))


def test_new_records_are_read_from_where_the_last_reading_ended(tmp_path):
    path = tmp_path / "journal.jsonl"
    write_steps(path, [1, 2])
    records, end = read_new_records(path, 0)
    assert [record["step"] for record in records] == [1, 2]
    assert read_new_records(path, end) == ([], end)

    with path.open("ab") as file:
        file.write(b'{"step": 3}\n{"st')
    records, end = read_new_records(path, end)
    assert records == [{"step": 3}]
    with path.open("ab") as file:
        file.write(b'ep": 4}\n')
    assert read_new_records(path, end) == ([{"step": 4}], path.stat().st_size)


def test_a_sync_reaches_the_file_and_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    journal = Journal(tmp_path / "journal.jsonl", step=0)
    journal.write({"step": 1})
    journal.sync()
    assert synced == [tmp_path / "journal.jsonl", tmp_path]
    journal.close()
