"""Make the tables of a comparison, for a page and as text for a terminal."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtr_scale.evaluation.comparison.curves import last_common_step, mean_before
from dtr_scale.evaluation.comparison.record import LOSS, Evaluation, RunRecord, letters
from dtr_scale.evaluation.comparison.results import (
    Block,
    manifest_differences,
    not_comparable,
    protocol,
    result_blocks,
)
from dtr_scale.evaluation.comparison.settings import (
    Difference,
    loss_cautions,
    setting_differences,
)

_MOST_CHARACTERS = 40  # of a cell in a terminal
_TEXT_WIDTH = 100
_MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Cells under a header, with what is to be known of them."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    caution: str = ""
    """Why what stands side by side is not comparable as it stands."""
    faint: frozenset[int] = field(default_factory=frozenset)
    """Rows that matter less."""


def comparison_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the runs, their results, their losses and the settings in which they differ."""
    differences = setting_differences(runs)
    return [
        runs_table(runs),
        *_results_tables(runs),
        _loss_table(runs, loss_cautions(differences)),
        settings_table(runs, differences),
    ]


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Return how far each run is, a row each."""
    rows = []
    for letter, run in zip(letters(len(runs)), runs, strict=True):
        hours = run.column("gpu_hours")
        samples = run.column("samples_seen")
        rows.append(
            [
                letter,
                run.name,
                run.outcome or _MISSING,
                f"{run.step:,} of {run.max_steps:,}",
                _MISSING if samples is None else f"{samples[-1]:,.0f}",
                _MISSING if hours is None else number(float(hours[-1])),
                run.place,
            ]
        )
    header = ["", "name", "status", "step", "samples seen", "GPU hours", "from"]
    return Table("Runs", header, rows)


def settings_table(runs: Sequence[RunRecord], differences: Sequence[Difference]) -> Table:
    """Return the settings that differ, a row each."""
    rows = [[each.key, *(value or _MISSING for value in each.values)] for each in differences]
    faint = frozenset(index for index, each in enumerate(differences) if not each.matters)
    note = "" if rows else "All settings are the same."
    if faint and rows:
        note = "Faint rows tell how a run is run and looked at, not what is trained."
    return Table("Settings that differ", ["setting", *letters(len(runs))], rows, note, faint=faint)


def evaluations_table(runs: Sequence[RunRecord]) -> Table:
    """Return every evaluation of every run; the same number of a manifest is the same manifest."""
    manifests: list[dict[str, object]] = []
    rows = []
    for letter, run in zip(letters(len(runs)), runs, strict=True):
        for each in run.evaluations:
            of = protocol(each)
            if of not in manifests:
                manifests.append(of)
            told = ", ".join(f"{name} {number(value)}" for name, value in each.metrics.items())
            step = _MISSING if each.step is None else f"{each.step:,}"
            rows.append([letter, step, told, str(manifests.index(of) + 1), each.time])
    note = "Numbers are comparable where the number of their manifest is the same."
    return Table("All evaluations", ["run", "step", "numbers", "manifest", "time"], rows, note)


def _results_tables(runs: Sequence[RunRecord]) -> list[Table]:
    blocks = result_blocks(runs)
    comparable = [block for block in blocks if block.is_comparable]
    # What one manifest differs in from the others tells the tables apart.
    told = manifest_differences([next(filter(None, b.chosen)) for b in comparable])
    tables = []
    for block in blocks:
        manifest = ""
        if block.is_comparable:
            place = comparable.index(block)
            manifest = ", ".join(f"{key} {values[place]}" for key, values in told.items())
        tables.append(_results_table(block, len(runs), manifest))
    return tables


def _results_table(block: Block, num_runs: int, manifest: str) -> Table:
    with_change = block.is_comparable and block.is_of_one_step
    rows = [["step", *(_step(each) for each in block.chosen)]]
    for name in block.metrics:
        values = [each.metrics.get(name, math.nan) if each else math.nan for each in block.chosen]
        rows.append([name, *with_changes(values, told=with_change)])
    rows += [[key, *(v or _MISSING for v in values)] for key, values in block.differences.items()]
    notes = [f"Measured with {manifest}." if manifest else ""]
    notes.append("In brackets: against the first run." if with_change else "")
    notes.append("" if block.is_of_one_step else "The checkpoints are of different steps.")
    return Table(
        "Results under equal manifests" if block.is_comparable else "Results, manifests differ",
        ["", *letters(num_runs)],
        rows,
        " ".join(filter(None, notes)),
        "" if block.is_comparable else not_comparable("their manifests", block.differences),
        frozenset(range(1 + len(block.metrics), len(rows))),
    )


def _loss_table(runs: Sequence[RunRecord], cautions: Sequence[str]) -> Table:
    step = last_common_step(runs)
    values = [mean_before(run, LOSS, step) for run in runs]
    rows = [[f"loss at step {step:,}", *with_changes(values, told=not cautions)]]
    note = "Loss: the mean of mse + vb over the records before that step (2.5% of them)."
    caution = not_comparable("the runs", cautions) if cautions else ""
    return Table("Loss at the same step", ["", *letters(len(runs))], rows, note, caution)


def with_changes(values: Sequence[float], *, told: bool = True) -> list[str]:
    """Return numbers as text, with their change against the first one where that is `told`."""
    base = next((value for value in values if math.isfinite(value)), math.nan)
    cells, is_first = [], True
    for value in values:
        if not math.isfinite(value):
            cells.append(_MISSING)
            continue
        change = "" if is_first or not told or not base else f" ({value / base - 1:+.1%})"
        cells.append(number(value) + change)
        is_first = False
    return cells


def number(value: float) -> str:
    """Return a number with four digits that count."""
    if not math.isfinite(value):
        return _MISSING
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def table_text(table: Table) -> str:
    """Return a table as lines of text, its columns aligned."""
    lines = [table.title]
    if table.rows:
        cells = [[_cut(cell) for cell in row] for row in (table.header, *table.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
        lines += [
            "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
            for row in cells
        ]
    for told in (table.caution, table.note):
        lines += textwrap.wrap(told, _TEXT_WIDTH)
    return "\n".join(lines)


def _cut(cell: str) -> str:
    # The end of a path tells more than its beginning.
    return cell if len(cell) <= _MOST_CHARACTERS else f"…{cell[-_MOST_CHARACTERS + 1 :]}"


def _step(evaluation: Evaluation | None) -> str:
    if evaluation is None or evaluation.step is None:
        return _MISSING
    return f"{evaluation.step:,}"
