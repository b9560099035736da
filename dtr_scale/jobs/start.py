"""Start a run from the weights of another training."""

import logging

import torch

from dtr_scale.checkpoint.fit import fit, named
from dtr_scale.checkpoint.start import Start, kind_of_start, read_start
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.models.build import build_network

log = logging.getLogger(__name__)

_ADAPT = "take what fits by --checkpoint.start_adapt=true"


def open_start(experiment: Experiment) -> Start:
    """Return what a run starts from, as far as it fits the run's network.

    The log tells what is taken, what begins afresh and what is left. Raises ConfigError for weights
    that do not fit, CheckpointError for what cannot be read.
    """
    checkpoint = experiment.checkpoint
    place, kind = checkpoint.start_from, checkpoint.start_kind
    assert place is not None
    kind = kind_of_start(place) if kind == "auto" else kind
    start = read_start(place, kind, experiment.data.storage_options)
    log.info("starting from %s (%s)", place, kind)
    shapes = _shapes(experiment)
    if not checkpoint.start_adapt:
        # What is missing is found where it is copied; masks follow from a network's settings.
        if left := [n for n in start.weights if n not in shapes and not n.startswith("routing.")]:
            raise ConfigError(
                f"checkpoint.start_from does not fit the network, which has no {named(left)}; set "
                f"model as it was there, or {_ADAPT}"
            )
        return start
    model = experiment.model
    found = fit(
        start.shapes,
        shapes,
        source_has_null=start.has_null_label,
        target_has_null=model.conditioning == "class" and model.class_dropout_prob > 0,
        is_unconditional=model.conditioning == "none",
    )
    for line in found.lines():
        log.info("%s", line)
    return start.fitted(found)


def _shapes(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network's parameters and of its masks that are drawn."""
    # Engines hold parts of them, in forms of their own. On meta nothing is initialised.
    with torch.device("meta"):
        network = build_network(
            **experiment.model.model_dump(), num_timesteps=experiment.diffusion.num_timesteps
        )
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}
