"""Show the plan of a run on a terminal."""

from collections.abc import Iterator, Sequence

from dtr_scale.jobs.plan.gpus import GB, TERA
from dtr_scale.jobs.plan.memory import FRAGMENTATION
from dtr_scale.jobs.plan.recommend import Advice
from dtr_scale.jobs.plan.run_plan import EnginePlan, RunPlan

_MS, _HOUR, _DAY = 1e3, 3600, 86400
_PARTS = {"weights": 9, "gradients": 11, "optimizer": 11, "ema": 7, "buffers": 9, "activations": 13}
"""Columns by their widths."""


def run_table(plan: RunPlan, advice: Sequence[Advice]) -> str:
    """Return a plan as lines for a terminal."""
    lines = [*_head(plan), "", *_memory(plan), "", *_step(plan), "", *_run(plan), *_storage(plan)]
    if advice:
        lines += ["", "recommended", *(f"  {each.told()}" for each in advice)]
    return "\n".join(lines)


def _head(plan: RunPlan) -> Iterator[str]:
    experiment, planner, compute = plan.experiment, plan.planner, plan.compute
    total = compute.forward.total
    train, layout = experiment.train, plan.chosen.layout
    yield _row(
        "network",
        f"{experiment.model.title}, {total.num_parameters / 1e6:.2f} M parameters, one forward "
        f"{total.macs / 1e9:.2f} GMACs",
    )
    yield _row(
        "run",
        f"{train.max_steps:,} steps of {train.global_batch_size:,}: "
        f"{train.max_steps * train.global_batch_size:,} images, {compute.training_flops:.2e} FLOPs",
    )
    compiled = "compiled" if planner.compiles(layout) else "not compiled"
    checkpointed = ", activation checkpointing" if planner.checkpointing else ""
    yield _row(
        "on",
        f"{plan.cluster.title}, {layout.name}, {layout.precision}, {compiled}{checkpointed}, "
        f"micro-batch {planner.micro_batch_size} x {layout.grad_accum_steps}",
    )


def _memory(plan: RunPlan) -> Iterator[str]:
    names = "".join(f"{name:>{width}}" for name, width in _PARTS.items())
    yield f"{'GB of a GPU':11}{names}{'total':>8}{'fits':>6}{'largest':>9}{'ms/step':>9}"
    for each in plan.engines:
        yield _engine_row(each, is_chosen=each is plan.chosen)
    context = plan.chosen.memory.context / GB
    yield (
        f"total: {FRAGMENTATION - 1:.0%} for fragmentation and {context:.0f} GB for CUDA and NCCL "
        f"with it, of {plan.cluster.gpu.memory_gb:.1f}; largest: the micro-batch that fits"
    )
    kept, again = plan.activations[False] / GB, plan.activations[True] / GB
    yield f"activations: {kept:.2f} GB kept, {again:.2f} GB with activation checkpointing"


def _engine_row(plan: EnginePlan, *, is_chosen: bool) -> str:
    numbers = "".join(
        f"{getattr(plan.memory, part) / GB:{width}.2f}" for part, width in _PARTS.items()
    )
    name = f"{'*' if is_chosen else ' '} {plan.layout.name}"
    return (
        f"{name:11}{numbers}{plan.memory.total / GB:8.2f}{'yes' if plan.fits else 'NO':>6}"
        f"{plan.largest_micro_batch:>9}{plan.step.total * _MS:9.1f}"
    )


def _step(plan: RunPlan) -> Iterator[str]:
    step, planner = plan.chosen.step, plan.planner
    forward, backward = planner.micro_step(plan.chosen.layout)
    for name, seconds, part in (
        ("forward", step.forward, forward),
        ("backward", step.backward, backward),
    ):
        scale = seconds / part.total
        shares = ", ".join(
            f"{label} {getattr(part, label) * scale * _MS:.1f}"
            for label in ("products", "attention", "pointwise", "host")
            if getattr(part, label)
        )
        yield _row(name, f"{seconds * _MS:8.1f} ms: {shares}")
    if step.vae:
        yield _row("VAE", f"{step.vae * _MS:8.1f} ms to encode the pictures")
    yield _row("update", f"{step.update * _MS:8.1f} ms with the averages")
    if step.exchanges:
        told = ", ".join(
            f"{each.name} {each.num_bytes / GB:.2f} GB in {each.seconds * _MS:.1f} ms"
            for each in step.exchanges
        )
        yield _row("exchange", f"{step.exposed * _MS:8.1f} ms not hidden; of a GPU: {told}")
    flops = plan.flops_per_gpu / TERA
    nominal = plan.cluster.gpu.bf16_tflops
    told = f"{step.total * _MS:8.1f} ms, {1 / step.total:.2f} steps/s, "
    images = plan.experiment.train.global_batch_size / step.total
    how = "modelled" if planner.factor == 1 else f"measured: {planner.factor:.2f} x the model"
    yield _row(
        "step",
        f"{told}{images:,.0f} images/s, {flops:.0f} TFLOP/s a GPU ({flops / nominal:.0%} of bf16's "
        f"{nominal:.0f}); {how}",
    )


def _run(plan: RunPlan) -> Iterator[str]:
    every, failures = plan.experiment.checkpoint.every_steps, plan.failures
    told = f"{plan.wall_seconds / _DAY:.2f} days, {plan.gpu_hours:,.0f} GPU hours"
    if plan.cost is not None:
        told += f", {plan.cost:,.0f} at {plan.terms.price:g} a GPU hour"
    yield _row("time", f"{told} ({plan.seconds / _DAY:.2f} days without failures)")
    yield _row(
        "goodput",
        f"{plan.goodput(every):.2%} at checkpoint.every_steps = {every:,}; "
        f"{plan.goodput(plan.interval_steps):.2%} at {plan.interval_steps:,} "
        f"({plan.interval_steps * plan.chosen.step.total / 60:.1f} minutes, Young/Daly)",
    )
    yield _row(
        "failures",
        f"one in {failures.seconds_between / _HOUR:,.1f} h, {failures.restart_seconds:.0f} s to go "
        f"on; a save stalls {failures.stall_seconds * _MS:.0f} ms and is written in "
        f"{failures.write_seconds:.1f} s",
    )


def _storage(plan: RunPlan) -> Iterator[str]:
    storage = plan.storage
    yield _row(
        "checkpoints",
        f"{storage.checkpoint / GB:.2f} GB each, {storage.num_checkpoints} at the end: "
        f"{storage.checkpoints / GB:.0f} GB; copies in host memory {plan.snapshot / GB:.1f} GB a "
        "node",
    )
    if storage.shards is not None and storage.num_samples is not None:
        data = f"{storage.num_samples:,} samples, {storage.shards / GB:.2f} GB"
    else:
        data = (
            f"{storage.sample / 1e3:.1f} kB a sample: {storage.sample * 1e6 / GB:.1f} GB a million"
        )
    rate = plan.experiment.train.global_batch_size * storage.sample / plan.chosen.step.total
    yield _row(
        "data",
        f"{data}; {rate / plan.cluster.nodes / 1e6:.0f} MB/s a node, {storage.windows / GB:.1f} GB "
        f"of windows and at most {storage.cache / GB:.0f} GB of cache there, "
        f"{storage.shared_memory / 1e6:.0f} MB of /dev/shm",
    )


def _row(name: str, told: str) -> str:
    return f"{name:12}{told}"
