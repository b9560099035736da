"""Weigh the mean squared error by noise level, as a function of the SNR."""

import math

import torch
from torch import Tensor

from dtr_scale.errors import ConfigError

WEIGHTINGS = ("vanilla", "min_snr", "p2")
PREDICTIONS = ("epsilon", "x0", "v")


def loss_weight(
    kind: str,
    snr: Tensor | float,
    *,
    gamma: float | None = None,
    k: float = 1.0,
    prediction: str = "epsilon",
) -> Tensor:
    """Return the weight of each sample's squared error, [N] in the float type of `snr` [N] >= 0.

    "vanilla": 1. "min_snr": Min-SNR-gamma (Hang et al., 2023), `gamma` 5 unless given, for the
    error of what the network predicts: "epsilon", "x0" or "v"; at an SNR of 0 it is 1 for all
    three, as in the released code, so that a network learns its last timestep whatever it predicts.
    "p2" (Choi et al., 2022, eq. 8): 1 / (k + SNR)^gamma for the error of epsilon, `gamma` 1 unless
    given. ConfigError names an unknown kind or prediction, and a gamma or k out of range.
    """
    _require_known("objective.type", kind, WEIGHTINGS)
    _require_known("prediction", prediction, PREDICTIONS)
    snr = torch.as_tensor(snr)
    snr = snr if snr.is_floating_point() else snr.float()
    if kind == "vanilla":
        return torch.ones_like(snr)
    if kind == "min_snr":
        gamma = _require_positive("objective.gamma", 5.0 if gamma is None else gamma)
        return _min_snr(snr, gamma, prediction)
    _require_known("prediction", prediction, ("epsilon",))
    if gamma == 0:  # P2 switched off, as in the released code
        return torch.ones_like(snr)
    gamma = _require_positive("objective.gamma", 1.0 if gamma is None else gamma)
    # [N], like the losses: the port in DTR's released code gives weights [N, C, H, W].
    return (_require_positive("objective.k", k) + snr) ** -gamma


def _min_snr(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    if prediction == "epsilon":
        return gamma / snr.clamp(min=gamma)  # min(SNR, gamma) / SNR, without its 0 / 0
    # The error of epsilon is SNR times that of x0, the error of v SNR + 1 times (SNR = a^2 / s^2
    # with a^2 + s^2 = 1).
    weight = snr.clamp(max=gamma)
    weight = weight if prediction == "x0" else weight / (snr + 1)
    return torch.where(snr == 0, 1.0, weight)


def _require_known(key: str, name: str, accepted: tuple[str, ...]) -> None:
    if name not in accepted:
        raise ConfigError(f"{key} = {name!r}: unknown; give one of {', '.join(accepted)}")


def _require_positive(key: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ConfigError(f"{key} = {value}: not accepted; give a finite number above 0")
    return value
