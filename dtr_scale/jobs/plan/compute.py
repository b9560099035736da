"""Tell what an experiment will cost before it runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtr_scale.config.schema import Experiment
from dtr_scale.evaluation.flops import ForwardCost, LayerCost, forward_cost
from dtr_scale.models.build import build_network
from dtr_scale.models.denoiser import Denoiser

TRAINING_FORWARDS = 3
"""A training step as forwards: the backward is twice its forward. Recomputation is not counted."""


@dataclass(frozen=True)
class ComputePlan:
    """The arithmetic of one image's forward, of its training, and of a whole run."""

    forward: ForwardCost
    max_steps: int
    global_batch_size: int

    @property
    def training_flops_per_image(self) -> int:
        # A MAC is two operations, a product and a sum.
        return 2 * TRAINING_FORWARDS * self.forward.total.macs

    @property
    def training_flops(self) -> int:
        return self.training_flops_per_image * self.max_steps * self.global_batch_size

    def figures(self, *, per_layer: bool) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        layers = self.forward.layers if per_layer else self.forward.groups()
        return {
            **self.forward.total._asdict(),
            "training_flops_per_image": self.training_flops_per_image,
            "training_flops": self.training_flops,
            "layers": {name: cost._asdict() for name, cost in layers.items() if name},
        }

    def table(self, *, per_layer: bool) -> str:
        """Return everything as text, a line per layer or kind of layer."""
        forward, total = self.forward, self.forward.total
        if per_layer:
            rows = {name: cost for name, cost in forward.layers.items() if name}
        else:
            rows = {self._label(name): cost for name, cost in forward.groups().items()}
        rows["total"] = total
        width = max(map(len, rows))
        images = self.max_steps * self.global_batch_size
        return "\n".join(
            [
                f"{'layer':{width}}  {'parameters':>13}  {'GMACs':>9}  {'share':>6}",
                *(_line(f"{name:{width}}", cost, total) for name, cost in rows.items()),
                "",
                f"network   {total.num_parameters / 1e6:.2f} M parameters",
                f"forward   {total.macs / 1e9:.2f} GMACs = {2 * total.macs / 1e9:.2f} GFLOPs "
                "per image",
                f"training  {self.training_flops_per_image / 1e9:.2f} GFLOPs per image "
                f"({TRAINING_FORWARDS} forwards)",
                f"run       {self.training_flops:.2e} FLOPs for {images:,} images "
                f"({self.max_steps:,} steps of {self.global_batch_size:,})",
            ]
        )

    def _label(self, name: str) -> str:
        blocks = self.forward.parts(name)
        return f"{name} (all {len(blocks)})" if f"{name}.1" in blocks else name


def plan_compute(experiment: Experiment) -> ComputePlan:
    """Return what the network of an experiment computes; nothing is allocated."""
    with torch.device("meta"):
        cost = forward_cost(*meta_network(experiment))
    return ComputePlan(cost, experiment.train.max_steps, experiment.train.global_batch_size)


def meta_network(experiment: Experiment) -> tuple[Denoiser, Tensor, Tensor, Tensor]:
    """Return the network of an experiment and what it takes, x, t and y of one sample.

    To be called under `torch.device("meta")`, where nothing is allocated.
    """
    model = experiment.model
    network = build_network(**model.model_dump(), num_timesteps=experiment.diffusion.num_timesteps)
    x = torch.empty(1, network.in_channels, network.input_size, network.input_size)
    t = y = torch.zeros(1, dtype=torch.int64)
    if model.type == "dit" and model.conditioning == "text":
        y = torch.empty(1, model.context_length, model.context_dim)
    return network, x, t, y


def _line(name: str, cost: LayerCost, total: LayerCost) -> str:
    share = cost.macs / total.macs
    return f"{name}  {cost.num_parameters:>13,}  {cost.macs / 1e9:>9.3f}  {share:>6.1%}"
