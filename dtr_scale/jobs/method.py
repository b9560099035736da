"""Draw the method of a run over its timesteps: masks, clusters, and weights of the loss."""

import numpy as np
import torch

from dtr_scale.config.schema import Experiment
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.evaluation.comparison.charts import LOG_VAR, cluster_numbers
from dtr_scale.evaluation.comparison.curves import Curve
from dtr_scale.evaluation.comparison.plots import Chart, Drawing, Mask
from dtr_scale.evaluation.comparison.record import RunRecord
from dtr_scale.jobs.build import build_diffusion, build_timesteps
from dtr_scale.models.build import build_network
from dtr_scale.models.routing import Routing, routing_mask
from dtr_scale.objectives.weighting import loss_weight

_MOST_MASKS = 3
_FOUND = {
    "timestep": "Clusters of equal size",
    "log_snr": "Clusters of equal log SNR",
    "gradient": "Clusters of alike gradients",
}


def method_drawings(experiment: Experiment, run: RunRecord) -> dict[str, Drawing]:
    """Return drawings of what each timestep gets, by name; those of nothing are left out."""
    diffusion = build_diffusion(experiment)
    boundaries = build_timesteps(experiment, diffusion).boundaries
    drawings: dict[str, Drawing] = dict(_masks(experiment, run))
    if experiment.objective.type == "ant_uw":
        drawings["boundaries"] = _clusters(experiment, diffusion, boundaries)
    if (weights := _weights(experiment, run, diffusion, boundaries)) is not None:
        drawings["loss_weights"] = weights
    return drawings


def _clusters(
    experiment: Experiment, diffusion: GaussianDiffusion, boundaries: np.ndarray
) -> Chart:
    """Return the clusters of timesteps on the log-SNR, as they were found."""
    t = np.arange(diffusion.num_timesteps)
    # A schedule may end without any signal, where the logarithm is none.
    log_snr = np.log(diffusion.snr(torch.from_numpy(t)).double().numpy().clip(1e-12))
    return Chart(
        _FOUND[experiment.objective.clusters],
        [Curve(0, t.astype(float), log_snr)],
        axis="timestep",
        unit="log SNR",
        names=[""],
        bands=boundaries.tolist(),
    )


def _weights(
    experiment: Experiment, run: RunRecord, diffusion: GaussianDiffusion, boundaries: np.ndarray
) -> Chart | None:
    """Return the weight of the squared error at each timestep; None where all weigh the same."""
    objective = experiment.objective
    chart = Chart("Loss weights", [], axis="timestep", log=True, names=[""])
    if objective.type == "vanilla":
        return None
    if objective.type != "ant_uw":
        t = torch.arange(diffusion.num_timesteps)
        snr = diffusion.snr(t).double()
        weight = loss_weight(objective.type, snr, gamma=objective.gamma, k=objective.k)
        return chart._replace(
            curves=[Curve(0, t.double().numpy(), weight.numpy())], unit=objective.type
        )
    numbers = cluster_numbers([run], LOG_VAR)
    columns = [run.column(f"{LOG_VAR}_{k}") for k in numbers]
    if len(columns) != len(boundaries) - 1 or any(column is None for column in columns):
        return None
    log_vars = [column[np.isfinite(column)][-1] for column in columns if column is not None]
    # Both ends of each cluster: a line with corners, not slopes between middles.
    weight = np.exp(-np.array(log_vars)).repeat(2)
    edges = np.repeat(boundaries, 2)[1:-1].astype(float)
    return chart._replace(
        curves=[Curve(0, edges, weight)],
        unit=f"exp(-s_k) at step {run.step:,}",
        bands=boundaries.tolist(),
    )


def _masks(experiment: Experiment, run: RunRecord) -> dict[str, Mask]:
    """Return the masks of the first block of each width; {} without routing."""
    routing = experiment.model.routing
    if routing.type == "none":
        return {}
    masks: dict[str, Mask] = {}
    for width, block in _first_blocks(experiment)[:_MOST_MASKS]:
        mask = routing_mask(
            routing.type,
            experiment.diffusion.num_timesteps,
            width,
            routing.alpha,
            routing.beta,
            seed=routing.seed,
            block=block,
            # Those of the last step that was made: it had this number when it began.
            step=max(run.step - 1, 0),
            update_every_steps=routing.update_every_steps,
            num_clusters=routing.num_clusters,
        )
        name = "routing" if not masks else f"routing_{width}"
        masks[name] = Mask(f"Routing {routing.type}, block {block}: {width} channels", mask.numpy())
    return masks


def _first_blocks(experiment: Experiment) -> list[tuple[int, int]]:
    """Return each width of routed blocks with the first block that has it."""
    with torch.device("meta"):
        network = build_network(
            **experiment.model.model_dump(), num_timesteps=experiment.diffusion.num_timesteps
        )
    found: dict[int, int] = {}
    for module in network.modules():
        if isinstance(module, Routing):
            for block, width in zip(module.blocks, module.widths, strict=True):
                found.setdefault(width, block)
    return list(found.items())
