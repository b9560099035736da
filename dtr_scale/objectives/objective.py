"""Turn the losses of a global batch into the one scalar that a step minimises.

l_k below is the mean of (mse + vb) over the samples of cluster k in the global batch, n_k their
number. An objective's own parameters are replicated fp32 tensors outside the network's engine.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dtr_scale.errors import ConfigError
from dtr_scale.objectives.uncertainty import uncertainty_loss
from dtr_scale.objectives.weighting import WEIGHTINGS, loss_weight

OBJECTIVE_TYPES = (*WEIGHTINGS, "ant_uw")


class Objective(Protocol):
    """The share of a part of the global batch in its scalar, and parameters of its own."""

    def loss(
        self, mse: Tensor, vb: Tensor, *, snr: Tensor, cluster: Tensor, counts: Tensor
    ) -> Tensor:
        """Return this part's share, a scalar to differentiate; the shares sum to the objective.

        mse [n], vb [n], snr [n], cluster int [n] of the part; counts n_k [K] of the global batch.
        """
        ...

    def update(self, cluster_loss: Tensor, counts: Tensor, skip: Tensor | None = None) -> None:
        """Take one step of the objective's own parameters from l_k [K] and n_k [K].

        None where `skip` fp32 [], on the device, is 1.
        """
        ...

    def metrics(self) -> dict[str, Tensor]:
        """Return the objective's own parameters by name, live vectors on the device."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of everything that `load_state_dict` needs to continue bit for bit."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class WeightedObjective(Objective):
    """The mean of w(SNR) mse + vb over the global batch, w as in `loss_weight`."""

    def __init__(
        self,
        global_batch_size: int,
        kind: str = "vanilla",
        gamma: float | None = None,
        k: float = 1.0,
    ) -> None:
        self.global_batch_size = global_batch_size
        self._weight = partial(loss_weight, kind, gamma=gamma, k=k)

    def loss(
        self, mse: Tensor, vb: Tensor, *, snr: Tensor, cluster: Tensor, counts: Tensor
    ) -> Tensor:
        # By the global batch size, not this part's: the shares of any split sum to the same mean.
        return (self._weight(snr) * mse + vb).sum() / self.global_batch_size

    def update(self, cluster_loss: Tensor, counts: Tensor, skip: Tensor | None = None) -> None:
        pass

    def metrics(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class AntUwObjective(Objective):
    """sum_k 1/2 [exp(-s_k) l_k / K + s_k], with log-variances s_k learned by AdamW."""

    def __init__(self, num_clusters: int, lr: float, device: torch.device) -> None:
        # Out of the engine's reach: bf16 would round them, and clipping would count their gradient
        # in the network's norm.
        self.log_var = torch.zeros(num_clusters, dtype=torch.float32, device=device)
        # AdamW's default decay of 0.01 would pull every s_k to 0.
        # Fused: one kernel, which looks at `skip` by itself.
        self.optimizer = torch.optim.AdamW([self.log_var], lr=lr, weight_decay=0.0, fused=True)
        # Made now, not by the first step: a checkpoint of step 0 has them, and copies into them.
        # AdamW makes these keys at its first step and keeps a state that it finds. If torch renames
        # one, the first step fails with a KeyError.
        self.optimizer.state[self.log_var] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(self.log_var),
            "exp_avg_sq": torch.zeros_like(self.log_var),
        }

    def loss(
        self, mse: Tensor, vb: Tensor, *, snr: Tensor, cluster: Tensor, counts: Tensor
    ) -> Tensor:
        return uncertainty_loss(mse + vb, cluster, self.log_var, counts)

    def update(self, cluster_loss: Tensor, counts: Tensor, skip: Tensor | None = None) -> None:
        # By hand, from l_k over all ranks: backward would see this rank's share alone, and the
        # network's clipping would count it.
        gradient = (1 - torch.exp(-self.log_var) * cluster_loss / len(self.log_var)) / 2
        # l_k of a cluster without samples is nan, 0 / 0. Its s_k moves by Adam's momentum alone.
        self.log_var.grad = torch.where(counts > 0, gradient, 0.0).float()
        optimizer: Any = self.optimizer
        optimizer.found_inf = skip  # as in `Engine._heed`
        optimizer.step()

    def metrics(self) -> dict[str, Tensor]:
        return {"uw_log_var": self.log_var}

    def state_dict(self) -> dict[str, Tensor]:
        adam = self.optimizer.state[self.log_var]
        state = {"log_var": self.log_var, **adam}
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {"log_var": self.log_var, **self.optimizer.state[self.log_var]}
        # In place: the optimizer knows log_var by its identity.
        for name, value in own.items():
            value.copy_(state[name])


def build_objective(
    type: str,
    *,
    num_clusters: int,
    global_batch_size: int,
    device: torch.device,
    gamma: float | None = None,
    k: float = 1.0,
    lr: float = 0.025,
) -> Objective:
    """Return the objective named `type`: one of OBJECTIVE_TYPES, else ConfigError.

    `gamma` and `k` are those of `loss_weight`, `lr` that of ant_uw's log-variances.
    """
    if type in WEIGHTINGS:
        return WeightedObjective(global_batch_size, type, gamma=gamma, k=k)
    if type == "ant_uw":
        return AntUwObjective(num_clusters, lr, device)
    accepted = ", ".join(OBJECTIVE_TYPES)
    raise ConfigError(f"objective.type = {type!r}: unknown; give one of {accepted}")
