"""Show how a run gets on: a bar that moves on a terminal, plain lines in a log file."""

import logging
import sys
from collections import deque

from tqdm import tqdm

from dtr_scale.logs import columns, duration
from dtr_scale.tracking.journal import Record

log = logging.getLogger(__name__)

_PACE_SECONDS = 60.0
_WIDE = 110


class Pace:
    """Seconds per step over the last minute of training.

    What is no step, such as an evaluation, is not in what is added. A job's first step compiles
    and allocates, and does not count.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sum = 0.0
        self._num_steps = 0

    def add(self, seconds: float) -> None:
        self._num_steps += 1
        if self._num_steps == 1:
            return
        self._recent.append(seconds)
        self._sum += seconds
        # One stays, however long it took.
        while self._sum - self._recent[0] >= _PACE_SECONDS:
            self._sum -= self._recent.popleft()

    @property
    def seconds_per_step(self) -> float | None:
        """None before the second step."""
        return self._sum / len(self._recent) if self._recent else None


class Progress:
    """Shows each step's number, and the figures of every logged one with speed and time left."""

    def __init__(self, *, step: int, max_steps: int, batch_size: int) -> None:
        self._step = step
        self._max_steps = max_steps
        self._batch_size = batch_size
        self._pace = Pace()
        self._loss = ""
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            layout = "{percentage:.1f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(
                total=max_steps,
                initial=step,
                bar_format=layout,
                ncols=columns(),
                nrows=24,  # in a terminal of no known size tqdm would find no row to draw in
                miniters=1,  # each step asks whether it is time to draw, also after a slow one
            )

    def count(self, step: int, seconds: float) -> None:
        """Take a step that is done, and how long it took."""
        self._step = step
        self._pace.add(seconds)
        if self._bar is not None:
            # A window may be resized.
            self._bar.ncols = columns()
            self._bar.set_postfix_str(self._short(), refresh=False)
            self._bar.update(step - self._bar.n)

    def show(self, record: Record) -> None:
        """Show the record of the newest step that was counted."""
        self._loss = f"loss {record['loss_mean']:.4f}"
        if self._bar is None:
            log.info("step %d/%d  %s", self._step, self._max_steps, self._long(record))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.refresh()  # the last steps may have come faster than the bar is drawn
            self._bar.close()

    def _long(self, record: Record) -> str:
        """Return what stands in a line of a log file."""
        figures = [
            self._loss,
            f"mse {record['mse_mean']:.4f}",
            f"vb {record['vb_mean']:.4f}",
            self._speed(),
            f"data wait {record['data_wait_fraction']:.0%}",
            f"eta {self._time_left()}",
            f"mem {record['memory_gb']:.1f} GB",
        ]
        return "  ".join(filter(None, figures))

    def _short(self) -> str:
        """Return what stands beside the bar, which is to keep ten columns of 80."""
        speed = self._speed() if columns() >= _WIDE else self._speed().partition("  ")[0]
        return "  ".join(filter(None, [self._loss, speed, f"eta {self._time_left()}"]))

    def _speed(self) -> str:
        seconds = self._pace.seconds_per_step
        if not seconds:
            return ""
        return f"{self._batch_size / seconds:.1f} samples/s  {_short_seconds(seconds)}/step"

    def _time_left(self) -> str:
        seconds = self._pace.seconds_per_step
        if seconds is None:
            return "?"
        return duration((self._max_steps - self._step) * seconds)


def _short_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
