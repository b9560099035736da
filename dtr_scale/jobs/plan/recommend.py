"""Choose engine, micro-batch and checkpoint interval by the plan's own figures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dtr_scale.config.changes import flatten
from dtr_scale.config.load import parse_overrides, resolved, validate
from dtr_scale.jobs.plan.layout import Layout
from dtr_scale.jobs.plan.planner import Planner
from dtr_scale.jobs.plan.run_plan import RunPlan
from dtr_scale.jobs.trained import write_whole

_WORTH = 0.97
"""A change of settings has to make a step shorter by this: the model is no better than that."""
_WORTH_GOODPUT = 1e-3
_MUCH_EXCHANGED = 0.2
_MOST_AT_A_TIME = 128


class Advice(NamedTuple):
    """A setting to change, or a fact to know where `key` is None."""

    key: str | None
    value: Any
    reason: str

    def told(self) -> str:
        return f"--{self.key}={json.dumps(self.value)}: {self.reason}" if self.key else self.reason


class _Setting(NamedTuple):
    layout: Layout
    micro_batch_size: int
    checkpointing: bool
    seconds: float


def recommend(plan: RunPlan) -> list[Advice]:
    """Return what would make the run faster or safer, the weightiest first."""
    if plan.planner.as_released:
        return []
    return [*_speed(plan), *_safety(plan), *_scale(plan)]


def _speed(plan: RunPlan) -> Iterator[Advice]:
    planner, chosen = plan.planner, plan.chosen
    now = chosen.step.total
    best = min(_candidates(plan), key=lambda each: each.seconds, default=None)
    if best is None:
        yield Advice(
            None,
            None,
            f"no engine fits {planner.cluster.gpu.name}, not a sample at a time with activation "
            "checkpointing; take more or larger GPUs, or offload by engine.deepspeed_config",
        )
        return
    if chosen.fits and best.seconds > _WORTH * now:
        return
    gain = f"{now * 1e3:.1f} -> {best.seconds * 1e3:.1f} ms a step in all"
    if not chosen.fits:
        gain = f"{chosen.memory.total / 1e9:.1f} GB do not fit {planner.cluster.gpu.name}"
    changed = {
        **_engine_keys(best.layout.name),
        "train.micro_batch_size": best.micro_batch_size,
        "engine.activation_checkpointing": best.checkpointing,
    }
    is_now = flatten(resolved(plan.experiment))
    # More than a rank's share is as good as the share.
    is_now["train.micro_batch_size"] = planner.micro_batch_size
    for key, value in changed.items():
        if is_now[key] != value:
            yield Advice(key, value, gain)


def _engine_keys(name: str) -> dict[str, Any]:
    kind, _, stage = name.partition("-")
    if stage:
        return {"engine.type": "deepspeed", "engine.zero_stage": int(stage)}
    # `flat` refuses a higher stage, which is another engine's.
    return {"engine.type": kind, **({"engine.zero_stage": 1} if kind == "flat" else {})}


def _candidates(plan: RunPlan) -> Iterator[_Setting]:
    """Yield what fits, without recomputation if anything does."""
    planner = plan.planner
    names = dict.fromkeys([plan.chosen.layout.name, "flat", "fsdp2"])
    for checkpointing in (False, True):
        found = [s for name in names for s in _settings(planner, name, checkpointing)]
        yield from found
        if found:
            return


def _settings(planner: Planner, name: str, checkpointing: bool) -> Iterator[_Setting]:
    share = planner.rank_batch_size
    most = min(
        share, _MOST_AT_A_TIME, planner.largest_micro_batch(name, checkpointing=checkpointing)
    )
    largest = max((m for m in range(1, most + 1) if share % m == 0), default=None)
    if largest is None:
        return
    for micro in {largest, min(largest, planner.micro_batch_size)}:
        if share % micro == 0:
            layout = planner.layout(name, micro)
            step = planner.step(layout, checkpointing=checkpointing)
            yield _Setting(layout, micro, checkpointing, step.total)


def _safety(plan: RunPlan) -> Iterator[Advice]:
    own, best = plan.experiment.checkpoint.every_steps, plan.interval_steps
    before, after = plan.goodput(own), plan.goodput(best)
    if after - before > _WORTH_GOODPUT:
        reason = f"goodput {before:.2%} -> {after:.2%} (Young/Daly)"
        yield Advice("checkpoint.every_steps", best, reason)


def _scale(plan: RunPlan) -> Iterator[Advice]:
    step = plan.chosen.step
    if step.exposed > _MUCH_EXCHANGED * step.total:
        yield Advice(
            None,
            None,
            f"{step.exposed / step.total:.0%} of a step waits for exchanges: take fewer GPUs, or a "
            f"larger train.global_batch_size than {plan.experiment.train.global_batch_size}",
        )


def apply_advice(
    config: Path, overrides: Sequence[str], advice: Sequence[Advice], target: Path
) -> list[str]:
    """Write an experiment's file with overrides and advice in it; return the changed keys."""
    raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    changed = [(each.key, each.value) for each in advice if each.key]
    for key, value in [*parse_overrides(overrides), *changed]:
        *sections, last = key.split(".")
        node = raw
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    validate(raw, source=str(target))
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    write_whole(target, lambda file: file.write(text.encode()))
    return [key for key, _ in changed]
