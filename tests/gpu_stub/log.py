"""Read what the stub was asked for: launches, products, copies, exchanges and waits, in order."""

import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

LAUNCHES = ("KERNEL", "TRITON", "GEMM", "COPY", "COPYWAIT", "MEMSET")


class Entry(NamedTuple):
    """One line of the log: its kind, the part of the step that it belongs to, and its words."""

    kind: str
    part: str
    words: tuple[str, ...]

    @property
    def is_wait(self) -> bool:
        """Whether the host stands still until the GPU has done what is queued."""
        return self.kind in ("WAIT", "COPYWAIT") or "pageable" in self.words

    @property
    def num_bytes(self) -> int:
        """Of a copy or an exchange."""
        return int(self.words[-1])


def read_log(path: Path | str) -> list[Entry]:
    """Return the entries of a log, with the kernels' names as C++ has them."""
    text = subprocess.run(
        ["c++filt"], input=Path(path).read_text(), check=True, capture_output=True, text=True
    ).stdout
    entries, part = [], ""
    for line in text.splitlines():
        kind, *words = line.split(" ")
        if kind == "MARK":
            part = words[0]
        else:
            entries.append(Entry(kind, part, tuple(words)))
    return entries


def launches(entries: Iterable[Entry], part: str | None = None) -> int:
    """Return how often the host has given the GPU something to compute or to copy."""
    return sum(e.kind in LAUNCHES and part in (None, e.part) for e in entries)


def summary(entries: Iterable[Entry], of: Callable[[Entry], bool] = lambda e: True) -> str:
    """Return a table: how many entries of each kind each part of a step has."""
    counts: dict[str, Counter[str]] = {}
    for entry in filter(of, entries):
        counts.setdefault(entry.part, Counter())[entry.kind] += 1
    return "\n".join(
        f"{part or 'start':12s} " + "  ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        for part, kinds in counts.items()
    )
