"""Fit the weights of another training to a network that differs from its own.

What has the same name and shape is taken. Of a table of labels with other classes the row of no
class is, which guidance and unconditional networks need. The rest begins afresh.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from dtr_scale.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]

_TABLES = ("y_embedder.embedding_table.weight", "label_emb.weight")
_LEAST_SHARE = 0.5
"""Of the parameters. Where less is taken, the weights are of another kind of network."""


class Rows(NamedTuple):
    """Elements of a flat tensor that are taken, and where they begin there and here."""

    source: int
    target: int
    numel: int


@dataclass(frozen=True)
class Fit:
    """What a network takes of other weights, by the names of both."""

    taken: Mapping[str, Rows]
    fresh: tuple[str, ...]
    """Tensors of the network that begin as they were initialised, at least in part."""
    left: tuple[str, ...]
    """Tensors of the weights that the network has no use for."""
    share: float
    """Of the network's parameters that are taken."""

    @property
    def is_exact(self) -> bool:
        return not self.fresh and not self.left

    def lines(self) -> list[str]:
        """Return in words what was taken, begun afresh and left."""
        whole = [name for name in self.taken if name not in self.fresh]
        told = [f"taken: {named(whole)}; {self.share:.1%} of the parameters"]
        for name, rows in self.taken.items():
            if name in self.fresh:
                told.append(f"taken of {name}: the row of no class, {rows.numel} numbers")
        if self.fresh:
            told.append(f"begun afresh: {named(self.fresh)}")
        if self.left:
            told.append(f"left: {named(self.left)}")
        return told


def fit(
    source: Shapes,
    target: Shapes,
    *,
    source_has_null: bool,
    target_has_null: bool,
    is_unconditional: bool,
) -> Fit:
    """Return what a network with tensors `target` takes of weights with tensors `source`.

    `*_has_null` tell whether the last row of the label table stands for no class;
    `is_unconditional` that the network's table is one row for all. Raises ConfigError where less
    than half of the parameters would be taken.
    """
    taken: dict[str, Rows] = {}
    fresh: list[str] = []
    for name, shape in target.items():
        other, numel = source.get(name), prod(shape)
        is_table = name in _TABLES
        alike = not is_table or source_has_null == target_has_null
        # Flat: DeepSpeed's universal checkpoints of ZeRO-3.
        if other in (shape, (numel,)) and alike:
            taken[name] = Rows(0, 0, numel)
            continue
        fresh.append(name)
        keeps_null = is_table and source_has_null and (target_has_null or is_unconditional)
        if keeps_null and other and other[1:] == shape[1:]:
            taken[name] = Rows(prod(other) - shape[1], numel - shape[1], shape[1])
            if is_unconditional:
                fresh.pop()  # its only row
    left = tuple(name for name in source if name not in taken)
    # Masks are no parameters.
    learned = {name: shape for name, shape in target.items() if not name.startswith("routing.")}
    numel = sum(rows.numel for name, rows in taken.items() if name in learned)
    share = numel / sum(map(prod, learned.values()))
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"checkpoint.start_from does not fit the network: {share:.0%} of its parameters would "
            f"be taken; without a place there are {named(fresh)}; set model as it was there, but "
            "for classes, conditioning, image size and routing"
        )
    return Fit(taken, tuple(fresh), left, share)


def named(names: Iterable[str]) -> str:
    """Return names of tensors in words, those of all blocks as one."""
    counted = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    told = [f"{name} ({count})" if count > 1 else name for name, count in counted.items()]
    shown = told[:12]
    return ", ".join(shown) + (f" and {len(told) - 12} more" if len(told) > 12 else "") or "nothing"
