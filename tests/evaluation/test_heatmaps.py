"""Heat maps are pictures in which every matrix is to be seen, in the colours of one scale."""

import io
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.heatmaps import save_heatmaps

TIMESTEPS = [0, 250, 500, 750, 999]


def draw(values, limits=(0.0, 1.0), **options):
    """Save a panel of one colour for each value; return the picture's pixels, uint8 [H, W, 3]."""
    matrices = np.stack([np.full((5, 5), value) for value in values])
    titles = [f"block {i}" for i in range(len(values))]
    file = io.BytesIO()
    options |= {"titles": titles, "label": "linear CKA", "limits": limits}
    save_heatmaps(file, matrices, TIMESTEPS, **options)
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def area(pixels, fraction):
    """Return about how many pixels have the colour at a fraction of the scale."""
    color = np.array(colormaps["viridis"](fraction))[:3] * 255
    return 16 * int((np.abs(pixels[::4, ::4] - color).max(axis=-1) <= 1).sum())


@pytest.mark.parametrize("depth", [1, 3, 5, 12, 28])
def test_every_block_has_a_panel(depth):
    values = (np.arange(depth) + 0.5) / depth
    pixels = draw(values)
    areas = [area(pixels, value) for value in values]
    assert min(areas) > 200**2 and max(areas) < 1.3 * min(areas)
    height, width, _ = pixels.shape
    assert width > height and width < 2400
    edges = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
    assert (edges == 255).all()  # nothing is cut off


def test_colours_follow_the_limits():
    pixels = draw([0.0], limits=(-1.0, 1.0))
    assert area(pixels, 0.5) > 200**2 > area(pixels, 0.0)


def test_clusters_are_told_apart_by_lines():
    plain, cut = draw([0.5]), draw([0.5], boundaries=[400, 700])
    changed = (cut != plain).any(-1)
    for lines in (changed.mean(0) > 0.5, changed.mean(1) > 0.5):
        assert 2 <= lines.sum() <= 8, "two lines of a pixel or two"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvaluationError, match=r"pip install 'dtr-scale\[eval\]'"):
        draw([0.0])
