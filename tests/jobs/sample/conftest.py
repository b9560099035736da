"""A trained run, and 500 of its samples."""

import pytest

from dtr_scale.cli.main import main
from tests.support.runs import train
from tests.support.samples import FAST, SMALL


@pytest.fixture(scope="session")
def run_dir(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampled") / "run"
    assert train(digits, path, *SMALL) == 0
    return path


@pytest.fixture(scope="session")
def whole(run_dir, tmp_path_factory):
    """500 samples drawn by one process; the path of their .npz."""
    out = tmp_path_factory.mktemp("whole") / "samples.npz"
    assert main(["sample", str(run_dir), "--num-samples", "500", "--out", str(out), *FAST]) == 0
    return out
