"""Keep parameters of a network from being trained, by patterns of their names."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dtr_scale.errors import ConfigError

log = logging.getLogger(__name__)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that `frozen_names` finds, and tell how many they are.

    Before an engine takes the network over: optimizers and buffers are made by what is trained.
    """
    parameters = dict(network.named_parameters())
    frozen = frozen_names(network, patterns)
    if not frozen:
        return
    for name in frozen:
        parameters[name].requires_grad_(False)
    share = sum(parameters[n].numel() for n in frozen) / sum(p.numel() for p in parameters.values())
    log.info(
        "frozen: %d of %d tensors, %.1f%% of the parameters",
        len(frozen), len(parameters), 100 * share,
    )  # fmt: skip


def frozen_names(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the parameters whose names fit any of `patterns`, where * stands for anything.

    Raises ConfigError for a pattern that no name fits, and if nothing would be trained.
    """
    parameters = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            names = ", ".join(parameters[:: max(1, len(parameters) // 4)][:4])
            raise ConfigError(
                f"train.freeze: {pattern!r} fits no parameter of the network; give patterns such "
                f"as 'blocks.0.*' (there are {names}, ...)"
            )
    frozen = [n for n in parameters if any(fnmatchcase(n, pattern) for pattern in patterns)]
    if len(frozen) == len(parameters):
        raise ConfigError(f"train.freeze = {list(patterns)}: fits every parameter; leave some out")
    return frozen
