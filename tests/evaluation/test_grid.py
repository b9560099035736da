"""A grid shows every picture in its place, large enough to see, and what it is of."""

import numpy as np
import pytest
import torch
from PIL import Image

from dtr_scale.evaluation.grid import (
    Titles,
    class_title,
    grid_columns,
    named,
    num_shown,
    save_grid,
    save_level_grid,
)

NAMES = ("T-shirt", "Trouser", "Pullover", "a name that is far too long for its column")


def pictures(count: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    """Pictures of one bright level each, so that text is told from them."""
    return torch.linspace(0.2, 1, count).view(-1, 1, 1, 1).expand(-1, channels, size, size)


def shown(path):
    with Image.open(path) as picture:
        return np.asarray(picture).reshape(picture.height, picture.width, -1)


def is_drawn(pixels):
    """Tell whether there is anything but paper."""
    return (pixels != 0x30).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_in_its_place(tmp_path, channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, channels, 8, 8, generator=generator) * 2.4 - 1.2
    path = tmp_path / "new" / "grid"
    save_grid(path, images)

    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", {1: "L", 3: "RGB"}[channels])
    sheet = shown(path)
    assert sheet.shape[:2] == (2 * 66 + 2, 3 * 66 + 2), "three columns, two rows, enlarged to 64"
    expected = ((images.numpy().clip(-1, 1) + 1) * 127.5).round().transpose(0, 2, 3, 1)
    for i, image in enumerate(expected):
        row, column = divmod(i, 3)
        cell = sheet[row * 66 + 2 : row * 66 + 66, column * 66 + 2 : column * 66 + 66]
        np.testing.assert_array_equal(cell, image.repeat(8, 0).repeat(8, 1))
    assert not is_drawn(sheet[68:, 134:]), "no sixth"
    for gap in (0, 66, 132):
        assert not is_drawn(sheet[gap : gap + 2]) and not is_drawn(sheet[:, gap : gap + 2])


@pytest.mark.parametrize(("size", "pixels"), [(8, 64), (28, 84), (32, 64), (64, 64), (256, 256)])
def test_small_pictures_are_enlarged_by_whole_numbers(tmp_path, size, pixels):
    save_grid(tmp_path / "grid.png", torch.ones(1, 3, size, size))
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (pixels + 4, pixels + 4)


@pytest.mark.parametrize(
    ("count", "period", "columns"),
    [
        (64, 0, 8), (60, 0, 8), (5, 0, 3), (1, 0, 1), (64, 1, 8),
        (64, 2, 8), (64, 3, 9), (64, 10, 10), (100, 10, 10), (64, 16, 16), (500, 10, 20),
        (64, 1000, 8), (4, 10, 2),
    ],
)  # fmt: skip
def test_a_grid_is_near_square_and_of_whole_periods(count, period, columns):
    assert grid_columns(count, period) == columns


def test_of_any_number_of_samples_a_grid_shows_some():
    assert (num_shown(8), num_shown(8, 10), num_shown(256), num_shown(1024, 3)) == (64, 80, 64, 18)


def titled(tmp_path, count, titles, **options):
    """Return the sheet with titles, and how many rows of pixels it has more than without."""
    plain, path = tmp_path / "plain.png", tmp_path / "titled.png"
    save_grid(plain, pictures(count), columns=options.pop("columns", None), titles=None)
    save_grid(path, pictures(count), titles=titles, **options)
    sheet = shown(path)
    return sheet, len(sheet) - len(shown(plain))


def cycle(names):
    return Titles(lambda indices: [names[i % len(names)] for i in indices], len(names))


def test_columns_have_the_names_of_their_classes(tmp_path):
    sheet, more = titled(tmp_path, 64, cycle(NAMES))
    assert 20 < more < 50, "one or two lines above all columns"
    head = sheet[:more, :, 0]
    for column in range(8):
        assert is_drawn(head[:, column * 66 + 2 : column * 66 + 66]), "a name above each"
        assert not is_drawn(head[:, column * 66 : column * 66 + 2]), "and none is wider"
    np.testing.assert_array_equal(head[:, 2:264], head[:, 266:528])  # the same four names again
    assert not np.array_equal(head[:, 2:66], head[:, 68:132])


def test_many_classes_are_named_above_each_picture(tmp_path):
    titles = Titles(lambda indices: [f"class {i}" for i in indices], 1000)
    sheet, more = titled(tmp_path, 9, titles)
    assert more % 3 == 0 and 10 < more // 3 < 25
    row = more // 3 + 66
    for place in range(9):
        top, left = place // 3 * row + 2, place % 3 * 66 + 2
        assert is_drawn(sheet[top : top + more // 3, left : left + 64])
    first, second = sheet[2 : 2 + more // 3, :64], sheet[2 + row : 2 + row + more // 3, :64]
    assert not np.array_equal(first, second)


def test_one_text_stands_above_all(tmp_path):
    sheet, more = titled(tmp_path, 9, cycle(["a photograph of a red house beside the sea"]))
    assert 15 < more < 40
    assert is_drawn(sheet[:more, 100:130]), "across the columns"


def test_a_sheet_of_rows_names_each_row(tmp_path):
    levels = (pictures(6) * 255).to(torch.uint8)
    save_level_grid(tmp_path / "x.png", levels, titles=named(["a", "b"]), rows=["1", "1.5", "4"])
    sheet = shown(tmp_path / "x.png")
    left = sheet.shape[1] - 2 * 66
    assert left > 10 and len(sheet) > 3 * 66
    # The last pixel of each row's first picture, and its name beside it.
    top = len(sheet) - 3 * 66
    for row in range(3):
        picture = sheet[top + row * 66 : top + row * 66 + 64, left : left + 64]
        assert (picture == levels[2 * row].flatten()[0].item()).all()
        assert is_drawn(sheet[top + row * 66 : top + row * 66 + 64, : left - 2])


def test_a_class_without_a_latin_name_is_shown_by_its_number():
    assert [class_title(k, ("café", "猫", "")) for k in range(4)] == ["café", "1", "2", "3"]
