"""How FSDP2's groups are made; `test_engines.py` and `test_matrix.py` train with them."""

import pytest
from torch import nn

from dtr_scale.engines.fsdp2 import group_blocks


class Experts(nn.Module):
    """Two networks of five blocks, and some that no list holds together, as an ADM's are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(5))})
            for _ in range(2)
        )
        self.levels = nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(2))

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("size", "expected"), [(4, [4, 1, 4, 1, 1, 1]), (2, [2, 2, 1, 2, 2, 1, 1, 1]), (1, 12 * [1])]
)
def test_groups_are_neighbours_in_one_list(size, expected):
    network = Experts()
    groups = list(group_blocks(network, network.blocks(), size))
    assert [len(group) for group in groups] == expected
    assert [block for group in groups for block in group] == network.blocks()
