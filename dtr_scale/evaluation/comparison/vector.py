"""Make figures part of a web page: SVG whose colours, fonts and classes the page decides."""

import re
from html import escape

from dtr_scale.evaluation.comparison.plots import (
    COLORS,
    INK,
    RULE,
    Chart,
    draw,
    figure_svg,
    new_figure,
)

_VARIABLES = {color: f"var(--run-{index})" for index, color in enumerate(COLORS)}
_VARIABLES |= {INK: "var(--ink)", RULE: "var(--rule)"}
_GROUP = re.compile(r'id="((?:run-\d+)(?: spread)?)"')
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def chart_svg(chart: Chart, name: str, description: str) -> str:
    """Return a chart as an `<svg>` to put into a page, with a description for who cannot see it.

    `name` is the chart's own in the page.
    """
    figure, (ax,) = new_figure(fitted=False)
    draw(ax, chart)
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(description)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return opening + _for_a_page(figure_svg(figure), name)


def _for_a_page(svg: str, name: str) -> str:
    """Return what is inside the `<svg>` of a file, with the page's colours, font and classes."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # matplotlib's style is of `*`: inside a page it would be everything's.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r'\sd="[^"]*"', _shorter_path, svg)
    # A run's curve, spread and letter are of its class, by which the page hides them.
    svg = _GROUP.sub(r'class="\1"', svg)
    # Two figures of one page must not have the same ids: clips and markers are found by them.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font-family:[^;\"]*|font: ([^;\"]*?px) [^;\"]*", _page_font, svg)
    return svg[svg.index(">") + 1 :]


def _shorter(number: re.Match[str]) -> str:
    # A tenth of a point is less than a screen shows.
    return f"{float(number[0]):.1f}"


def _shorter_path(path: re.Match[str]) -> str:
    return _NUMBER.sub(_shorter, path[0]).replace("\n", " ")


def _page_font(found: re.Match[str]) -> str:
    return f"font: {found[1]} var(--font)" if found[1] else "font-family: var(--font)"
