"""Load exported pipelines as a user of diffusers does: in a process without this package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCRIPT = """
import sys
sys.modules["dtr_scale"] = None  # as where it is not installed
import json
import numpy as np
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
given = dict(np.load(sys.argv[2]))
options = json.loads(str(given.pop("options")))
if "sampler" in options:
    changed = {"sampler": options.pop("sampler")}
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **changed)
tensors = {name: torch.tensor(value) for name, value in given.items()}
drawn = pipe(**tensors, **options).images
np.save(sys.argv[3], drawn.numpy())
"""


def draw_elsewhere(folder: Path, place: Path, options: str, **tensors: Tensor) -> Tensor:
    """Return what a pipeline draws in a fresh process, given tensors and options as JSON."""
    arrays: dict[str, Any] = {name: value.numpy() for name, value in tensors.items()}
    np.savez(place / "given.npz", options=options, **arrays)
    # Away from this checkout, with a cache of its own.
    environment = {**os.environ, "HF_HOME": str(place / "hf"), "PYTHONPATH": ""}
    arguments = [str(folder), str(place / "given.npz"), str(place / "drawn.npy")]
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return torch.from_numpy(np.load(place / "drawn.npy"))
