"""Draw matrices between timesteps as heat maps."""

import math
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from dtr_scale.errors import EvaluationError

_PANEL_INCHES, _PICTURE_INCHES = 1.9, 4.0  # of a panel, and of a picture's panels together
_PANELS_WIDE = 1.6  # columns per row of panels


def save_heatmaps(
    file: BinaryIO,
    matrices: np.ndarray,
    timesteps: Sequence[int],
    *,
    titles: Sequence[str],
    label: str,
    limits: tuple[float, float] = (0.0, 1.0),
    boundaries: Sequence[int] = (),
) -> None:
    """Write matrices [B, S, S] between S rising timesteps as one PNG, a panel each.

    All panels share one scale of colours, from `limits`, named `label`; timesteps rise to the
    right and upwards, as in the DTR paper's figure 6. Lines are drawn at `boundaries`, the first
    timesteps of clusters. Raises EvaluationError where matplotlib is
    not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise EvaluationError(
            "heat maps need matplotlib; install it with pip install 'dtr-scale[eval]'"
        ) from None
    rows = max(1, round(math.sqrt(len(matrices) / _PANELS_WIDE)))
    columns = -(-len(matrices) // rows)
    inches = max(_PANEL_INCHES, _PICTURE_INCHES / columns)
    # Without pyplot, which would look for a display and keep every figure in memory.
    figure = Figure(figsize=(inches * columns + 1, inches * rows + 0.6), layout="compressed")
    FigureCanvasAgg(figure)
    scale = Normalize(*limits)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, matrix, title in zip(axes, matrices, titles, strict=False):
        ax.pcolormesh(timesteps, timesteps, matrix, norm=scale)
        for boundary in boundaries:
            # Between two timesteps, whose cells are centred on them.
            ax.axvline(boundary - 0.5, color="white", linewidth=0.8)
            ax.axhline(boundary - 0.5, color="white", linewidth=0.8)
        ax.set_title(title, fontsize=9)
        ax.set_aspect("equal")
        ax.tick_params(labelsize=8)
        ax.locator_params(nbins=4)
    for ax in axes[len(matrices) - columns : len(matrices)]:
        ax.tick_params(labelbottom=True)  # also above the gap of a last row that is not full
    for ax in axes[len(matrices) :]:
        ax.set_axis_off()
    figure.supxlabel("timestep", fontsize=10)
    figure.supylabel("timestep", fontsize=10)
    colors = ScalarMappable(scale)
    figure.colorbar(colors, ax=axes, label=label, fraction=0.05, aspect=20 * rows)
    figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
