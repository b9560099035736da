"""Draw many pictures as one: near square, with names above its columns or pictures."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from dtr_scale.evaluation.pictures import to_uint8

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_LEAST_PIXELS = 64  # of a picture's height; smaller ones are enlarged by a whole number
_GAP = 2
_MOST_HEADS = 16  # columns that can have a name of their own
_SHOWN = 64  # pictures of a grid that may show any number of them, about
_MOST_ROWS, _MOST_HEIGHT = 8, 2048  # of such a grid; pixels of the samples themselves
_FONT_SIZES = 12, 16
_MOST_LINES = 2  # of a name
_INK, _PAPER = "#cdcdcd", "#303030"  # pictures with black edges are told apart
_LAST_DRAWN = 0x24F  # of Unicode: Pillow's own font has the Latin letters


class Titles(NamedTuple):
    """What the pictures of a grid are of."""

    of: Callable[[range], Sequence[str]]
    """Returns the names of given samples."""
    period: int = 0
    """After how many samples the names come again in the same order; 0: they do not."""


def named(names: Sequence[str]) -> Titles:
    """Return the titles of pictures that have these names."""
    return Titles(lambda indices: [names[index] for index in indices])


def class_title(label: int, class_names: Sequence[str]) -> str:
    """Return a class as a picture shows it: its number where no Latin name is known."""
    name = class_names[label] if label < len(class_names) else ""
    return name if name and all(ord(letter) <= _LAST_DRAWN for letter in name) else str(label)


def grid_columns(count: int, period: int = 0) -> int:
    """Return the columns of `count` pictures: near square, and whole periods if these are short."""
    side = max(1, math.ceil(math.sqrt(count)))
    if not 1 < period <= min(_MOST_HEADS, count):
        return side
    return period * max(1, round(side / period))


def num_shown(height: int, period: int = 0) -> int:
    """Return how many of any number of samples of `height` pixels a grid shows."""
    return grid_columns(_SHOWN, period) * max(1, min(_MOST_ROWS, _MOST_HEIGHT // height))


def save_grid(
    file: Path | BinaryIO,
    images: Tensor,
    *,
    titles: Titles | None = None,
    columns: int | None = None,
) -> None:
    """Write images [n, C, H, W] in [-1, 1] as `save_level_grid` does."""
    save_level_grid(file, to_uint8(images), titles=titles, columns=columns)


def save_level_grid(
    file: Path | BinaryIO,
    levels: Tensor,
    *,
    titles: Titles | None = None,
    columns: int | None = None,
    rows: Sequence[str] = (),
) -> None:
    """Write pictures uint8 [n, C, H, W], one or three channels, as one PNG, row by row.

    Small ones are enlarged to 64 pixels or more. Without `columns` it is near square. `titles` are
    written once above each column, or above all, where that says it, else above each picture. With
    names of `rows` there are as many rows, with these beside them.
    """
    from PIL import Image, ImageDraw

    count = len(levels)
    if columns is None:
        period = titles.period if titles else 0
        columns = count // len(rows) if rows else grid_columns(count, period)
    layout = _Layout(levels.shape[2:], count, columns, titles, rows)
    sheet = Image.new("L" if levels.shape[1] == 1 else "RGB", layout.size, _PAPER)
    for place, image in enumerate(levels):
        pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
        enlarged = pixels.repeat(layout.enlarged, 0).repeat(layout.enlarged, 1)
        sheet.paste(Image.fromarray(np.ascontiguousarray(enlarged)), layout.corner(place))
    layout.write_names(ImageDraw.Draw(sheet))
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, format="PNG")


class _Layout:
    """Where the pictures of a sheet lie, and their names."""

    def __init__(
        self,
        shape: Sequence[int],
        count: int,
        columns: int,
        titles: Titles | None,
        row_names: Sequence[str],
    ) -> None:
        height, width = shape
        self.enlarged = max(1, math.ceil(_LEAST_PIXELS / height))
        self.columns, self.rows = columns, -(-count // columns)
        self._cell = width * self.enlarged, height * self.enlarged
        self._font = _font(self._cell[0])
        self._row_names = row_names
        self._left = _GAP + (self._row_names_width() if row_names else 0)
        self._above_all, self._above_columns, self._above_pictures = self._titles(titles, count)
        self._top = self._height((self._above_all, *self._above_columns))
        self._row_top = self._height(self._above_pictures)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        width, height = self._cell
        return (
            self._left + self.columns * (width + _GAP),
            self._top + _GAP + self.rows * (self._row_top + height + _GAP),
        )

    def corner(self, place: int) -> tuple[int, int]:
        """Return where a picture's left upper corner lies."""
        row, column = divmod(place, self.columns)
        width, height = self._cell
        left = self._left + column * (width + _GAP)
        return left, self._top + _GAP + row * (self._row_top + height + _GAP) + self._row_top

    def write_names(self, draw: "ImageDraw") -> None:
        """Write all names onto the sheet."""
        width, height = self._cell
        if self._above_all:
            draw.multiline_text((self._left, _GAP), self._above_all, **self._style("la"))
        for column, name in enumerate(self._above_columns):
            at = self.corner(column)[0] + width / 2, self._top
            draw.multiline_text(at, name, **self._style("md"))
        for place, name in enumerate(self._above_pictures):
            left, top = self.corner(place)
            draw.multiline_text((left + width / 2, top - 1), name, **self._style("md"))
        for row, name in enumerate(self._row_names):
            at = self._left - 2 * _GAP, self.corner(row * self.columns)[1] + height / 2
            draw.text(at, name, fill=_INK, font=self._font, anchor="rm")

    def _style(self, anchor: str) -> dict[str, Any]:
        return {"fill": _INK, "font": self._font, "anchor": anchor, "align": "center", "spacing": 0}

    def _titles(self, titles: Titles | None, count: int) -> tuple[str, list[str], list[str]]:
        """Return the lines above all, above the columns, or above the pictures."""
        if titles is None:
            return "", [], []
        if titles.period == 1:
            width = self.columns * (self._cell[0] + _GAP)
            return self._lines(titles.of(range(1))[0], width), [], []
        # Of rows of their own, each shows the samples of the first.
        repeats = bool(self._row_names) or (titles.period and self.columns % titles.period == 0)
        if repeats or count <= self.columns:
            return "", self._in_cells(titles.of(range(min(count, self.columns)))), []
        return "", [], self._in_cells(titles.of(range(count)))

    def _in_cells(self, names: Sequence[str]) -> list[str]:
        return [self._lines(name, self._cell[0]) for name in names]

    def _lines(self, text: str, width: int) -> str:
        """Return a text in lines that are not wider than `width`; what does not fit is left out."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if not lines[-1] or self._font.getlength(longer) <= width:
                lines[-1] = longer
            elif len(lines) < _MOST_LINES:
                lines.append(word)
            else:
                lines[-1] = f"{longer}..."  # too long, and so cut
                break
        return "\n".join(self._cut(line, width) for line in lines)

    def _cut(self, line: str, width: int) -> str:
        if self._font.getlength(line) <= width:
            return line
        kept = line.removesuffix("...")
        while kept and self._font.getlength(f"{kept}...") > width:
            kept = kept[:-1]
        return f"{kept.rstrip()}..."

    def _row_names_width(self) -> int:
        return math.ceil(max(map(self._font.getlength, self._row_names))) + 3 * _GAP

    def _height(self, names: Sequence[str]) -> int:
        lines = max((name.count("\n") + 1 for name in names if name), default=0)
        return lines * sum(self._font.getmetrics()) + (_GAP if lines else 0)


def _font(width: int) -> "FreeTypeFont":
    """Return Pillow's own font, the same on every machine, as large as pictures have room for."""
    from PIL import ImageFont

    smallest, largest = _FONT_SIZES
    font = ImageFont.load_default(min(largest, max(smallest, width // 8)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font
