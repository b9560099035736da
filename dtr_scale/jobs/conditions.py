"""Choose what samples of a run are drawn for: classes, or captions of the data or of a file."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtr_scale.config.network import DitConfig
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.sampling import sampling_conditions
from dtr_scale.prepare.encode import TextEncoder

log = logging.getLogger(__name__)


class Conditions(NamedTuple):
    """What samples are drawn for."""

    told: str
    """Which they are, as a manifest tells it."""
    of_samples: Callable[[range], Tensor] | None = None
    """Returns text tokens [n, L, D] of given samples; None: the classes of `sample_labels`."""
    null: Tensor | None = None
    """The text that stands for none, [L, D]."""


class Captions(NamedTuple):
    """Captions to draw samples for, one a line, and what encodes them."""

    file: Path
    text_encoder: str | None = None
    """A name of open_clip or a folder; None: what encoded the data."""
    pretrained: str = "openai"


def conditions_of(
    experiment: Experiment, captions: Captions | None, device: torch.device
) -> Conditions:
    """Return what a run's samples are drawn for: classes, captions, or the held-out split's."""
    conditioning = experiment.model.conditioning
    if conditioning != "text":
        if captions is not None:
            raise ConfigError(
                f"--captions={captions.file} is for models of text, this one has "
                f"model.conditioning = {conditioning!r}; leave it out"
            )
        return Conditions("none" if conditioning == "none" else experiment.evaluation.labels)
    if captions is not None:
        return _captions(experiment, captions, device)
    texts, null = sampling_conditions(experiment)
    return Conditions("held-out captions", texts, null)


def _captions(experiment: Experiment, captions: Captions, device: torch.device) -> Conditions:
    try:
        content = captions.file.read_bytes()
        lines = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--captions={captions.file} cannot be read ({error}); give a text file in UTF-8, one "
            "caption a line"
        ) from None
    if not lines:
        raise ConfigError(f"--captions={captions.file} has no captions; write one a line")
    encoder, null = _text_encoder(experiment, captions, device)

    def texts(indices: range) -> Tensor:
        # By the sample's own index: any rank gives it the same caption.
        tokens = encoder.encode([lines[index % len(lines)] for index in indices])
        return torch.from_numpy(tokens).float()

    told = f"{len(lines)} captions, sha256 {hashlib.sha256(content).hexdigest()}"
    return Conditions(told, texts, null)


def _text_encoder(
    experiment: Experiment, captions: Captions, device: torch.device
) -> tuple[TextEncoder, Tensor]:
    """Return what encodes captions as the data's, and the null text; ConfigError for another."""
    try:
        samples = open_samples(experiment)
        record, null = samples.manifest.text_encoder, samples.null_condition()
        samples.close()
    except DataError as error:
        log.info("the data's text encoder is not known: %s", error)
        record, null = None, None
    name, pretrained = captions.text_encoder, captions.pretrained
    if name is None:
        if record is None:
            raise ConfigError("the data names no text encoder; give --text-encoder NAME_OR_FOLDER")
        name, pretrained = record.name, ""
        if not Path(name).is_dir():
            name, _, pretrained = record.name.rpartition("/")
    encoder = TextEncoder(name, pretrained, device)
    if record is not None and encoder.record.sha256 != record.sha256:
        raise ConfigError(
            f"--text-encoder={name} has weights {encoder.record.sha256[:12]}, the data was encoded "
            f"by {record.name} with {record.sha256[:12]}; give that one"
        )
    assert isinstance(experiment.model, DitConfig)  # the one that knows texts
    shape = experiment.model.context_length, experiment.model.context_dim
    if encoder.context_shape != shape:
        raise ConfigError(
            f"--text-encoder={name} makes texts of {list(encoder.context_shape)}, the model was "
            f"trained on {list(shape)}; give the one that encoded its data"
        )
    if null is None:
        null = encoder.encode([""])[0].astype(np.float32)
    return encoder, torch.from_numpy(null)
