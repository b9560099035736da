"""Find the settings of an experiment that do not fit each other, across its sections."""

import json
from typing import TYPE_CHECKING

from dtr_scale.diffusion.schedule import space_timesteps
from dtr_scale.errors import ConfigError

if TYPE_CHECKING:
    from dtr_scale.config.schema import Experiment


def combination_problems(experiment: "Experiment") -> list[str]:
    """Return each problem as one line that names its keys, their values and the fix."""
    found = (
        # How many ranks there will be is not known here: `micro_batch_size` asks again.
        batch_problem(experiment, world_size=1),
        _lanes_problem(experiment),
        _clusters_problem(experiment),
        _intervals_problem(experiment),
        _steps_problem(experiment),
        _expert_problem(experiment),
        _channels_problem(experiment),
        _guidance_problem(experiment),
        _graphs_problem(experiment),
    )
    return [problem for problem in found if problem]


def batch_problem(experiment: "Experiment", world_size: int) -> str | None:
    """Say why the global batch cannot be cut over `world_size` ranks, None if it can."""
    batch_size, micro = experiment.train.global_batch_size, experiment.train.micro_batch_size
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        return (
            f"train.global_batch_size = {batch_size} is not divisible by {world_size} ranks; "
            f"choose a multiple of {world_size} or another number of ranks"
        )
    if share % min(micro, share):
        nearest = next(size for size in range(micro, 0, -1) if share % size == 0)
        return (
            f"train.micro_batch_size = {micro} does not divide the {share} samples per rank "
            f"(train.global_batch_size = {batch_size}, ranks: {world_size}); choose {nearest} "
            f"or another divisor of {share}"
        )
    return None


def _lanes_problem(experiment: "Experiment") -> str | None:
    num_lanes, batch_size = experiment.data.num_lanes, experiment.train.global_batch_size
    if batch_size % num_lanes == 0:
        return None
    return (
        f"data.num_lanes = {num_lanes} does not divide train.global_batch_size = "
        f"{batch_size}; choose a divisor of it"
    )


def _intervals_problem(experiment: "Experiment") -> str | None:
    model, num_timesteps = experiment.model, experiment.diffusion.num_timesteps
    if max(model.num_experts, model.routing.num_clusters) <= num_timesteps:
        return None
    return (
        f"model.num_experts = {model.num_experts} and model.routing.num_clusters = "
        f"{model.routing.num_clusters} share diffusion.num_timesteps = {num_timesteps}; "
        "choose at most that"
    )


def _steps_problem(experiment: "Experiment") -> str | None:
    """Say why sampling would fail when it is due, None if it would not."""
    steps, key = experiment.evaluation.num_sampling_steps, "evaluation.num_sampling_steps"
    try:
        # By the function that sampling uses: no second set of rules to keep in step.
        space_timesteps(experiment.diffusion.num_timesteps, steps, key)
    except ConfigError as error:
        return str(error)
    return None


def _expert_problem(experiment: "Experiment") -> str | None:
    expert, every_steps = experiment.model.expert, experiment.evaluation.every_steps
    if expert is None or not every_steps:
        return None
    return (
        f"evaluation.every_steps = {every_steps} with model.expert = {expert}: an expert alone "
        "cannot sample; set evaluation.every_steps=0 and sample when all are trained"
    )


def _channels_problem(experiment: "Experiment") -> str | None:
    channels, in_channels = experiment.evaluation.cfg_channels, experiment.model.in_channels
    if not channels or channels <= in_channels:
        return None
    return (
        f"evaluation.cfg_channels = {channels} exceeds model.in_channels = {in_channels}; choose "
        "at most that, or null for all"
    )


def _guidance_problem(experiment: "Experiment") -> str | None:
    model, scale = experiment.model, experiment.evaluation.cfg_scale
    if scale == 1.0 or (model.conditioning != "none" and model.class_dropout_prob):
        return None
    return (
        f"evaluation.cfg_scale = {scale} needs a network that knows the null label; set "
        "evaluation.cfg_scale=1, or train with model.conditioning=class and "
        "model.class_dropout_prob > 0"
    )


def _graphs_problem(experiment: "Experiment") -> str | None:
    """Say why a micro-step cannot be one CUDA graph, None if it can or need not."""
    model = experiment.model
    changing = None
    if model.num_experts > 1 and model.expert is None:
        changing = f"model.num_experts = {model.num_experts}: its parts of a batch differ in size"
    elif model.routing.type == "max_roaming":
        changing = "model.routing.type = 'max_roaming': its masks change with the step"
    if experiment.engine.cuda_graphs is not True or changing is None:
        return None
    return (
        f"engine.cuda_graphs = true repeats the kernels of one step, and {changing}; set "
        "engine.cuda_graphs=false"
    )


def _clusters_problem(experiment: "Experiment") -> str | None:
    """Say why the timesteps cannot be cut into the clusters asked for, None if they can."""
    objective, num_timesteps = experiment.objective, experiment.diffusion.num_timesteps
    if objective.num_clusters > num_timesteps:
        return (
            f"objective.num_clusters = {objective.num_clusters} exceeds "
            f"diffusion.num_timesteps = {num_timesteps}; choose at most {num_timesteps}"
        )
    if objective.type != "ant_uw" or objective.clusters != "gradient":
        return None
    if experiment.model.expert is not None:
        return (
            "objective.clusters = 'gradient' cuts all timesteps, model.expert = "
            f"{experiment.model.expert} trains an interval of them; choose 'timestep' or 'log_snr'"
        )
    given = objective.boundaries or []
    ascending = len(given) == objective.num_clusters + 1 and given == sorted(set(given))
    if ascending and (given[0], given[-1]) == (0, num_timesteps):
        return None
    return (
        f"objective.boundaries = {json.dumps(objective.boundaries)} do not fit "
        f"objective.clusters = 'gradient'; give objective.num_clusters + 1 = "
        f"{objective.num_clusters + 1} ascending whole numbers from 0 to "
        f"diffusion.num_timesteps = {num_timesteps}, as `dtr-scale affinity RUN_DIR` measures "
        "them"
    )
