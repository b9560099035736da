"""Charts: every run is told by its letter, and a frame shows what matters."""

import itertools
import re

import numpy as np

from dtr_scale.evaluation.comparison.curves import Curve
from dtr_scale.evaluation.comparison.plots import Chart, draw, new_figure
from dtr_scale.evaluation.comparison.vector import chart_svg

X = np.arange(1.0, 101.0)


def falling(run, end=0.1):
    return Curve(run, X, end + np.exp(-X / 3))


def drawn(chart):
    _, (ax,) = new_figure()
    draw(ax, chart)
    return ax


def test_a_frame_fits_what_follows_the_first_steps_and_no_spike():
    spiked = falling(0)
    spiked.y[60] = 50.0
    low, high = drawn(Chart("loss", [spiked, falling(1, 0.2)], late=True)).get_ylim()
    assert low < 0.1 and 0.2 < high < 0.5
    assert drawn(Chart("loss", [falling(0)])).get_ylim()[1] > 0.8


def test_letters_of_curves_that_end_together_do_not_cover_each_other():
    ax = drawn(Chart("loss", [falling(run, 0.1 + run * 1e-6) for run in range(5)]))
    ax.figure.canvas.draw()
    boxes = sorted((text.get_window_extent().y0, text.get_window_extent().y1) for text in ax.texts)
    assert [text.get_text() for text in ax.texts] == list("ABCDE")
    assert all(before[1] < after[0] + 2 for before, after in itertools.pairwise(boxes))


def test_a_curve_of_one_point_and_one_without_change_are_drawn():
    ax = drawn(Chart("fid", [Curve(0, np.array([5.0]), np.array([3.0]))], points=True))
    assert ax.lines[0].get_marker() == "o" and np.isfinite(ax.get_ylim()).all()
    drawn(Chart("loss", [Curve(0, X, np.zeros(100))], log=True))


def test_an_svg_takes_its_colours_from_the_page_and_shares_no_id():
    chart = Chart("Loss <1>", [falling(0), falling(1)._replace(deviation=X / 100)], spread=True)
    first, second = (chart_svg(chart, name, 'of "A" & B') for name in ("a", "b"))
    assert first.startswith("<svg ") and 'aria-label="of &quot;A&quot; &amp; B"' in first
    assert not re.findall(r"#[0-9a-f]{6}\b|http://(?!www\.w3\.org)", first)
    assert {"var(--run-0)", "var(--run-1)", "var(--ink)"} <= {*re.findall(r"var\(.*?\)", first)}
    assert 'class="run-1 spread"' in first and 'class="run-0"' in first
    ids = [set(re.findall(r'\bid="(.*?)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    used = set(re.findall(r'(?:href="#|url\(#)(.*?)[")]', first))
    assert used and used <= ids[0]
