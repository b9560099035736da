"""A new database of MLflow is whole, whenever the process that makes it ends."""

import signal
import sys

import pytest

from dtr_scale.tracking.mlflow import Server
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow
MAKE = """
import sys
from pathlib import Path
from dtr_scale.tracking.mlflow import Server
path = Path(sys.argv[1])
print(Server(f"sqlite:///{path}", path.parent).experiment("digits"))
"""


def test_a_job_that_is_killed_while_it_makes_one_leaves_none(popen, tmp_path):
    path = tmp_path / "new" / "mlflow.db"
    unfinished = path.with_name(".mlflow.db.new")
    killed = popen([sys.executable, "-c", MAKE, path])
    wait_for(lambda: unfinished.exists() and unfinished.stat().st_size > 0)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not path.exists()
    # Two that begin at once: one makes it, the other waits.
    both = [popen([sys.executable, "-c", MAKE, path], stdout=-1) for _ in range(2)]
    found = {process.communicate(timeout=120)[0] for process in both}
    assert len(found) == 1 and [process.returncode for process in both] == [0, 0]
    assert Server(f"sqlite:///{path}", path.parent).find_experiment("digits") == found.pop().strip()
    assert not unfinished.exists()
