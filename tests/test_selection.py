"""Tests that cannot run are left out, on top of what the user selects."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS, LARGE = "tests/storage/test_folder.py", "tests/engines/test_large.py"
CASES = "tests/gpu_stub/test_cases.py"


def collected(*options):
    """Return the names that pytest selects, and the last line that it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return {line.rpartition("::")[2] for line in lines if "::" in line}, lines[-1]


@pytest.fixture(scope="module")
def services():
    """What is selected as `services`, and what is large without being slow as well."""
    return collected(FOLDERS, LARGE, "-m", "services or (large and not slow)")[0]


def test_the_servers_mark_who_uses_them_and_others_stay(services):
    others, last = collected(FOLDERS, "--leave-out-services=no root here")
    assert last == f"left out {len(services)} services tests: no root here"
    both = {name for name in services if name.endswith("[s3]")}
    assert both and {name.replace("[s3]", "[local]") for name in both} <= others
    assert others and not services & others


def test_leaving_out_does_not_replace_the_users_selection():
    names, last = collected(FOLDERS, "-m", "services", "--leave-out-services=no root here")
    assert not names
    assert last.startswith("left out ")


def test_large_tests_are_slow(services):
    assert services and not any(name.startswith("test_dit_xl") for name in services)


def test_what_takes_hours_runs_only_by_name():
    names, last = collected(CASES)
    assert last.startswith("left out ") and last.endswith("-m exhaustive runs them")
    exhaustive, _ = collected(CASES, "-m", "exhaustive")
    assert names and exhaustive and not names & exhaustive
