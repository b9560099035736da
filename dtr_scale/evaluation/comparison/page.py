"""Write a comparison as one HTML file that needs nothing else, and its plots as PNGs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dtr_scale import __version__
from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.comparison.charts import (
    ChartSet,
    Panels,
    cluster_panels,
    result_charts,
    speed_charts,
)
from dtr_scale.evaluation.comparison.curves import MOST_POINTS
from dtr_scale.evaluation.comparison.grids import Picture, embed, noise_note, shared_steps
from dtr_scale.evaluation.comparison.plots import COLORS, EARLY_SHARE, Chart, drawings_png
from dtr_scale.evaluation.comparison.record import AXES, RunRecord, letters
from dtr_scale.evaluation.comparison.tables import (
    Table,
    comparison_tables,
    evaluations_table,
    number,
)
from dtr_scale.evaluation.comparison.vector import chart_svg

_VALUES_SHOWN = 6  # of a curve, in the table below it


class ChartFigure(NamedTuple):
    """A chart as the page shows it."""

    title: str
    svgs: dict[str, str]
    """By axis."""
    caution: str
    values: Table


def comparison_files(runs: Sequence[RunRecord]) -> dict[str, bytes]:
    """Return the files of a comparison by name: index.html, and PNGs of its plots."""
    sets, speeds, panels = result_charts(runs), speed_charts(runs), cluster_panels(runs)
    named = zip(letters(len(runs)), runs, strict=True)
    names = "\n".join(f"{letter}  {run.name}" for letter, run in named)
    files = {"index.html": _page(runs, sets, speeds, panels).encode()}
    for each in (*sets, *speeds):
        files[f"{each.name}.png"] = drawings_png(_without_spread(each.charts[:1]), names)
    for each in panels:
        charts = [of_cluster.charts[0] for of_cluster in each.sets]
        files[f"{each.name}.png"] = drawings_png(_without_spread(charts), names, columns=4)
    return files


def _page(
    runs: Sequence[RunRecord],
    sets: Sequence[ChartSet],
    speeds: Sequence[ChartSet],
    panels: Sequence[Panels],
) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError:
        raise EvaluationError(
            "the page needs jinja2; install it with pip install 'dtr-scale[eval]'"
        ) from None
    environment = Environment(
        loader=PackageLoader("dtr_scale.evaluation", "comparison"),
        # Names, paths and settings are anybody's text.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = letters(len(runs))
    note, is_caution = noise_note(runs)
    first, *results, settings = comparison_tables(runs)
    return environment.get_template("page.html").render(
        version=__version__,
        runs=list(zip(names, runs, strict=True)),
        num_colors=len(COLORS),
        runs_table=first,
        results=results,
        settings=settings,
        evaluations=evaluations_table(runs),
        axes=AXES,
        figures=[_figure(runs, each) for each in sets],
        speeds=[_figure(runs, each) for each in speeds],
        panels=[(each, [_figure(runs, of) for of in each.sets]) for each in panels],
        has_spread=any(chart.spread for each in sets for chart in each.charts),
        grids=list(_grids(runs)),
        noise_note=note,
        noise_differs=is_caution,
        most_rows=max(len(run.journal["step"]) for run in runs),
        most_points=MOST_POINTS,
        early=f"{EARLY_SHARE:.0%}",
    )


def _figure(runs: Sequence[RunRecord], each: ChartSet) -> ChartFigure:
    title = each.charts[0].title
    svgs = {
        chart.axis: chart_svg(chart, f"{each.name}-{chart.axis}", _description(runs, chart))
        for chart in each.charts
    }
    return ChartFigure(title, svgs, each.caution, _values(runs, each.charts[0]))


def _description(runs: Sequence[RunRecord], chart: Chart) -> str:
    """Return what a chart shows, for who cannot see it."""
    names = letters(len(runs))
    ends = "; ".join(
        f"{names[curve.run]} ({runs[curve.run].name}) ends at {number(float(curve.y[-1]))}"
        for curve in chart.curves
    )
    return f"{chart.title} against {AXES[chart.axis]}: {ends}."


def _values(runs: Sequence[RunRecord], chart: Chart) -> Table:
    """Return a chart's curves as numbers at steps that all of them have reached."""
    import numpy as np

    last = min(float(curve.x[-1]) for curve in chart.curves)
    points = np.linspace(0, last, _VALUES_SHOWN + 1)[1:]
    names = letters(len(runs))
    rows = [
        [f"{x:,.0f}", *(number(float(np.interp(x, c.x, c.y))) for c in chart.curves)]
        for x in points
    ]
    return Table(chart.title, ["step", *(names[curve.run] for curve in chart.curves)], rows)


def _grids(
    runs: Sequence[RunRecord],
) -> Iterator[tuple[int, list[tuple[str, RunRecord, Picture | None]]]]:
    for step in shared_steps(runs):
        pictures = []
        for letter, run in zip(letters(len(runs)), runs, strict=True):
            read = run.grids.get(step)
            pictures.append((letter, run, embed(read()) if read else None))
        yield step, pictures


def _without_spread(charts: Sequence[Chart]) -> list[Any]:
    # On paper nobody can turn it off, and the bands of several runs cover each other.
    return [chart._replace(spread=False) for chart in charts]
