"""Draw curves of runs by matplotlib: as SVG for the page, and as PNG."""

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.comparison.curves import Curve
from dtr_scale.evaluation.comparison.record import AXES, letters

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers, darkened where white needs it. The
# page has lighter ones for a dark background. Each goes with a dash, and each curve with a letter.
COLORS = ("#0072b2", "#c04f00", "#007a5a", "#a8478a", "#7a6a00", "#2f7fb8", "#5b5b5b", "#8c2d04")
_DASHES = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
INK, RULE = "#1d2228", "#d5dadf"
_PANEL = (3.7, 2.5)  # inches: read on a phone without zooming, two beside each other on a desk
_PNG_DPI = 150
_LINE = 0.17  # inches of height of a line below the panels
_MOST_MARKS = 20
EARLY_SHARE = 0.1
"""Part of a run whose high losses would press all later ones flat: the frame does not fit it."""
_SPIKES = 1.0  # percent of a curve's points that may leave the frame as well


class Chart(NamedTuple):
    """What is drawn in one frame."""

    title: str
    curves: Sequence[Curve]
    axis: str = "step"
    """One of AXES, or another name of what is drawn against."""
    unit: str = ""
    log: bool = False
    """Draw y by its logarithm, where all of it is above 0 and spans a decade."""
    late: bool = False
    """Fit the frame to what follows the first tenth of the steps, but for single spikes."""
    points: bool = False
    """Mark each point: there are few."""
    spread: bool = False
    """Draw the standard deviation around smoothed curves."""
    names: Sequence[str] = ()
    """What stands at the curves' ends, by `Curve.run`; default: the runs' letters."""
    bands: Sequence[float] = ()
    """Rising boundaries [K + 1] along the axis: what lies between two is shaded and numbered."""


class Mask(NamedTuple):
    """Which channels each timestep uses."""

    title: str
    used: np.ndarray
    """bool [T, C]."""


Drawing = Chart | Mask


def new_figure(
    rows: int = 1, columns: int = 1, *, fitted: bool = True
) -> tuple["Figure", list["Axes"]]:
    """Return a figure of panels, drawn without a display; `fitted` leaves no room unused."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise EvaluationError(
            "plots need matplotlib; install it with pip install 'dtr-scale[eval]'"
        ) from None
    # Without pyplot, which would look for a display and keep every figure in memory.
    size = (_PANEL[0] * columns, _PANEL[1] * rows)
    # To fit the panels, matplotlib draws everything twice.
    figure = Figure(figsize=size, layout="constrained" if fitted else None)
    if not fitted:
        figure.subplots_adjust(left=0.13, right=0.93, bottom=0.19, top=0.89)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def draw(ax: "Axes", chart: Drawing) -> None:
    """Draw a mask, or a chart's curves, each with its name at its end."""
    if isinstance(chart, Mask):
        _draw_mask(ax, chart)
        return
    for curve in chart.curves:
        _draw_curve(ax, curve, chart)
    _set_limits(ax, chart)
    _style(ax, chart)
    _draw_bands(ax, chart.bands)
    if chart.curves:
        _name_ends(ax, chart.curves, chart.names or letters(1 + max(c.run for c in chart.curves)))


