"""Read and insert nodes of a graph that is being compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def value(node: Node) -> torch.Tensor:
    """Return the fake tensor that stands for what a node computes."""
    return node.meta["val"]


def call(op: Callable[..., Any], node: Node, *args: Any, **kwargs: Any) -> Node:  # noqa: ANN401
    """Call an operator in the node's graph, where it is about to insert."""
    made = node.graph.call_function(op, (node, *args), kwargs)
    values = [value(x) if isinstance(x, Node) else x for x in args]
    made.meta["val"] = op(value(node), *values, **kwargs)
    return made
