"""Run a micro-step as a CUDA graph: one launch in the place of hundreds.

A graph repeats the kernels of one call, at the addresses that they had then. So inputs are copied
to where they were, and all else that the call reads or writes must stay where it is. What the call
does in Python is done once, while it is captured.
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from dtr_scale.errors import EngineError

log = logging.getLogger(__name__)

Results = tuple[Tensor, ...]
Computation = Callable[..., Results]
Replay = Callable[[], None]

WARM_UP_CALLS = 2
"""The first compiles, loads kernels and takes memory; the second is as all others."""


class Repeated(ABC):
    """Calls a computation a few times, and from then on repeats what it did to the device."""

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._num_calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[Replay, Results]] = {}

    def __call__(self, compute: Computation, inputs: Sequence[Tensor], kind: Hashable) -> Results:
        """Return what `compute(*inputs)` does, without its gradients.

        The next call overwrites it, and inputs always have the same shapes. Calls that do the same
        to the device are of one `kind`.
        """
        self._inputs = self._inputs or [torch.empty_like(tensor) for tensor in inputs]
        for own, given in zip(self._inputs, inputs, strict=True):
            assert own.shape == given.shape, (own.shape, given.shape)  # a copy would broadcast
            own.copy_(given)
        self._num_calls[kind] += 1
        if self._num_calls[kind] <= WARM_UP_CALLS:
            return self._warm_up(compute)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(compute)
        replay, results = self._recorded[kind]
        replay()
        return results

    def _call(self, compute: Computation) -> Results:
        return tuple(result.detach() for result in compute(*self._inputs))

    @abstractmethod
    def _warm_up(self, compute: Computation) -> Results:
        """Call the computation as it will be recorded."""

    @abstractmethod
    def _record(self, compute: Computation) -> tuple[Replay, Results]:
        """Return what does it again, and where its results will be; nothing is computed yet."""


class CudaGraphs(Repeated):
    """Captures the computation with `torch.cuda.graph`.

    By hand, since `make_graphed_callables` makes two graphs, leaves out the loss and the adding up
    of gradients, and gives `grad`s that the next replay overwrites. torch.compile's
    "reduce-overhead" makes two for each compiled block, and none of what lies between them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # Libraries keep workspaces per stream: those of this one are the graphs' own.
        self._stream = torch.cuda.Stream(device)
        # Graphs follow each other and none outlives its results, so they share their memory.
        self._pool = torch.cuda.graph_pool_handle()

    def _warm_up(self, compute: Computation) -> Results:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = self._call(compute)
        current.wait_stream(self._stream)
        return results

    def _record(self, compute: Computation) -> tuple[Replay, Results]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: a save that is written meanwhile may ask for its own events.
        capture = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with capture:
                results = self._call(compute)
        except RuntimeError as error:
            # The first is of what cannot be captured, later ones of its consequences.
            reason = str(error.__context__ or error).splitlines()[0]
            raise EngineError(
                f"engine.cuda_graphs = true: a micro-step of this network cannot be captured "
                f"({reason}); give engine.cuda_graphs=false"
            ) from error
        if not self._recorded:
            log.info("from here on micro-steps are CUDA graphs")
        return graph.replay, results