def _draw_mask(ax: "Axes", mask: Mask) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    num_timesteps, num_channels = mask.used.shape
    idle, used = "#e8ecef", COLORS[0]
    ax.imshow(
        mask.used.T,
        cmap=ListedColormap([idle, used]),
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(0, num_timesteps, 0, num_channels),
        interpolation="nearest",
    )
    ax.set_title(mask.title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel("timestep", fontsize=9, color=INK)
    ax.set_ylabel("channel", fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    keys = [Patch(color=used, label="used"), Patch(color=idle, label="idle")]
    ax.legend(handles=keys, fontsize=8, loc="upper left", framealpha=0.9)


def _draw_curve(ax: "Axes", curve: Curve, chart: Chart) -> None:
    color, dash = COLORS[curve.run % len(COLORS)], _DASHES[curve.run % len(_DASHES)]
    # The group's name is the class by which the page hides a run, or all spreads.
    group = f"run-{curve.run}"
    if chart.spread and curve.deviation is not None:
        low, high = curve.y - curve.deviation, curve.y + curve.deviation
        band = ax.fill_between(curve.x, low, high, color=color, alpha=0.16, linewidth=0)
        band.set_gid(f"{group} spread")
    # Many marks would cover the dashes that tell the runs apart.
    few = chart.points and max(len(each.x) for each in chart.curves) <= _MOST_MARKS
    marker = "o" if few or len(curve.x) == 1 else None
    (line,) = ax.plot(
        curve.x, curve.y, color=color, linestyle=dash, linewidth=1.6, marker=marker, markersize=3.5
    )
    line.set_gid(group)


def _set_limits(ax: "Axes", chart: Chart) -> None:
    shown = [_late(curve) if chart.late else curve.y for curve in chart.curves]
    values = np.concatenate([y[np.isfinite(y)] for y in shown] or [np.zeros(0)])
    if not len(values):
        return
    low, high = float(values.min()), float(values.max())
    if chart.log and low > 0 and high > 10 * low:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.15, high * 1.15)
        _plain_numbers(ax)
    else:
        pad = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set_ylim(low - pad, high + pad)


def _plain_numbers(ax: "Axes") -> None:
    """Write 0.5 and 20 along a logarithmic axis, not 5 x 10^-1 and 2 x 10^1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _late(curve: Curve) -> np.ndarray:
    """Return y after the first part of a run, without its spikes; all of it if that is nothing."""
    late = curve.y[curve.x >= EARLY_SHARE * curve.x.max()]
    late = late[np.isfinite(late)]
    if len(late) < 2:
        return curve.y
    return np.clip(late, None, np.percentile(late, 100 - _SPIKES, method="lower"))


def _style(ax: "Axes", chart: Chart) -> None:
    from matplotlib.ticker import EngFormatter

    title = f"{chart.title}, {chart.unit}" if chart.unit else chart.title
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel(AXES.get(chart.axis, chart.axis), fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK, which="both")
    ax.grid(color=RULE, linewidth=0.6)
    for name, spine in ax.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(RULE)
    if ax.get_xlim()[1] >= 1000:
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.locator_params(axis="x", nbins=5)
    # Room for the letters at the ends.
    ax.margins(x=0.02)


def _draw_bands(ax: "Axes", boundaries: Sequence[float]) -> None:
    if not boundaries:
        return
    # Room for the numbers above the curve, by the axis's own scale.
    scale = ax.transScale + ax.transLimits
    ax.set_ylim(top=scale.inverted().transform((1.0, 1.1))[1])
    across = ax.get_xaxis_transform()  # x of the data, y of the frame
    for number, (low, high) in enumerate(pairwise(boundaries)):
        if number % 2:
            ax.axvspan(low, high, color=RULE, alpha=0.5, linewidth=0, zorder=0)
        middle = (low + high) / 2
        ax.text(middle, 0.98, str(number), transform=across, ha="center", va="top", fontsize=7)


def _name_ends(ax: "Axes", curves: Sequence[Curve], names: Sequence[str]) -> None:
    """Write each curve's name beside its end, without one covering another."""
    ends = [ax.transData.transform((curve.x[-1], curve.y[-1])) for curve in curves]
    order = sorted(range(len(curves)), key=lambda index: float(ends[index][1]))
    bottom, top = ax.transAxes.transform((0, 0))[1], ax.transAxes.transform((0, 1))[1]
    heights = _spread_out([float(ends[i][1]) for i in order], 10 * ax.figure.dpi / 72, bottom, top)
    for index, height in zip(order, heights, strict=True):
        curve = curves[index]
        text = ax.annotate(
            names[curve.run],
            (curve.x[-1], (height - bottom) / (top - bottom)),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=COLORS[curve.run % len(COLORS)],
            annotation_clip=False,
        )
        text.set_gid(f"run-{curve.run}")


def _spread_out(heights: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Return rising heights moved apart to at least `gap`, inside the frame if there is room."""
    placed: list[float] = []
    for height in heights:
        height = min(max(height, bottom), top)
        placed.append(max(height, placed[-1] + gap) if placed else height)
    limit = top
    for index in range(len(placed) - 1, -1, -1):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def drawings_png(drawings: Sequence[Drawing], below: str, columns: int = 1) -> bytes:
    """Return charts and masks as one PNG, `columns` beside each other, above some lines of text."""
    rows = math.ceil(len(drawings) / columns)
    figure, axes = new_figure(rows, min(columns, len(drawings)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LINE * len(below.splitlines()))
    for ax, drawing in zip(axes, drawings, strict=False):
        draw(ax, drawing)
    for ax in axes[len(drawings) :]:
        ax.set_axis_off()
    # Constrained layout leaves room for it.
    figure.supxlabel(below, fontsize=8, color=INK, x=0.02, ha="left", linespacing=1.4)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_PNG_DPI)
    return file.getvalue()


def figure_svg(figure: "Figure") -> str:
    """Return a figure as the text of an SVG file, its letters as text."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True)
    return file.getvalue()
