"""Time the parts of a loop, and what this device can do at best."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

_MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}
_MATMUL_ROUNDS = 5


class Spread(NamedTuple):
    """Of the same time, measured several times, in seconds."""

    median: float
    min: float
    max: float


def spread(seconds: Sequence[float]) -> Spread:
    return Spread(median(seconds), min(seconds), max(seconds))


class LoopClock:
    """Times a loop's rounds, and named parts of them: by events on a GPU, by the clock on a CPU.

    The host waits for no event before the loop has ended, so the loop runs as it does without.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._rounds: list[tuple[Any, Any]] = []
        self._began = self._now()
        self._parts: list[dict[str, list[tuple[Any, Any]]]] = [defaultdict(list)]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose calls count as the part `name` of their round."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            began = self._now()
            result = function(*args, **kwargs)
            self._parts[-1][name].append((began, self._now()))
            return result

        return call

    def begin_round(self) -> None:
        """Begin the next round now: what took place since the last one counts for nothing."""
        self._began = self._now()

    def end_round(self) -> None:
        """End a round, with which the next one begins."""
        now = self._now()
        self._rounds.append((self._began, now))
        self._began = now
        self._parts.append(defaultdict(list))

    def rounds(self) -> list[float]:
        """Return the seconds of each round that has ended."""
        self._wait()
        return [self._between(*marks) for marks in self._rounds]

    def parts(self, name: str) -> list[float]:
        """Return the seconds that a part took in each round, the unfinished one included."""
        self._wait()
        return [sum(self._between(*span) for span in part[name]) for part in self._parts]

    def _now(self) -> Any:  # noqa: ANN401
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, second: Any) -> float:  # noqa: ANN401
        return first.elapsed_time(second) / 1000 if self._on_gpu else second - first

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


class Alternating:
    """Makes a step of something else after each of a loop's rounds, and times these."""

    def __init__(self, loop: LoopClock, device: torch.device, step: Callable[[], None]) -> None:
        self._loop = loop
        self._clock = LoopClock(device)
        self._step = step

    def make_step(self) -> None:
        self._clock.begin_round()
        self._step()
        self._clock.end_round()
        # What was made here is none of the loop's time.
        self._loop.begin_round()

    def rounds(self) -> list[float]:
        return self._clock.rounds()


def matmul_seconds(device: torch.device, precision: str) -> tuple[float, list[float]]:
    """Return the FLOPs of a large square matrix product, and the seconds of several.

    In `precision`, "bf16" or "fp32", on as many threads as all else here.
    """
    size = _MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random: a product of zeros takes less power, for which a GPU clocks higher.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)  # chooses and loads the kernel
    clock = LoopClock(device)
    for _ in range(_MATMUL_ROUNDS):
        torch.mm(a, b, out=out)
        clock.end_round()
    return 2.0 * size**3, clock.rounds()
