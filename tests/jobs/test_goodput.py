"""A run tells the share of its wall time that was spent on steps that count."""

import json
import shutil

import pytest

from dtr_scale.tracking.attempts import ATTEMPTS, read_attempts
from dtr_scale.tracking.journal import Journal, read_journal
from dtr_scale.train.run_dir import JOURNAL
from tests.support.processes import wait_for
from tests.support.runs import status, tiny


def test_status_and_attempts_tell_the_goodput_of_a_run_that_was_killed(digits, tmp_path):
    assert tiny(digits, tmp_path) == 0
    (whole,) = read_attempts(tmp_path)
    assert whole.goodput == whole.run_goodput == pytest.approx(status(tmp_path)["goodput"], abs=0.1)
    seconds = {r["step"]: 32 / r["samples_per_second"] for r in read_journal(tmp_path / JOURNAL)}
    assert whole.end
    took = (whole.end - whole.begin).total_seconds()
    assert whole.goodput == pytest.approx(sum(seconds.values()) / took, abs=0.01)
    assert whole.begin < whole.start, "what comes before the directory is taken counts, too"

    # As a kill after the fourth step would have left it: with the checkpoint of the second.
    lines = (tmp_path / ATTEMPTS).read_text().splitlines(keepends=True)
    (tmp_path / ATTEMPTS).write_text(lines[0])
    left = status(tmp_path) | {"outcome": "running", "saved_step": 2}
    (tmp_path / "status.json").write_text(json.dumps(left))
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")
    assert tiny(digits, tmp_path) == 0
    killed, last = read_attempts(tmp_path)
    assert (killed.outcome, killed.step, killed.end_step, last.step) == ("killed", 0, 4, 2)
    assert killed.end and last.end and killed.goodput is not None and last.goodput is not None
    took = (killed.end - killed.begin).total_seconds()
    assert killed.goodput == pytest.approx((seconds[1] + seconds[2]) / took, abs=0.01)
    again = list(read_journal(tmp_path / JOURNAL))
    assert [record["step"] for record in again] == [1, 2, 3, 4]
    counted = sum(32 / record["samples_per_second"] for record in again)
    took = (last.end - killed.begin).total_seconds()
    assert last.run_goodput == pytest.approx(counted / took, abs=0.01)
    told = status(tmp_path)
    assert told["goodput"] == pytest.approx(last.run_goodput, abs=0.1)
    assert told["attempt_goodput"] == pytest.approx(last.goodput, abs=0.1)


def test_a_run_that_fails_counts_what_it_has_saved(digits, tmp_path, monkeypatch):
    """It fails in its third step; the next start goes on from the second."""
    write = Journal.write

    def fail(journal, record):
        if record["step"] == 3:
            wait_for(lambda: status(tmp_path)["saved_step"] == 2)
            raise RuntimeError("out of memory")
        write(journal, record)

    monkeypatch.setattr(Journal, "write", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny(digits, tmp_path)
    (failed,) = read_attempts(tmp_path)
    assert failed.outcome == "failed" and failed.end and failed.end_step == 3
    seconds = [32 / record["samples_per_second"] for record in read_journal(tmp_path / JOURNAL)]
    took = (failed.end - failed.begin).total_seconds()
    assert failed.goodput == pytest.approx(sum(seconds) / took, abs=0.01)
    assert status(tmp_path)["goodput"] == pytest.approx(failed.goodput, abs=0.1)
