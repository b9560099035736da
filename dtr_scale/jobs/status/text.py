"""Show how runs stand: one run on a screen, several as a table."""

from collections.abc import Sequence

from dtr_scale.jobs.status.state import RunStatus, Saved
from dtr_scale.tracking.attempts import Attempt
from dtr_scale.tracking.goodput import WallTime

_BAR = 30
_MOST_ATTEMPTS = 8
_REASON_CHARACTERS = 60


def status_text(runs: Sequence[RunStatus]) -> str:
    """Return a screen for one run, a table for several."""
    text = _screen(runs[0]) if len(runs) == 1 else _table(runs)
    # Names and reasons come from files that others may write: none of them steers the terminal.
    return "\n".join(_printable(line) for line in text.split("\n"))


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def duration(seconds: float) -> str:
    """Return a time in its two largest units.

    >>> duration(42.4), duration(3 * 60 + 5), duration(26 * 3600)
    ('42 s', '3 min 05 s', '1 d 02 h')
    """
    whole = round(seconds)
    for large, small, unit, part in (
        (86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")
    ):  # fmt: skip
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small:02d} {part}"
    return f"{whole} s"


def _screen(run: RunStatus) -> str:
    lines = [f"{run.name}  {run.place}", _line("state", _state(run)), _line("step", _progress(run))]
    if run.record:
        lines.append(_line("loss", _loss(run)))
        lines.append(_line("speed", _speed(run)))
    if "slowest_rank" in run.record:
        lines.append(_line("ranks", _ranks(run)))
    if run.saved:
        lines.append(_line("checkpoint", _checkpoint(run.saved)))
    if run.evaluation:
        figures = [f"{key} {value:.4g}" for key, value in run.evaluation.metrics.items()]
        told = f"step {run.evaluation.step:,}: {', '.join(figures[:4])}"
        lines.append(_line("evaluation", told))
    if run.wall:
        lines.append(_line("goodput", _goodput(run.wall)))
    if run.attempts:
        lines += ["", "attempts", *_attempts(run)]
    if run.problems:
        lines += ["", "what is wrong", *(f"  {problem}" for problem in run.problems)]
    return "\n".join(lines)


def _line(name: str, told: str) -> str:
    return f"  {name:<11} {told}"


def _state(run: RunStatus) -> str:
    told = run.state + (f": {run.reason}" if run.reason else "")
    if run.holder and run.holder.is_alive is not False:
        told += f"  (pid {run.holder.pid} on {run.holder.host})"
    return told


def _progress(run: RunStatus) -> str:
    if not run.max_steps:
        return f"{run.step:,}"
    done = min(1.0, run.step / run.max_steps)
    bar = "#" * int(done * _BAR)
    told = f"{run.step:,} of {run.max_steps:,}  [{bar:<{_BAR}}] {done:.1%}"
    return told + (f"  {duration(run.eta_seconds)} left" if run.eta_seconds is not None else "")


def _loss(run: RunStatus) -> str:
    told = f"{run.record['loss']:.4f}" if "loss" in run.record else "?"
    if (mean := run.record.get("loss_mean")) is not None:
        told = f"{mean:.4f}, of the last step {told}"
    age = run.record_age_seconds
    return told + (f"  ({duration(age)} ago)" if age is not None else "")


def _speed(run: RunStatus) -> str:
    shown = (
        ("samples_per_second", "{:,.1f} samples/s"),
        ("step_seconds", "{:.3g} s a step"),
        ("data_wait_fraction", "data wait {:.0%}"),
        ("checkpoint_stall_seconds", "saves stall {:.2g} s"),
        ("tflops", "{:.4g} TFLOP/s"),
        ("mfu", "MFU {:.1%}"),
        ("memory_gb", "{:.1f} GB"),
        ("power_watts", "{:.0f} W"),
    )
    return "  ".join(form.format(run.record[key]) for key, form in shown if key in run.record)


def _ranks(run: RunStatus) -> str:
    rank, slowest = run.record["slowest_rank"], run.record.get("slowest_rank_seconds", 0.0)
    median = run.record.get("median_rank_seconds", 0.0)
    return (
        f"the slowest is {rank:.0f} with {slowest:.3g} s a step of its own, median {median:.3g} s"
    )


def _checkpoint(saved: Saved) -> str:
    age = "" if saved.age_seconds is None else f", {duration(saved.age_seconds)} ago"
    return f"step {saved.step:,}{age}  {saved.url}"


def _goodput(wall: WallTime) -> str:
    parts = [(wall.lost, "steps lost"), (wall.between, "between attempts")]
    parts.append((wall.other, "starts, evaluations, other"))
    told = ", ".join(f"{what} {part / (wall.total or 1):.1%}" for part, what in parts)
    return f"{wall.goodput:.1%} of {duration(wall.total)}; {told}"


def _attempts(run: RunStatus) -> list[str]:
    rows = list(zip(run.attempts, run.times, strict=True))
    shown = [
        _attempt(number, attempt, time)
        for number, (attempt, time) in enumerate(rows, 1)
        if number > len(rows) - _MOST_ATTEMPTS
    ]
    earlier = len(rows) - len(shown)
    return [f"  {earlier} earlier"] * bool(earlier) + shown


def _attempt(number: int, attempt: Attempt, time: WallTime) -> str:
    end = "..." if attempt.end_step is None else f"{attempt.end_step:,}"
    outcome = attempt.outcome or "goes on"
    told = f"{outcome}: {attempt.reason}" if attempt.reason else outcome
    begin = attempt.begin.astimezone().strftime("%Y-%m-%d %H:%M")
    return (
        f"  {number:>3}  {begin}  {duration(time.total):>11}  {attempt.step:>9,} to {end:<9} "
        f" goodput {time.goodput:>6.1%}  {told[:_REASON_CHARACTERS]}"
    )


def _table(runs: Sequence[RunStatus]) -> str:
    head = ("run", "state", "step", "done", "left", "loss", "samples/s", "wait", "saved", "goodput")
    rows = [head, *((_title(run, runs), *_row(run)) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}", f"{row[1]:<{widths[1]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    for run in runs:
        told = [*([run.reason] if run.reason and run.state != "finished" else []), *run.problems]
        lines += [f"{_title(run, runs)}: {line}" for line in told]
    return "\n".join(lines)


def _title(run: RunStatus, runs: Sequence[RunStatus]) -> str:
    """Return a run's name, its place where that of another is the same."""
    return run.place if sum(other.name == run.name for other in runs) > 1 else run.name


def _row(run: RunStatus) -> tuple[str, ...]:
    record, saved = run.record, run.saved
    loss = record.get("loss_mean", record.get("loss"))
    age = saved.age_seconds if saved else None
    return (
        run.state,
        f"{run.step:,}",
        f"{run.step / run.max_steps:.0%}" if run.max_steps else "",
        duration(run.eta_seconds) if run.eta_seconds is not None else "",
        f"{loss:.4f}" if loss is not None else "",
        f"{record['samples_per_second']:,.0f}" if "samples_per_second" in record else "",
        f"{record['data_wait_fraction']:.0%}" if "data_wait_fraction" in record else "",
        f"{duration(age)} ago" if age is not None else "",
        f"{run.wall.goodput:.1%}" if run.wall else "",
    )
