"""launch/environment.sh as it is sourced: by scripts, and in the shell of a person."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import ROOT

# Stands for a pip that takes minutes; what it is asked for is kept.
PIP = """#!/bin/bash
echo "$@" >> asked
exit $(cat fails 2>/dev/null || echo 0)
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder as a clone is, with an environment that holds nothing."""
    for name in ("pyproject.toml", "constraints.txt", "launch/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pip").write_text(PIP)
    (programs / "pip").chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return tmp_path


def sourced(place: Path, before: str = "") -> str:
    line = (
        f"{before} source launch/environment.sh prepare,eval 2>&1; echo ended with $?; type -p pip"
    )
    shell = subprocess.run(["bash", "-c", line], cwd=place, text=True, stdout=subprocess.PIPE)
    return shell.stdout


def test_it_installs_once_and_activates(checkout):
    told = sourced(checkout)
    assert "installing dtr-scale[prepare,eval] into .venv" in told and "ended with 0" in told
    assert told.splitlines()[-1] == str(checkout / ".venv" / "bin" / "pip")
    assert sourced(checkout).splitlines()[0] == "ended with 0", "nothing to install"
    (asked,) = (checkout / "asked").read_text().splitlines()
    assert "--constraint constraints.txt --editable .[prepare,eval]" in asked


def test_what_fails_leaves_the_shell_and_is_tried_again(checkout):
    (checkout / "fails").write_text("1")
    assert "ended with 1" in sourced(checkout)
    assert "ended with" not in sourced(checkout, "set -e;"), "a script ends"
    (checkout / "fails").unlink()
    assert "ended with 0" in sourced(checkout)
    assert len((checkout / "asked").read_text().splitlines()) == 3


def test_a_missing_python_is_told(checkout):
    told = sourced(checkout, "PYTHON=nopython;")
    assert "error: nopython is no Python 3.11 or newer" in told and "ended with 2" in told
