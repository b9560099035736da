"""Train diffusion transformers with Denoising Task Routing, from one process to a cluster."""

from typing import TYPE_CHECKING, Any

# For type checkers and editors; at run time `__getattr__` imports these.
if TYPE_CHECKING:
    from dtr_scale.diffusion.process import GaussianDiffusion
    from dtr_scale.jobs.network import build_model

__all__ = ["GaussianDiffusion", "__version__", "build_model"]

__version__ = "0.1.0"

_HOME = {
    "GaussianDiffusion": "dtr_scale.diffusion.process",
    "build_model": "dtr_scale.jobs.network",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import public names on first use, so that `import dtr_scale` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dtr_scale' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
