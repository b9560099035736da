"""Let the compiler sum bias gradients where it writes what is summed.

The gradient of a linear layer's bias is a sum over the tokens of all samples. Inductor makes it a
kernel of its own, which reads the gradient of the layer's output from memory again. The sum over
the tokens of one sample goes into the kernel that writes that gradient, as adaLN's do: what is
left is to add up the samples. For attention that kernel packs the gradients of q, k and v.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dtr_scale.engines.graph_nodes import VIEWS, call, value

aten = torch.ops.aten


class SumBySample(CustomGraphPass):
    """Sum the rows of [N * L, D], which were [N, L, ...], over L first and then over N."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            rows: Any = node.args[0]
            by_sample = _unflattened(rows)
            if node.args[1] == [0] and _is_rows_of(value(rows), value(by_sample)):
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_summed(by_sample, like=value(node)))
                graph.erase_node(node)

    def uuid(self) -> bytes:
        # Part of the key of what is compiled and kept.
        return get_hash_for_files((__file__,))


SUM_BY_SAMPLE = SumBySample()
"""One for all blocks: the compiler takes those with equal options for the same code."""


def _unflattened(node: Any) -> Node:  # noqa: ANN401
    # As what is summed was written: only loops over the same axes become one kernel.
    while node.target in VIEWS:
        node = node.args[0]
    return node


def _is_rows_of(rows: torch.Tensor, x: torch.Tensor) -> bool:
    # Of statically known shapes alone: to ask for others would specialise the graph.
    if rows.ndim != 2 or x.ndim < 3:
        return False
    return statically_known_true(rows.shape[0] == x.shape[0] * x.shape[1])


def _summed(x: Node, like: torch.Tensor) -> Node:
    """Return the sum of x [N, L, ...] over its first two axes, in the shape and dtype of `like`."""
    x, factor = _factored(x)
    # In fp32, as a sum within one kernel is.
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = call(aten.sum.dim_IntList, x, [1], True, dtype=dtype)
    if factor is not None:
        total = call(aten.mul.Tensor, total, factor)
    total = call(aten.sum.dim_IntList, total, [0, 1])
    total = call(torch.ops.prims.convert_element_type.default, total, like.dtype)
    # [D], or [1, D]; no length by its name, which a graph of any length would lack.
    return call(aten.view.default, total, [1] * (like.ndim - 1) + [-1])


def _factored(x: Node) -> tuple[Node, Node | None]:
    """Part x [N, L, D] * gate [N, 1, D]: the sum without the gate is one that is made anyway."""
    if x.target is aten.mul.Tensor:
        for part, gate in (x.args, x.args[::-1]):
            if isinstance(part, Node) and isinstance(gate, Node) and _is_gated(x, part, gate):
                return part, gate
    return x, None


def _is_gated(x: Node, part: Node, gate: Node) -> bool:
    whole, by_sample = value(part).shape == value(x).shape, value(gate)
    return whole and by_sample.ndim == 3 and statically_known_true(by_sample.shape[1] == 1)
