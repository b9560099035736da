"""Play a long run through, with failures that come when they like."""

import numpy as np

from dtr_scale.jobs.plan.goodput import Failures

_RUN_SECONDS = 90 * 86400.0


def simulated_goodput(failures: Failures, interval: float, *, runs: int = 20) -> list[float]:
    """Return the goodput of several runs of 90 days that save every `interval` seconds.

    Each failure comes after an exponentially distributed time, also while the job starts anew or a
    save is being written, which then does not count. Unlike `Failures.goodput` this is no formula.
    """
    generator = np.random.default_rng(0)
    return [_play(failures, interval, generator) for _ in range(runs)]


def _play(failures: Failures, interval: float, generator: np.random.Generator) -> float:
    now = saved = 0.0
    while now < _RUN_SECONDS:
        # One attempt: from its first new step until the next failure.
        left = generator.exponential(failures.seconds_between)
        is_first = now == 0.0
        now += left
        left -= 0.0 if is_first else failures.restart_seconds
        # Each interval's steps count once the save after them is written.
        written = left - failures.stall_seconds - failures.write_seconds
        rounds = max(0.0, np.floor(written / (interval + failures.stall_seconds)))
        saved += rounds * interval
    return saved / now
