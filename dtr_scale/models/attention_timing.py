"""Time the ways to compute attention at the shapes of a network."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dtr_scale.models.attention import attention, obstacle
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import MultiExperts

WARMUPS, REPEATS = 3, 10


class AttentionShape(NamedTuple):
    """The shape of one layer's attention, but for the samples."""

    heads: int
    head_dim: int
    queries: int
    keys: int


def attention_shapes(network: Denoiser, x: Tensor, t: Tensor, y: Tensor) -> Counter[AttentionShape]:
    """Return how many layers of each shape `network(x, t, y)` has, all on the meta device.

    Of multi-experts, the one that a sample goes to.
    """
    first = network.experts[0] if isinstance(network, MultiExperts) else network
    with torch.no_grad(), _Calls() as calls:
        first(x, t, y, 0)
    return calls.shapes


def layer_inputs(
    shape: AttentionShape, num_samples: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Draw what a layer's projections make, one [N, tokens, parts, heads, head_dim] each.

    In self-attention one of three parts; with a text one of queries, and one of keys and values.
    """

    def drawn(tokens: int, parts: int) -> Tensor:
        size = (num_samples, tokens, parts, shape.heads, shape.head_dim)
        return torch.randn(size, dtype=dtype, device=device).requires_grad_()

    if shape.queries == shape.keys:
        return [drawn(shape.queries, 3)]
    return [drawn(shape.queries, 1), drawn(shape.keys, 2)]


def queries_keys_values(inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v as layers have them: what one projection makes lies side by side."""
    q, k, v = (part for x in inputs for part in x.unbind(2))
    return q, k, v


class _Calls(TorchFunctionMode):
    """Notes the shapes of PyTorch's attention, which computes it on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[AttentionShape] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        if func is scaled_dot_product_attention:
            _, heads, queries, head_dim = args[0].shape
            self.shapes[AttentionShape(heads, head_dim, queries, args[1].shape[2])] += 1
        return func(*args, **(kwargs or {}))


class Timings(NamedTuple):
    """Milliseconds of forward and backward of all layers by backend, and what cannot be timed."""

    milliseconds: dict[str, float]
    obstacles: dict[str, str]

    @property
    def fastest(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


def time_attention(
    backends: Iterable[str],
    shapes: Counter[AttentionShape],
    *,
    num_samples: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Timings:
    """Time all attention of a network's forward and backward by each of the backends."""
    timings = Timings({}, {})
    heads = {(shape.heads, shape.head_dim) for shape in shapes}
    for backend in backends:
        if reason := obstacle(backend, device, heads):
            timings.obstacles[backend] = reason
            continue
        timings.milliseconds[backend] = sum(
            number * _median_milliseconds(shape, backend, num_samples, dtype, device)
            for shape, number in shapes.items()
        )
    return timings


def _median_milliseconds(
    shape: AttentionShape, backend: str, num_samples: int, dtype: torch.dtype, device: torch.device
) -> float:
    q, k, v = queries_keys_values(layer_inputs(shape, num_samples, dtype, device))
    gradient = torch.randn_like(q)

    def step() -> None:
        torch.autograd.grad(attention(q, k, v, backend), (q, k, v), gradient)

    with torch.enable_grad():
        for _ in range(WARMUPS):
            step()
        return statistics.median(_milliseconds(step, device) for _ in range(REPEATS))


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
