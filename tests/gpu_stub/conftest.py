"""The stub, built once, and how its tests tell their figures."""

import pytest

from tests.gpu_stub.build import StubMachine, missing


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """A machine whose GPUs run nothing."""
    if reason := missing():
        pytest.skip(reason)
    return StubMachine(tmp_path_factory.mktemp("gpu_stub"))


@pytest.fixture
def tell(capsys):
    """Print a line of figures past pytest's capture."""

    def print_line(text):
        with capsys.disabled():
            print(f"\n{text}", end="")

    return print_line
