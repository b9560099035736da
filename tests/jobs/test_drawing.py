"""How far sampling is, on a terminal."""

import re
import sys
from types import SimpleNamespace
from typing import Any

import torch

from dtr_scale.engines.world import World
from dtr_scale.jobs.drawing import _Progress
from tests.support.terminal import shown_by, terminal


def test_all_samples_of_all_ranks_are_one_bar():
    stored: Any = SimpleNamespace(batch_size=8, num_samples=64)
    with terminal(80) as screen:
        progress: Any = _Progress(4, 10, stored, World(0, 0, 2, torch.device("cpu")))
        progress._bar.mininterval = 0  # or it would be drawn every tenth of a second
        for _ in range(20):
            progress.advance()
        progress.close()
        print(file=sys.stderr)
        lines = shown_by(screen)
    assert max(map(len, lines)) <= 79
    half = r"sampling  50%\|█.+\| 32/64 samples, \S+ samples/s, eta 0:00:00"
    assert any(re.fullmatch(half, line) for line in lines)


def test_a_batch_that_is_not_full_counts_what_is_wanted():
    """Eight samples of a batch of 64: half of the steps make four of them, not eight."""
    stored: Any = SimpleNamespace(batch_size=64, num_samples=8)
    progress = _Progress(1, 10, stored, World(0, 0, 1, torch.device("cpu")))
    for _ in range(5):
        progress.advance()
    assert progress._told(progress._start + 2).startswith("4/8 samples, 2 samples/s, eta 0:00:02")
