"""Count what one forward of a network costs, layer by layer, without allocating anything.

A MAC is one multiplication with its addition, 2 FLOPs. The "GFLOPs" of the tables in DiT and DTR
are 10^9 MACs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import MultiExperts


class LayerCost(NamedTuple):
    macs: int
    num_parameters: int


@dataclass(frozen=True)
class ForwardCost:
    """The cost of a forward by qualified module name, in the network's order; "" is all of it.

    What neither computes nor has parameters is left out.
    """

    layers: dict[str, LayerCost]

    @property
    def total(self) -> LayerCost:
        return self.layers[""]

    def groups(self) -> dict[str, LayerCost]:
        """Return the network's immediate parts; a row of equal blocks comes after its first."""
        groups: dict[str, LayerCost] = {}
        for name in self.parts():
            parts = self.parts(name)
            equal = len({self.layers[part] for part in parts}) == 1
            if f"{name}.1" in parts and equal:
                groups[parts[0]] = self.layers[parts[0]]
            groups[name] = self.layers[name]
        return groups

    def parts(self, name: str = "") -> list[str]:
        """Return the names of what a layer immediately consists of."""
        return [part for part in self.layers if part and part.rpartition(".")[0] == name]


def forward_cost(network: Denoiser, x: Tensor, t: Tensor, y: Tensor) -> ForwardCost:
    """Return the cost of `network(x, t, y)`, all on the meta device or on any other.

    Matrix multiplications, convolutions and both products of attention count, as in the tables of
    DiT (Peebles & Xie, 2023). What works element by element does not, routing included: its
    masks would add 0.02% to DiT-L/2, as in table 7 of the DTR paper. Multi-experts cost what one
    of them does, to which a sample goes.
    """
    root = "experts.0" if isinstance(network, MultiExperts) else ""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.get_submodule(root)(x, t, y, 0)
    # The counter's names begin with the class of what was called.
    # sum // 2: FLOPs to MACs.
    called = {
        f"{root}.{name.partition('.')[2]}".strip("."): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
    }
    layers: dict[str, LayerCost] = {}
    # Backwards, so that the parts of a layer come before it.
    for name, module in reversed(list(network.named_modules())):
        inside = [f"{name}.{part}".strip(".") for part, _ in module.named_children()]
        # A list of modules is never called itself: it costs what is in it.
        macs = called.get(name, sum(layers[part].macs for part in inside))
        layers[name] = LayerCost(macs, sum(p.numel() for p in module.parameters()))
    return ForwardCost({name: cost for name, cost in reversed(layers.items()) if any(cost)})
