"""Let the compiler write attention's products in bf16 as a CPU computes them fastest.

Elsewhere, and in fp32, attention is a fused kernel.
"""

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dtr_scale.engines.graph_nodes import VIEWS, call, value

aten = torch.ops.aten


class TransposeBefore(CustomGraphPass):
    """Compute (A^T B)^T, of which nothing but the transpose is read, as B^T A.

    Scores are q k^T, so autograd makes the gradient of k^T, with its tokens as columns. It takes
    half as long again as that of k, and Inductor lays out those of q and v like it to join them.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
            left, right = node.args
            assert isinstance(left, Node)
            assert isinstance(right, Node)
            if _is_on_cpu(node) and _is_transposed(left) and _is_read_transposed(node):
                with graph.inserting_before(node):
                    product = call(aten.bmm.default, _transpose(right), _transpose(left))
                    node.replace_all_uses_with(_transpose(product))
                graph.erase_node(node)

    def uuid(self) -> bytes:
        # Part of the key of what is compiled and kept.
        return get_hash_for_files((__file__,))


TRANSPOSE_BEFORE = TransposeBefore()
"""One for all blocks: the compiler takes those with equal options for the same code."""


def _is_on_cpu(node: Node) -> bool:
    return value(node).device.type == "cpu" and value(node).dtype == torch.bfloat16


def _transpose(node: Node) -> Node:
    return call(aten.permute.default, node, [0, 2, 1])


def _is_transposed(node: Node) -> bool:
    return statically_known_true(value(node).stride(-2) == 1)


def _is_read_transposed(node: Node) -> bool:
    """Tell whether each reader of a node, through views of its batches, swaps its last two axes."""
    return bool(node.users) and all(
        _is_read_transposed(user)
        if user.target in VIEWS and _keeps_matrices(node, user)
        else _swaps_last_axes(user)
        for user in node.users
    )


def _keeps_matrices(node: Node, view: Node) -> bool:
    sizes = zip(value(node).shape[-2:], value(view).shape[-2:], strict=True)
    return all(statically_known_true(before == after) for before, after in sizes)


def _swaps_last_axes(node: Node) -> bool:
    if node.target is not aten.permute.default:
        return False
    axes = value(node).ndim
    return node.args[1] == [*range(axes - 2), axes - 1, axes - 2]
