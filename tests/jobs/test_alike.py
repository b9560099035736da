"""Ranks that were started with different things are refused by name."""

import os
import socket
from pathlib import Path

import pytest

from dtr_scale.data.manifest import Manifest
from dtr_scale.errors import ConfigError
from dtr_scale.jobs import alike
from dtr_scale.jobs.train import train_experiment
from tests.support.ranks import run_on_ranks
from tests.support.runs import BATCH, demo_experiment

REFUSED = {
    "code": "dtr_scale is '0.1.0 of other code', not '0.1.0 of ",
    "experiment": "--train.lr is 0.5, not 0.001; give all nodes the same file and ",
    "data": "the manifest of {digits} is 'other', not '",
}


def refusal(what: str, digits: Path, run_dir: Path) -> str:
    """Runs on each rank, of which rank 1 has something else; return how it was refused."""
    overrides = [*BATCH, "--engine.type=flat", "--engine.precision=fp32"]
    with pytest.MonkeyPatch.context() as other:
        if os.environ["RANK"] == "1":
            match what:
                case "code":
                    other.setattr(alike, "code_hash", lambda: "other code")
                case "experiment":
                    overrides.append("--train.lr=0.5")
                case "data":
                    other.setattr(Manifest, "hash", lambda *_: "other")
        with pytest.raises(ConfigError) as error:
            train_experiment(demo_experiment(digits, run_dir, *overrides))
    return str(error.value)


@pytest.mark.parametrize("what", REFUSED)
def test_a_rank_with_other_code_settings_or_data_is_refused_by_name(what, digits, tmp_path):
    host = socket.gethostname()
    start = f"{what} of rank 1 on {host} differs from that of rank 0 on {host}: "
    for message in run_on_ranks(2, refusal, what, digits, tmp_path / "run"):
        assert message.startswith(start + REFUSED[what].format(digits=digits))
    assert not (tmp_path / "run").exists()


def test_the_code_is_all_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("dtr_scale.__file__", str(tmp_path / "__init__.py"))
    hashes = set()
    for content in ("", "x = 1"):
        (tmp_path / "a.py").write_text(content)
        alike.code_hash.cache_clear()
        hashes.add(alike.code_hash())
    alike.code_hash.cache_clear()
    assert len(hashes) == 2
