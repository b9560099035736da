"""The script that measures a GPU says what is missing where there is none."""

import subprocess

from tests.support.runs import ROOT


def test_without_a_gpu_nothing_is_measured(tmp_path):
    command = ["bash", "launch/bench_gpu.sh", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        "PyTorch finds no GPU here; check nvidia-smi, or give --engine.device=cpu" in ended.stderr
    )
    assert not (tmp_path / "out").exists()
