"""Choose how a training computes attention, by timing the ways to on the GPU that it has."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.jobs.drawing import device_name
from dtr_scale.jobs.plan.compute import meta_network
from dtr_scale.models.attention import obstacle
from dtr_scale.models.attention_timing import Timings, attention_shapes, time_attention
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

CANDIDATES = ("sdpa", "cudnn", "xformers")


def settle_attention(
    trainer: Trainer, experiment: Experiment, stored: Mapping[str, Any] | None
) -> None:
    """Let `model.attention = auto` be the fastest, and let the checkpoints remember which that is.

    `stored` is what the checkpoint remembers that the training goes on from: it stays as long as
    the GPU is of the same kind, so that a resumed run rounds as it did. Every rank calls it, before
    the first step; rank 0 decides for all.
    """
    if experiment.model.attention != "auto":
        return
    world, network = trainer.world, trainer.engine.network
    assert isinstance(network, Denoiser)
    choice: dict[str, Any] = {}
    with world.agree():
        if world.is_main:
            heads = network.attention_shapes()
            # fp32 has one way, and so has a CPU.
            in_bf16 = world.device.type == "cuda" and experiment.engine.precision == "bf16"
            choice = choose(
                stored,
                place=f"{device_name(world.device)}, {experiment.engine.precision}",
                runs=lambda backend: obstacle(backend, world.device, heads) is None,
                measure=(lambda: _timings(trainer, experiment)) if in_bf16 else None,
            )
    choice = world.broadcast_object(choice)
    network.use_attention(choice["backend"])
    trainer.meta["attention"] = choice


def choose(
    stored: Mapping[str, Any] | None,
    *,
    place: str,
    runs: Callable[[str], bool],
    measure: Callable[[], Timings] | None,
) -> dict[str, Any]:
    """Return the way to compute attention at a `place`, the device and precision, and its figures.

    `stored` is an earlier choice, `runs` tells whether a backend can train here. Without `measure`
    there is one way.
    """
    if stored and stored["place"] == place and runs(stored["backend"]):
        return dict(stored)
    timings = measure() if measure else Timings({"sdpa": 0.0}, {})
    choice: dict[str, Any] = {"backend": timings.fastest, "place": place}
    if stored:
        log.warning(
            "attention was computed by %s (%s) and is by %s (%s): figures may differ in their last "
            "digits", stored["backend"], stored["place"], choice["backend"], place,
        )  # fmt: skip
    if measure:
        choice["milliseconds"] = timings.milliseconds
        figures = [f"{name} {figure:.3g} ms" for name, figure in timings.milliseconds.items()]
        figures += [f"{name} cannot ({reason})" for name, reason in timings.obstacles.items()]
        log.info(
            "attention by %s; forward and backward of a micro-batch in all layers: %s",
            choice["backend"], ", ".join(figures),
        )  # fmt: skip
    return choice


def _timings(trainer: Trainer, experiment: Experiment) -> Timings:
    with torch.device("meta"):
        shapes = attention_shapes(*meta_network(experiment))
    # Experts share a micro-batch.
    parts = 1 if experiment.model.expert is not None else experiment.model.num_experts
    micro_batch_size = trainer.loader.places.shape[1]
    return time_attention(
        CANDIDATES,
        shapes,
        num_samples=-(-micro_batch_size // parts),
        dtype=torch.bfloat16,
        device=trainer.world.device,
    )
