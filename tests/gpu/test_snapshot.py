"""A checkpoint's copy of a state that goes on changing on a GPU."""

import pytest
import torch

from dtr_scale.checkpoint.snapshot import Snapshot
from dtr_scale.engines.base import Piece

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUMEL = 2**28  # 1 GB: some 20 to 80 ms over PCIe, in which the updates below would be done


def test_a_copy_is_of_its_moment_though_the_state_changes_right_after():
    data = torch.zeros(NUMEL, device="cuda")
    state = {"master/a": Piece((NUMEL,), 0, data)}
    snapshot = Snapshot(state)
    for value in (1.0, 2.0):
        data.fill_(value)
        snapshot.take(state)
        snapshot.before_change()
        data.fill_(-1.0)
        held = torch.frombuffer(snapshot[-4 * NUMEL :], dtype=torch.float32)
        assert bool((held == value).all())
