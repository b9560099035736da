"""The notebook runs from its first cell to its last, as a Jupyter kernel would run it."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.runs import ROOT

CELLS = json.loads((ROOT / "launch" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell and return what its last expression is, which Jupyter would show."""
    joined = re.sub(r"\\\n\s*", "", source)
    # `!` starts a command, with the names in braces filled in.
    python = re.sub(
        r"^!(.*)$", lambda m: f"run_command({m[1]!r}.format(**globals()))", joined, flags=re.M
    )
    tree = ast.parse(python)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(ast.unparse(last), names)


def run_command(command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, shell=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"run_command": run_command}
    shown = []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            # A minute of training would show no more.
            source = "".join(cell["source"]).replace("steps = 600", "steps = 8")
            shown.append(run_cell(source, names))
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 5 and all(picture.width > 300 for picture in pictures)
    assert names["pictures"].shape == (8, 1, 8, 8) and names["run"].step == 8
    for picture in pictures:
        picture.close()


def test_the_notebook_is_stored_without_outputs():
    assert not any(cell.get("outputs") for cell in CELLS)
