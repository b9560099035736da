"""Tests that cannot run are left out, on top of what the user selects."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "tests/storage/test_folder.py"


def collected(*options):
    """Return the names that pytest selects, and the last line that it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return {line.rpartition("::")[2] for line in lines if "::" in line}, lines[-1]


@pytest.fixture(scope="module")
def selections():
    return {marker: collected(FOLDERS, "-m", marker)[0] for marker in ("services", "not services")}


def test_the_servers_mark_who_uses_them(selections):
    services, others = selections["services"], selections["not services"]
    assert services and others and not services & others
    both = {name for name in services if name.endswith("[s3]")}
    assert both and {name.replace("[s3]", "[local]") for name in both} <= others


def test_what_is_left_out_is_told_in_the_last_line(selections):
    names, last = collected(FOLDERS, "--leave-out-services=no root here")
    assert names == selections["not services"]
    assert last == f"left out {len(selections['services'])} services tests: no root here"


def test_leaving_out_does_not_replace_the_users_selection():
    names, last = collected(FOLDERS, "-m", "services", "--leave-out-services=no root here")
    assert not names
    assert last.startswith("left out ")


def test_large_tests_are_slow():
    names, _ = collected("tests/engines/test_large.py", "-m", "large and not slow")
    assert not names
