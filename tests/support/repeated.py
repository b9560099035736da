"""Record what a computation does to tensors on a CPU, and do it again as a CUDA graph does."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtr_scale.engines.graphs import Computation, Repeated, Replay, Results


class CpuGraphs(Repeated):
    """Repeats operations on the tensors that they were recorded with; no Python of theirs runs."""

    def _warm_up(self, compute: Computation) -> Results:
        return self._call(compute)

    def _record(self, compute: Computation) -> tuple[Replay, Results]:
        operations = _Operations()
        with operations:
            results = self._call(compute)
        return operations.replay, results


class _Operations(TorchDispatchMode):
    """The operations below autograd, those of the backward included."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []
        self._is_fresh = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        # A capture computes nothing. What was recorded here has been computed, once.
        if self._is_fresh:
            self._is_fresh = False
            return
        for func, args, kwargs, out in self._done:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # Views, and what was written in place, are there already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
