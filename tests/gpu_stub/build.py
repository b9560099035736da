"""Build the stub of CUDA, and start Python functions on it."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SOURCES = ("runtime.c", "streams.c", "libraries.c", "driver.c")
NAME = "libcuda.so.1"  # as PyTorch and Triton look for the driver
A100, H100 = 0, 1  # the GPUs of the machine that the stub pretends to be
TIMEOUT_SECONDS = 840


def missing() -> str | None:
    """Return what the stub lacks here, None if nothing."""
    if not torch.version.cuda:
        return f"the stub of CUDA needs PyTorch for CUDA, this is {torch.__version__}"
    if not shutil.which("gcc"):
        return "the stub of CUDA needs gcc"
    absent = [name for name in ("cuda_runtime", "cublas", "nccl") if not _headers(name).is_dir()]
    return f"the stub of CUDA needs the headers of nvidia/{absent[0]}" if absent else None


def build_stub(folder: Path) -> Path:
    """Compile the stub against the headers of the installed wheels."""
    library = folder / NAME
    includes = [f"-I{_headers(name)}" for name in ("cuda_runtime", "cublas", "nccl")]
    # The headers of the compiler, which the wheel of the runtime lacks, come with Triton.
    triton = _package("triton") / "backends" / "nvidia" / "include"
    subprocess.run(
        [
            "gcc", "-std=gnu11", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror",
            "-Wno-unused-parameter", *includes, "-idirafter", triton, *SOURCES,
            f"-Wl,-soname,{NAME}", "-o", library, "-lpthread", "-ldl",
        ],
        cwd=HERE,
        check=True,
    )  # fmt: skip
    return library


class StubMachine:
    """A machine with an A100 and an H100 that run nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._library = build_stub(folder)
        self._calls = itertools.count()

    def call(self, function: str, *args: Any, timeout_seconds: float = TIMEOUT_SECONDS) -> Any:
        """Return what a function of `jobs.py` returns in a process of its own on this machine."""
        answer = self.folder / f"answer_{next(self._calls)}.json"
        command = [sys.executable, "-m", "tests.gpu_stub.worker", answer, function]
        done = subprocess.run(
            [*command, json.dumps(args, default=str)],
            env=self._environment(),
            cwd=HERE.parents[1],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        told = (done.stdout + done.stderr)[-6000:]
        assert done.returncode == 0, f"{function} ended with {done.returncode}:\n{told}"
        return json.loads(answer.read_text())

    def _environment(self) -> dict[str, str]:
        hidden = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return {
            **{name: value for name, value in os.environ.items() if name not in hidden},
            "LD_PRELOAD": str(self._library),
            "TRITON_LIBCUDA_PATH": str(self._library.parent),
            "STUB_GPUS": "80,90",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its processes would be started each time
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",  # where the host reads what is the GPU's
        }


def _headers(name: str) -> Path:
    return _package("torch").parent / "nvidia" / name / "include"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec and spec.origin
    return Path(spec.origin).parent
