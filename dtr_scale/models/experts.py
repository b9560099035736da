"""Call networks of one kind as one, each for an interval of the timesteps (paper, appendix D).

As in eDiff-I (Balaji et al., 2022) the experts share no weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtr_scale.errors import ConfigError
from dtr_scale.models.denoiser import Denoiser


def expert_timesteps(expert: int, num_experts: int, num_timesteps: int) -> range:
    """Return the timesteps of an expert: intervals equal up to one timestep, 0 the lowest noise."""
    return range(expert * num_timesteps // num_experts, (expert + 1) * num_timesteps // num_experts)


class MultiExperts(Denoiser):
    """Experts called as one network: each sample goes to the expert of its timestep.

    `experts` are networks of one kind, the first of them for the lowest of `num_timesteps`.

    Trained together, an expert's gradient is that of its own training on its part of the batch,
    times that part's share.
    """

    def __init__(self, experts: Sequence[Denoiser], num_timesteps: int) -> None:
        first = experts[0]
        super().__init__(
            input_size=first.input_size,
            in_channels=first.in_channels,
            num_classes=first.num_classes,
            conditioning=first.conditioning,
            class_dropout_prob=first.class_dropout_prob,
            learn_sigma=first.learn_sigma,
        )
        self.experts = nn.ModuleList(experts)
        self.timesteps = [
            expert_timesteps(k, len(experts), num_timesteps) for k in range(len(experts))
        ]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: int | None = None) -> Tensor:
        t = t.expand(len(x))
        outputs: list[Tensor] = []
        places: list[Tensor] = []
        for expert, timesteps in zip(self.experts, self.timesteps, strict=True):
            # On a GPU `nonzero` waits for the device, once per expert: it must know how many.
            mine = ((t >= timesteps.start) & (t < timesteps.stop)).nonzero().flatten()
            if not len(mine) and len(t) and not torch.is_grad_enabled():
                # Without gradients all ranks have the same timesteps (a sampling step's, the
                # probe's, those of every batch of held-out samples), so all skip the same experts,
                # and none waits for another's weights.
                continue
            # In training every expert is called: ranks that shard its weights gather them together,
            # and each parameter has a gradient. Where it has no sample it gets one, whose output is
            # dropped: compiled, the backward of flash attention fails on none.
            some = mine if len(mine) or not len(t) else mine.new_zeros(1)
            outputs.append(expert(x[some], t[some], y[some], step)[: len(mine)])
            places.append(mine)
        order = torch.cat(places)
        if len(order) != len(t):
            raise ConfigError(
                f"{len(t) - len(order)} of {len(t)} timesteps belong to no expert; give 0 to "
                f"{self.timesteps[-1].stop - 1}"
            )
        # Outputs are ordered by expert; `order` says which sample each is.
        return torch.cat(outputs)[order.argsort()]

    def routed_blocks(self) -> list[nn.Module]:
        experts = [expert for expert in self.experts if isinstance(expert, Denoiser)]
        return [block for expert in experts for block in expert.routed_blocks()]
