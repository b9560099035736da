"""Measure each way to compute attention at the shapes of an experiment's network."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.jobs.bench.report import config, machine
from dtr_scale.jobs.bench.timing import LoopClock, spread
from dtr_scale.jobs.plan.compute import meta_network
from dtr_scale.models.attention import attention
from dtr_scale.models.attention_timing import attention_shapes, layer_inputs, queries_keys_values

_WARM_UP = 2
_SDPA = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def bench_attention(experiment: Experiment, *, rounds: int) -> dict[str, Any]:
    """Return the report of all ways at each shape that occurs, at a rank's micro-batch.

    Ways that this device or shape does not allow have None for their times, and the reason.
    """
    world = join_world(needs_process_group=False, device=experiment.engine.device)
    precision = experiment.engine.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch_size = experiment.micro_batch_size(world.world_size)
    with torch.device("meta"):
        found = attention_shapes(*meta_network(experiment))
    shapes = []
    for shape, count in found.items():
        ways = {
            name: _measured(way, layer_inputs(shape, batch_size, dtype, world.device), rounds)
            for name, way in _ways(world).items()
        }
        shapes.append({**shape._asdict(), "layers": count, "ways": ways})
    return {
        "bench": "attention",
        "batch_size": batch_size,
        "precision": precision,
        "rounds": rounds,
        "shapes": shapes,
        "machine": machine(world),
        "config": config(experiment),
    }


def _ways(world: World) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return way

    ways = {name: sdpa(backend) for name, backend in _SDPA.items()}
    # What training computes where model.attention is sdpa: on a CPU in bf16 it is neither of these.
    ways["model.attention=sdpa"] = lambda q, k, v: attention(q, k, v, "sdpa")
    if world.device.type == "cuda":
        ways["model.attention=xformers"] = lambda q, k, v: attention(q, k, v, "xformers")
    return ways


def _measured(
    way: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], rounds: int
) -> dict[str, Any]:
    """Return the seconds of forward and backward, or the reason why there are none."""
    clock = LoopClock(inputs[0].device)

    def attend() -> Tensor:
        return way(*queries_keys_values(inputs))

    forward, backward = (
        clock.timed(name, function)
        for name, function in (
            ("forward", attend),
            ("backward", lambda out, grad: torch.autograd.grad(out, inputs, grad)),
        )
    )
    # torch warns of each reason before its error, which has none.
    with warnings.catch_warnings(record=True) as told:
        try:
            for _ in range(_WARM_UP + rounds):
                out = forward()
                backward(out, torch.ones_like(out))
                clock.end_round()
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            reason = str(told[-1].message if told else error).strip().splitlines()[0]
            return {"forward": None, "backward": None, "obstacle": reason}
    return {
        name: spread(clock.parts(name)[_WARM_UP:-1])._asdict() for name in ("forward", "backward")
    }


def attention_table(report: dict[str, Any]) -> str:
    """Return a report as lines for a terminal, the fastest way first."""
    return "\n".join(line for shape in report["shapes"] for line in _lines(report, shape))


def _lines(report: dict[str, Any], shape: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{shape['layers']} layers: batch {report['batch_size']}, {shape['queries']} tokens to "
        f"{shape['keys']}, {shape['heads']} heads of {shape['head_dim']}, "
        f"{report['precision']}, {report['machine']['device']}"
    )
    yield f"{'median of ' + str(report['rounds']):30}{'forward':>10}{'backward':>10}{'both':>10} ms"
    found = {name: way for name, way in shape["ways"].items() if way["forward"]}
    times = {
        name: [way[p]["median"] for p in ("forward", "backward")] for name, way in found.items()
    }
    for name in sorted(found, key=lambda name: sum(times[name])):
        figures = "".join(f"{1e3 * t:10.3f}" for t in (*times[name], sum(times[name])))
        yield f"{name:30}{figures}"
    for name, way in shape["ways"].items():
        if name not in found:
            yield f"{name:30}not here: {way['obstacle']}"
