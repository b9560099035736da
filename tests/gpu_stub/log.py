"""Read what the stub was asked for: launches, products, copies, exchanges and waits, in order."""

import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LAUNCHES = ("KERNEL", "TRITON", "GEMM", "COPY", "COPYWAIT", "MEMSET", "GRAPH")
"""What a capture takes up is CAPTURED, and launched with its graph."""
REDUCTIONS = ("all_reduce", "reduce_scatter")
LARGE = 2**16
"""Bytes of an exchange of gradients or weights; norms and losses are smaller."""
FAR = 100
"""Launches queued behind an event whose step the GPU has long done when the host waits for it."""


class Entry(NamedTuple):
    """One line of the log: its kind, the part of the step that it belongs to, and its words."""

    kind: str
    part: str
    words: tuple[str, ...]

    @property
    def is_wait(self) -> bool:
        """Whether the host stands still until the GPU has done what is queued."""
        if self.kind == "WAIT" and self.words[0] == "event":
            return int(self.words[1]) < FAR
        return self.kind in ("WAIT", "COPYWAIT") or "pageable" in self.words

    @property
    def is_exchange(self) -> bool:
        """Whether ranks exchange gradients or weights."""
        return self.kind == "NCCL" and self.num_bytes >= LARGE

    @property
    def is_reduction(self) -> bool:
        return self.is_exchange and self.words[1] in REDUCTIONS

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


def exchanged(entries: Iterable[Entry]) -> dict[str, int]:
    """Return the bytes of the whole tensors that ranks exchange, by operation."""
    found: Counter[str] = Counter()
    for entry in entries:
        if entry.is_exchange:
            found[entry.words[1]] += entry.num_bytes
    return dict(found)


def late_reductions(entries: list[Entry]) -> int:
    """Return how many reductions begin when the backward's last matrix product is queued."""
    last = max(
        place
        for place, entry in enumerate(entries)
        if entry.kind == "GEMM" and entry.part == "engine.backward"
    )
    return sum(entry.is_reduction for entry in entries[last:])


def summary(entries: Iterable[Entry]) -> str:
    """Return a table: how many entries of each kind each part of a step has."""
    counts: dict[str, Counter[str]] = {}
    for entry in entries:
        counts.setdefault(entry.part, Counter())[entry.kind] += 1
    return "\n".join(
        f"{part or 'start':24s}" + "  ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
        for part, kinds in counts.items()
    )
