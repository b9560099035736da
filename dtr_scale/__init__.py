"""Train diffusion transformers with Denoising Task Routing, from one process to a cluster.

What a program needs is here; `dtr_scale/README.md` shows how to use it. The rest are rooms:
`models` and `diffusion` (networks, routing, samplers), `objectives`, `data` and `prepare` (shards),
`engines`, `checkpoint` and `train` (training), `evaluation` (pictures and numbers), `tracking`
(the journal, MLflow), `config`, `storage`, and `jobs`, what the commands of `cli` start.
"""

from typing import TYPE_CHECKING, Any

# For type checkers and editors; at run time `__getattr__` imports these.
if TYPE_CHECKING:
    from dtr_scale.data.dataset import ShardDataset
    from dtr_scale.diffusion.process import GaussianDiffusion
    from dtr_scale.jobs.api import load_run, plan, sample
    from dtr_scale.jobs.network import build_model

__all__ = [
    "GaussianDiffusion",
    "ShardDataset",
    "__version__",
    "build_model",
    "load_run",
    "plan",
    "sample",
]

__version__ = "0.1.0"

_HOME = {
    "GaussianDiffusion": "dtr_scale.diffusion.process",
    "ShardDataset": "dtr_scale.data.dataset",
    "build_model": "dtr_scale.jobs.network",
    "load_run": "dtr_scale.jobs.api",
    "plan": "dtr_scale.jobs.api",
    "sample": "dtr_scale.jobs.api",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import public names on first use, so that `import dtr_scale` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dtr_scale' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names, for those who look around in a shell."""
    return sorted(__all__)
