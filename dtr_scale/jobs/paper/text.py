"""Print the rows of a table: the paper's figures, ours, and what makes them differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

from dtr_scale.jobs.paper.collect import Cell, Standing, Training, differences_between, gpu_hours
from dtr_scale.jobs.paper.tables import Part, Row, Table

_LABEL_WIDTH = 34


class FoundRow(NamedTuple):
    """A row of the paper with what is there of it."""

    row: Row
    trainings: Sequence[Training]
    standings: Sequence[Standing]
    cells: Sequence[Cell]

    @property
    def is_trained(self) -> bool:
        return all(each.state == "finished" for each in self.standings)

    @property
    def hours(self) -> tuple[float, bool]:
        """A100 hours of all trainings, and whether some are estimated."""
        each = [gpu_hours(training) for training in self.trainings]
        return sum(hours for hours, _ in each), any(estimated for _, estimated in each)


class FoundPart(NamedTuple):
    part: Part
    rows: Sequence[FoundRow]


def table_text(table: Table, parts: Sequence[FoundPart]) -> str:
    """Return a table as text, with what differs between the paper's figures and ours below it."""
    notes = _Notes()
    lines = [table.title, ""]
    for each in parts:
        lines += [*_part_lines(each, notes), ""]
    hours, is_estimate = total_hours(parts)
    left, _ = total_hours(parts, left=True)
    about = "about " if is_estimate else ""
    lines.append(f"{about}{hours:,.0f} A100 hours, {left:,.0f} of them left")
    if table.note:
        lines.append(table.note)
    return "\n".join([*lines, *notes.lines()]).rstrip()


class _Notes:
    """Footnotes, a letter for each text."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def letter(self, text: str) -> str:
        if text not in self._letters:
            first, second = divmod(len(self._letters), len(ascii_lowercase))
            self._letters[text] = (ascii_lowercase[first - 1] if first else "") + (
                ascii_lowercase[second]
            )
        return self._letters[text]

    def lines(self) -> list[str]:
        return ["", *(f"{letter}  {text}" for text, letter in self._letters.items())]


def _part_lines(each: FoundPart, notes: _Notes) -> Iterator[str]:
    columns = each.part.columns
    titles = "  ".join(f"{column.title:>17}" for column in columns)
    yield f"{each.part.title:{_LABEL_WIDTH}}{titles}  {'A100 h':>8}  run"
    yield f"{'':{_LABEL_WIDTH}}" + "  ".join(f"{'paper':>8} {'ours':>8}" for _ in columns)
    for found in each.rows:
        cells = "  ".join(_cell_text(c, notes) for c in found.cells)
        hours, is_estimate = found.hours
        about = "~" if is_estimate else ""
        marks = [notes.letter(found.row.note)] if found.row.note else []
        marks += [notes.letter(d) for s in found.standings for d in s.differences]
        marked = f" [{', '.join(dict.fromkeys(marks))}]" if marks else ""
        told = f"{about}{hours:,.0f}"
        yield f"{found.row.label:{_LABEL_WIDTH}}{cells}  {told:>8}  {_states(found)}{marked}"
    for key, values in differences_between(manifests_of(each)).items():
        shown = "; ".join(f"{label}: {_short(value)}" for label, value in values.items())
        yield f"  rows differ in {key}: {shown}"


def _states(found: FoundRow) -> str:
    told = [each.told() for each in found.standings]
    names = [training.experiment.name for training in found.trainings]
    if len(set(told)) == 1:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]}{more}: {told[0]}"
    return "; ".join(f"{name}: {each}" for name, each in zip(names, told, strict=True))


def _cell_text(each: Cell, notes: _Notes) -> str:
    marks = "".join(
        notes.letter(f"{key}: the paper's {_short(paper)}, ours {_short(ours)}")
        for key, (paper, ours) in each.differences.items()
    )
    return f"{_number(each.paper):>8} {_number(each.ours) + marks:>8}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(value: Any) -> str:  # noqa: ANN401
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def manifests_of(each: FoundPart) -> dict[str, Mapping[str, Any]]:
    """Return a manifest of each row that has one."""
    return {
        found.row.label: next(c.manifest for c in found.cells if c.manifest)
        for found in each.rows
        if any(c.manifest for c in found.cells)
    }


def all_trainings(
    parts: Sequence[FoundPart],
) -> Iterator[tuple[FoundRow, Training, Standing]]:
    """Yield every training of every row."""
    for part in parts:
        for found in part.rows:
            for training, each in zip(found.trainings, found.standings, strict=True):
                yield found, training, each


def identity(training: Training) -> tuple[str, int | None]:
    """Return what two rows share that ask for the same training, if of different lengths."""
    return training.experiment.name, training.experiment.model.expert


def total_hours(parts: Sequence[FoundPart], *, left: bool = False) -> tuple[float, bool]:
    """Return the hours of all trainings, each once, or of what is left of them."""
    hours: dict[tuple[str, int | None], float] = {}
    is_estimate = False
    for _, training, each in all_trainings(parts):
        all_hours, estimated = gpu_hours(training)
        is_estimate |= estimated
        todo = max(0.0, 1 - each.step / each.max_steps) if left else 1.0
        # Of a training that rows ask for twice, the longer one.
        key = identity(training)
        hours[key] = max(hours.get(key, 0.0), all_hours * todo)
    return sum(hours.values()), is_estimate
