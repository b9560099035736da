"""Use runs and experiments from Python: what `dtr_scale` itself offers."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from dtr_scale.config.load import load_experiment, resolved, validate
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.pictures import to_uint8
from dtr_scale.evaluation.precision import one_thread, products_in, resolve_precision
from dtr_scale.jobs import trained
from dtr_scale.jobs.averages import Choice
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.compute import ComputePlan, plan_compute
from dtr_scale.jobs.plan.gpus import find_gpu
from dtr_scale.jobs.plan.run_plan import RunPlan, Terms, plan_run
from dtr_scale.jobs.sample import decoder_of_run, seeded
from dtr_scale.jobs.sampling import build_sampler
from dtr_scale.jobs.trained import TrainedRun


def load_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    ema: str | float | None = None,
    sigma_rel: float | None = None,
    device: str | torch.device | None = None,
    overrides: Sequence[str] = (),
) -> TrainedRun:
    """Return what a run has trained: its `network`, its `experiment`, its `step`.

    The weights are the average that samples are drawn with, of the newest whole checkpoint. `step`
    is another checkpoint's; `ema` another decay that was kept, or "none" for the weights
    themselves; `sigma_rel` makes a power-function average of that width. `device` is by default
    a GPU, if there is one. `overrides` are as on the command line: ["--evaluation.cfg_scale=2"].
    Raises ConfigError for what the run does not have, CheckpointError where no checkpoint is whole.
    """
    choice = Choice(ema if ema is None else f"{ema}", sigma_rel, step)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return trained.load_run(Path(run_dir), overrides, choice, World(0, 0, 1, place))


def sample(
    run: TrainedRun | str | Path,
    num_samples: int = 16,
    *,
    classes: Sequence[str | int] = (),
    prompts: Sequence[str] = (),
    seed: int | None = None,
    vae: str | None = None,
    decode: bool = True,
    **evaluation: Any,  # noqa: ANN401
) -> Tensor:
    """Return samples 0 to `num_samples` of a run as pictures, uint8 [n, C, H, W] on the CPU.

    They are those of `dtr-scale sample`, by the same batches. `classes` (names or numbers) or, for
    models of text, `prompts` are drawn in turn; `seed` is that of the noise; `vae` decodes latents
    where what encoded the data is not here. Without `decode` it is x_start, fp32. Other arguments
    are keys of `evaluation`: cfg_scale=4, sampler="ddim", num_sampling_steps=50, batch_size=16.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples = {num_samples} is not accepted; give 1 or more")
    run = run if isinstance(run, TrainedRun) else load_run(run)
    run = seeded(run._replace(experiment=_changed(run.experiment, evaluation)), seed)
    experiment, device = run.experiment, next(run.network.parameters()).device
    decoder = decoder_of_run(run, vae, device, needed=True) if decode else None
    wanted = Wanted(tuple(map(str, classes)), tuple(prompts))
    conditions = conditions_of(experiment, wanted, device)
    precision = resolve_precision(experiment.evaluation.precision, device)
    sampler = build_sampler(
        experiment,
        # It is cast and compiled in place; the caller's stays as it was.
        copy.deepcopy(run.network),
        device,
        conditions=conditions.of_samples,
        null_condition=conditions.null,
        step=run.mask_step,
    )
    found: list[Tensor] = []
    size = experiment.evaluation.batch_size
    with products_in(precision, device), one_thread(device):
        for first in range(0, num_samples, size):
            # Whole batches, cut afterwards: a product's rounding depends on its rows.
            x_start = sampler.draw(range(first, first + size))[: num_samples - first]
            found.append(x_start if decoder is None else to_uint8(decoder.decode(x_start)))
    return torch.cat(found)


@overload
def plan(
    config: Experiment | str | Path, overrides: Sequence[str] = (), *, gpu: None = None
) -> ComputePlan: ...
@overload
def plan(
    config: Experiment | str | Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str,
    gpus: int = 8,
    nodes: int = 1,
    price: float | None = None,
) -> RunPlan: ...
def plan(
    config: Experiment | str | Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    gpus: int = 8,
    nodes: int = 1,
    price: float | None = None,
) -> ComputePlan | RunPlan:
    """Return what an experiment will take; nothing is allocated.

    `config` is its file, `overrides` as on the command line. Its arithmetic: `training_flops`,
    `forward` by layer, `table()`. With a `gpu` such as "a100-80gb", as many in each of `nodes`, its
    memory, time and money as well: `chosen.memory`, `wall_seconds`, `cost` by the `price` of a GPU
    and hour, `figures()`.
    """
    if not isinstance(config, Experiment):
        config = load_experiment(config, overrides)
    if gpu is None:
        return plan_compute(config)
    cluster = Cluster(find_gpu(gpu), gpus, nodes)
    config.micro_batch_size(cluster.world_size)  # refuses a batch that ranks cannot share
    return plan_run(config, cluster, Terms(price=price))


def _changed(experiment: Experiment, evaluation: dict[str, Any]) -> Experiment:
    """Return an experiment with other keys of evaluation, checked as those of a file."""
    if not evaluation:
        return experiment
    raw = resolved(experiment)
    return validate(raw | {"evaluation": raw["evaluation"] | evaluation}, "sample()")
