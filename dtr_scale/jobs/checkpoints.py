"""Look into checkpoints: describe one, check all of a run, tell two apart."""

from collections.abc import Iterator

from dtr_scale.checkpoint.inspection import (
    describe,
    differences,
    find_checkpoint,
    find_checkpoints,
    listing,
    verify,
)
from dtr_scale.config.changes import changes
from dtr_scale.config.load import load_experiment, resolved
from dtr_scale.errors import DamagedCheckpointError


def inspect_checkpoint(place: str, config: str | None = None) -> str:
    """Return what a checkpoint holds, and what differs from the experiment in `config`, as text."""
    reader = find_checkpoint(place)
    lines = [describe(reader)]
    if config:
        found = changes(reader.meta["config"], resolved(load_experiment(config)), reader.url)
        lines += ["", f"against {config}", *(str(change) for change in found)]
        if not found:
            lines.append("no difference")
    return "\n".join(lines)


def list_checkpoints(place: str) -> Iterator[str]:
    """Yield a line for each checkpoint of a run, newest first."""
    yield from listing(place)


def verify_checkpoints(place: str) -> Iterator[tuple[str, bool]]:
    """Read every byte of a checkpoint, or of all that a run has kept, newest first.

    Yields lines to print, each with whether what it tells of is as it was written. A checkpoint
    that would be passed over at a start is damaged.
    """
    for checkpoint in find_checkpoints(place):
        try:
            reader = checkpoint.open()
        except DamagedCheckpointError as error:
            yield f"{error}: damaged", False
            continue
        damaged = 0
        for name, problem in verify(reader):
            damaged += problem is not None
            yield f"{name}: {problem or 'ok'}", problem is None
        verdict = f"{damaged} damaged" if damaged else "complete and as written"
        yield f"{reader.url}: {verdict}", not damaged


def diff_checkpoints(a: str, b: str) -> Iterator[str]:
    """Yield what differs between two checkpoints, a line each."""
    first, second = find_checkpoint(a), find_checkpoint(b)
    told, kinds = differences(first, second)
    yield from told
    for change in changes(first.meta["config"], second.meta["config"], source=first.url):
        yield str(change)
    for kind in kinds:
        yield (
            f"{kind.kind}: {kind.differing} of {kind.total} tensors differ, relative "
            f"{kind.relative:.3g}, at most {kind.largest:.3g} {kind.largest_in}".rstrip()
        )
