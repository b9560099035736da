"""Choose pictures of samples to be seen side by side, and make them part of a page."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from dtr_scale.evaluation.comparison.record import RunRecord, letters

MOST_STEPS = 6
_LARGE_BYTES = 400_000
_QUALITY = 90  # of WebP, for what is larger: five runs of 2,048 x 2,048 PNGs would have 200 MB
_OF_THE_NOISE = ("train.seed", "model.in_channels", "model.input_size")
_OF_THE_DRAWING = (
    "model.num_classes",
    "diffusion.noise_schedule",
    "diffusion.num_timesteps",
    "evaluation.sampler",
    "evaluation.num_sampling_steps",
    "evaluation.cfg_scale",
    "evaluation.cfg_channels",
    "evaluation.cfg_interval",
    "evaluation.eta",
    "evaluation.clip_denoised",
    "train.ema_decay",
)


class Picture(NamedTuple):
    """A picture as a page holds it."""

    uri: str
    width: int
    height: int
    is_recoded: bool
    """Stored as WebP, with slight losses, for its size."""


def shared_steps(runs: Sequence[RunRecord]) -> list[int]:
    """Return up to MOST_STEPS steps, evenly spread, of which the most runs have a picture."""
    counts = Counter(step for run in runs for step in run.grids)
    most = max(counts.values(), default=0)
    steps = sorted(step for step, count in counts.items() if count == most)
    if len(steps) <= MOST_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(index * last / (MOST_STEPS - 1))] for index in range(MOST_STEPS)]


def noise_note(runs: Sequence[RunRecord]) -> tuple[str, bool]:
    """Return whether pictures at one place of their grids began as the same noise, and a caution.

    A sample's noise is a function of the seed, its index and its shape.
    """
    noise, drawing = _differing(runs, _OF_THE_NOISE), _differing(runs, _OF_THE_DRAWING)
    if noise:
        told = "Not from the same noise: the runs differ in " + "; ".join(noise) + "."
    else:
        told = "Samples at the same place began as the same noise."
    if drawing:
        told += " They are drawn differently: " + "; ".join(drawing) + "."
    return told, bool(noise or drawing)


def embed(content: bytes) -> Picture | None:
    """Return a picture's bytes as a page holds them; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
            width, height = image.size
            if len(content) <= _LARGE_BYTES:
                return Picture(_uri(content, "png"), width, height, False)
            smaller = io.BytesIO()
            image.save(smaller, format="WEBP", quality=_QUALITY)
    except (OSError, ValueError, SyntaxError):  # Pillow's, for what is cut or no picture
        return None
    return Picture(_uri(smaller.getvalue(), "webp"), width, height, True)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _differing(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[str]:
    found = []
    drawn = [
        (letter, run) for letter, run in zip(letters(len(runs)), runs, strict=True) if run.grids
    ]
    for key in keys:
        values = [(letter, run.settings.get(key)) for letter, run in drawn]
        if any(value != values[0][1] for _, value in values):
            found.append(f"{key} " + ", ".join(f"{letter} {value}" for letter, value in values))
    return found
