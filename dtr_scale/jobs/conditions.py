"""Choose what samples of a run are drawn for: classes, or texts of the user or of the data."""

import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtr_scale.config.network import DitConfig
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.grid import Titles, class_title
from dtr_scale.evaluation.sampling import sample_labels
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.sampling import captions_told, sampling_conditions, sampling_settings
from dtr_scale.prepare.encode import TextEncoder

log = logging.getLogger(__name__)


class Conditions(NamedTuple):
    """What samples are drawn for."""

    told: str
    """Which they are, as a manifest tells it."""
    of_samples: Callable[[range], Tensor] | None = None
    """Returns labels int64 [n] or text tokens [n, L, D] of given samples; None: there are none."""
    null: Tensor | None = None
    """The text that stands for none, [L, D]."""
    titles: Titles | None = None
    """What pictures of samples are called; None where that is not known."""


class Wanted(NamedTuple):
    """What a user wants samples of: classes, or texts; by default what evaluation says."""

    classes: tuple[str, ...] = ()
    """Names or numbers; sample i is of class i modulo their number."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn as well."""
    captions: Path | None = None
    """A file of texts, one a line."""
    text_encoder: str | None = None
    """A name of open_clip or a folder; None: what encoded the data."""
    pretrained: str = "openai"

    @property
    def texts_option(self) -> str | None:
        """The option that texts were given by, as the user gave it."""
        if self.prompts:
            return f"--prompt={self.prompts[0]!r}"
        return f"--captions={self.captions}" if self.captions else None


def conditions_of(experiment: Experiment, wanted: Wanted, device: torch.device) -> Conditions:
    """Return what a run's samples are drawn for: by default classes, or held-out captions."""
    conditioning = experiment.model.conditioning
    if conditioning != "text" and wanted.texts_option is not None:
        raise ConfigError(
            f"{wanted.texts_option} is for models of text, this one has "
            f"model.conditioning = {conditioning!r}; leave it out"
        )
    if conditioning != "class" and wanted.classes:
        raise ConfigError(
            f"--classes={','.join(wanted.classes)} is for models of classes, this one has "
            f"model.conditioning = {conditioning!r}; leave it out"
        )
    if conditioning == "none":
        return Conditions("none")
    if conditioning == "class":
        return _classes(experiment, wanted.classes)
    if wanted.texts_option is not None:
        return _texts(experiment, wanted, device)
    texts, null = sampling_conditions(experiment)
    return Conditions(captions_told(experiment), texts, null)


def _classes(experiment: Experiment, wanted: Sequence[str]) -> Conditions:
    settings, num_classes = sampling_settings(experiment), experiment.model.num_classes
    if wanted:
        chosen = torch.tensor([_class(name, experiment) for name in wanted])
        told, period = f"classes {', '.join(map(str, chosen.tolist()))}", len(chosen)
    else:
        chosen, told = None, experiment.evaluation.labels
        period = num_classes if told == "balanced" else 0

    def labels(indices: range) -> Tensor:
        if chosen is None:
            return sample_labels(settings, indices, num_classes)
        return chosen[torch.tensor(indices) % len(chosen)]

    # Their names are asked for when there is a picture: who draws none reads no manifest.
    names = functools.cache(lambda: class_names(experiment))

    def titles(indices: range) -> list[str]:
        return [class_title(label, names()) for label in labels(indices).tolist()]

    # The name of the only class would tell nothing.
    return Conditions(told, labels, titles=Titles(titles, period) if num_classes > 1 else None)


def class_names(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of the data's classes; () where they are not known, or the data is gone."""
    try:
        return open_samples(experiment).manifest.class_names
    except (ConfigError, DataError) as error:
        log.info("the names of classes are not known: %s", error)
        return ()


def _class(name: str, experiment: Experiment) -> int:
    """Return the number of a class that is given by its name, or by the number itself."""
    names, num_classes = class_names(experiment), experiment.model.num_classes
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < num_classes:
        return int(name)
    # The nearest name, since it is most likely a slip.
    near = [*difflib.get_close_matches(name, names, n=1), *names[:1]]
    by_name = f", or a name such as {near[0]!r}" if near else ""
    raise ConfigError(
        f"--classes: {name!r} is no class of this run; give 0 to {num_classes - 1}{by_name}"
    )


def _texts(experiment: Experiment, wanted: Wanted, device: torch.device) -> Conditions:
    lines, told = list(wanted.prompts), f"prompts {json.dumps(wanted.prompts)}"
    if wanted.captions is not None:
        lines, sha256 = _lines(wanted.captions)
        told = f"{len(lines)} captions, sha256 {sha256}"
    encoder, null = _text_encoder(experiment, wanted, device)

    def texts(indices: range) -> Tensor:
        # By the sample's own index: any rank gives it the same text.
        tokens = encoder.encode([lines[index % len(lines)] for index in indices])
        return torch.from_numpy(tokens).float()

    def titles(indices: range) -> list[str]:
        return [lines[index % len(lines)] for index in indices]

    return Conditions(told, texts, null, Titles(titles, len(lines)))


def _lines(file: Path) -> tuple[list[str], str]:
    """Return the texts of a file, and its hash."""
    try:
        content = file.read_bytes()
        lines = [line.strip() for line in content.decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--captions={file} cannot be read ({error}); give a text file in UTF-8, one "
            "caption a line"
        ) from None
    if not lines:
        raise ConfigError(f"--captions={file} has no captions; write one a line")
    return lines, hashlib.sha256(content).hexdigest()


def _text_encoder(
    experiment: Experiment, wanted: Wanted, device: torch.device
) -> tuple[TextEncoder, Tensor]:
    """Return what encodes captions as the data's, and the null text; ConfigError for another."""
    try:
        samples = open_samples(experiment)
        record, null = samples.manifest.text_encoder, samples.null_condition()
        samples.close()
    except DataError as error:
        log.info("the data's text encoder is not known: %s", error)
        record, null = None, None
    name, pretrained = wanted.text_encoder, wanted.pretrained
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
