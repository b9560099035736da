"""Build DeepSpeed's configuration from the experiment's settings and the user's own section."""

import json
from collections.abc import Mapping
from typing import Any

from dtr_scale.errors import ConfigError

SECTION = "engine.deepspeed_config"
REDUCE_BUCKET_SIZE = 50_000_000
"""Gradients exchanged at once; DeepSpeed's default of 5e8 stages all of a DiT-L in one copy."""

_UNREACHABLE = "it puts the fp32 weights where checkpoints and EMA cannot reach them"
_ACCEPTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optimizer": ((None,), "every engine has the AdamW of the train section"),
    "scheduler": ((None,), "train.schedule sets the learning rate of every step"),
    "zero_optimization.round_robin_gradients": ((False,), _UNREACHABLE),
    "zero_optimization.zenflow": ((None,), _UNREACHABLE),
    "zero_optimization.compute_grad_norm": ((True,), "a step is judged by the gradient's norm"),
    "zero_optimization.offload_optimizer.device": (("none", "cpu"), _UNREACHABLE),
    "zero_optimization.offload_optimizer.ratio": ((1.0,), _UNREACHABLE),
    "zero_optimization.offload_optimizer.super_offload": ((False,), _UNREACHABLE),
    "zero_optimization.offload_param.device": (("none", "cpu"), _UNREACHABLE),
    "bfloat16": ((None,), "DeepSpeed's other name of bf16 would hide what is set"),
    "bf16.bf16_master_weights_and_grads": ((False,), "weights are kept in fp32"),
    "bf16.bf16_optimizer_states": ((False,), "Adam's moments are kept in fp32"),
}
"""Settings that this trainer refuses: what it accepts instead, and why."""


def build_deepspeed_config(
    section: Mapping[str, Any] | None,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    grad_clip: float | None,
    precision: str,
    zero_stage: int,
    keeps_masters: bool = False,
    exchange: str = "fp32",
) -> dict[str, Any]:
    """Return DeepSpeed's configuration; ConfigError where `section` contradicts the experiment.

    `keeps_masters` is for stage 0 in bf16: DeepSpeed trains fp32 weights, as they are its own.
    """
    section = section or {}
    bf16 = precision == "bf16"
    # Stage 0's bf16 optimizer makes a dummy Adam step at its start (losses off by 4%).
    autocast = bf16 and zero_stage == 0 and not keeps_masters
    by_precision = f"engine.precision = {precision!r}"
    by_batch = f"train.global_batch_size = {global_batch_size}"
    by_micro_batch = f"train.micro_batch_size = {micro_batch_size}"
    by_both = f"the {grad_accum_steps} of {by_batch} in parts of {by_micro_batch} on these ranks"
    by_clip = f"train.grad_clip = {json.dumps(grad_clip)}"
    by_stage = f"engine.zero_stage = {zero_stage}"
    settings = {
        "train_batch_size": (global_batch_size, by_batch),
        "train_micro_batch_size_per_gpu": (micro_batch_size, by_micro_batch),
        "gradient_accumulation_steps": (grad_accum_steps, by_both),
        "gradient_clipping": (grad_clip or 0.0, by_clip),
        "bf16.enabled": (bf16, by_precision),
        "fp16.enabled": (False, by_precision),
        "amp.enabled": (False, by_precision),
        "torch_autocast.enabled": (autocast, by_precision),
        "zero_optimization.stage": (zero_stage, by_stage),
    }
    _refuse_contradictions(section, settings)
    _refuse_unsupported(section)
    # Over the section, too: it may say bf16.enabled at stage 0, which trains by torch_autocast.
    fixed = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": grad_clip or 0.0,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": bf16 and zero_stage > 0},
        "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
    }
    offloads = _look_up(section, "zero_optimization.offload_optimizer.device", "none") != "none"
    defaults = _defaults(bf16, zero_stage, exchange, offloads=offloads)
    return _merge(_merge(defaults, section), fixed)


def _refuse_contradictions(
    section: Mapping[str, Any], settings: Mapping[str, tuple[Any, str]]
) -> None:
    """Raise ConfigError where a section has another value than a setting's, which has an origin."""
    for path, (value, origin) in settings.items():
        found = _look_up(section, path, default=value)
        if found != value:
            raise ConfigError(
                f"{SECTION}.{path} = {json.dumps(found)} contradicts {origin}; remove one"
            )


def _refuse_unsupported(section: Mapping[str, Any]) -> None:
    for path, (accepted, reason) in _ACCEPTED.items():
        found = _look_up(section, path, default=accepted[0])
        if found not in accepted:
            choice = " or ".join(json.dumps(value) for value in accepted)
            raise ConfigError(
                f"{SECTION}.{path} = {json.dumps(found)} is refused: {reason}; set {choice}, or "
                "remove it"
            )


def _defaults(bf16: bool, zero_stage: int, exchange: str, *, offloads: bool) -> dict[str, Any]:
    """Return what the section may change."""
    return {
        "zero_optimization": {
            # Buckets are exchanged while the backward goes on. DeepSpeed's own default is stage 3
            # alone: at stages 1 and 2 every exchange would come after the whole backward. Stage 0
            # has no buckets, and gradients that are offloaded meanwhile are another path, untried.
            "overlap_comm": zero_stage == 3 or (zero_stage > 0 and not offloads),
            "reduce_bucket_size": REDUCE_BUCKET_SIZE,
            # Stage 3 would replace F.linear in the whole process and never put it back.
            "memory_efficient_linear": False,
        },
        # Offloading keeps torch's AdamW: DeepSpeed's own would be compiled for a minute.
        "zero_force_ds_cpu_optimizer": False,
        # As under every engine; DeepSpeed's own default is that of the weights.
        "communication_data_type": exchange,
        # Stage 1 adds micro-steps in bf16: for fp32 DeepSpeed would change to another optimizer.
        "data_types": {"grad_accum_dtype": "fp32" if bf16 and zero_stage >= 2 else None},
        # The norm judges a step: where a gradient is not finite, DeepSpeed reports an infinite one.
        # Its own check asks each gradient, 13 launches apiece, and makes the host wait.
        "bf16": {"check_grad_overflow": False},
        # It waits for the device before every forward, to tell what `Stopwatch` tells already.
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 2**31,
    }


def _look_up(section: Mapping[str, Any], path: str, default: Any) -> Any:  # noqa: ANN401
    """Return the value at a dotted path, `default` where there is none."""
    *parents, last = path.split(".")
    for depth, parent in enumerate(parents, 1):
        section = section.get(parent, {})
        if not isinstance(section, Mapping):
            place = ".".join([SECTION, *parents[:depth]])
            raise ConfigError(f"{place} = {json.dumps(section)}: should be an object")
    return section.get(last, default)


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` laid over it, section by section."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merge(below, value)
        merged[key] = value
    return merged
