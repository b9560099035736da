"""Record the kernels and the memory of a training step on the meta device, computing nothing.

The network's own forward and backward run, so every shape and every operation is the real one, of
any network. Attention is recorded as one fused kernel, as it runs on a GPU.
"""

# ruff: noqa: ANN401 - torch gives a mode anything.
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.freeze import frozen_names
from dtr_scale.engines.wrap import checkpoint_activations
from dtr_scale.jobs.plan.compute import meta_network

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_NO_KERNEL = ("empty", "_unsafe_view", "new_empty", "empty_like", "new_empty_strided")


class Operand(NamedTuple):
    """A storage that an operation reads or writes."""

    storage: int
    num_bytes: int


@dataclass(frozen=True)
class Operation:
    """One kernel of eager PyTorch."""

    name: str
    kind: str
    """product, attention or pointwise, which stands for reductions, too."""
    flops: int
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]

    @property
    def num_bytes(self) -> int:
        return sum(operand.num_bytes for operand in (*self.reads, *self.writes))


@dataclass
class Trace:
    """A forward and a backward of one micro-batch."""

    micro_batch_size: int
    num_parameters: int
    num_trained: int
    """All but those of `train.freeze`."""
    block_parameters: list[int]
    forward: list[Operation] = field(default_factory=list)
    backward: list[Operation] = field(default_factory=list)
    saved: dict[int, int] = field(default_factory=dict)
    """Bytes by storage of what the forward keeps for the backward, weights left out."""
    peak_bytes: int = 0
    """Most that activations and what is computed from them take, without parameters' gradients."""
    curve: list[tuple[int, int]] = field(default_factory=list)
    """After each operation: bytes of activations, and of the parameters' gradients so far."""

    @property
    def num_blocks(self) -> int:
        return len(self.block_parameters)

    @property
    def saved_bytes(self) -> int:
        return sum(self.saved.values())


def trace_step(
    experiment: Experiment,
    micro_batch_size: int,
    *,
    precision: str,
    checkpointing: bool = False,
) -> Trace:
    """Return the trace of one micro-step of an experiment's network.

    `precision`: "bf16" by bf16 weights, "autocast" by fp32 weights that are cast in every forward,
    "fp32". `checkpointing` records what is recomputed in the backward as a part of it.
    """
    with torch.device("meta"):
        network, x, t, y = meta_network(experiment)
        x, t, y = (torch.empty(micro_batch_size, *o.shape[1:], dtype=o.dtype) for o in (x, t, y))
    for name in frozen_names(network, experiment.train.freeze):
        network.get_parameter(name).requires_grad_(False)
    blocks = network.routed_blocks()
    if precision == "bf16":
        network.to(torch.bfloat16)
    if checkpointing:
        checkpoint_activations(blocks)
    counts = _count(network), _count(network, trained=True), [_count(block) for block in blocks]
    trace = Trace(micro_batch_size, *counts)
    recorder = _Recorder(network, trace)
    with recorder.recording(autocasts=precision == "autocast"):
        loss = network(x, t, y, 0).float().sum()
        recorder.phase = trace.backward
        # Not `loss.backward()`, inside of which no mode would see what is recomputed.
        torch.autograd.backward(loss)
    return trace


class _Recorder(TorchDispatchMode):
    """Writes down every operation, and which storages live when."""

    def __init__(self, network: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.phase = trace.forward
        self._trace = trace
        self._serial = itertools.count()
        self._ids: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._live = 0
        self._parameters = list(network.parameters())
        self._gradients: set[int] = set()
        # What is there before the step is no activation.
        self._state = {self._storage(t) for t in (*self._parameters, *network.buffers())}
        self._live = 0
        for parameter in filter(lambda p: p.requires_grad, self._parameters):
            parameter.register_post_accumulate_grad_hook(self._gradient_is_there)

    @contextmanager
    def recording(self, *, autocasts: bool) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_OnGpu(self.is_state if autocasts else None))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, lambda t: t))
            stack.enter_context(self)
            yield

    def is_state(self, tensor: Tensor) -> None:
        """Count a tensor among what is there besides activations, whatever the micro-batch."""
        number = self._storage(tensor)
        self._state.add(number)
        self._live -= self._sizes[number]
        self._sizes[number] = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        written = tuple(self._operand(tensor) for tensor in tensors)
        if not _is_view(func) and name not in _NO_KERNEL:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.phase.append(
                Operation(
                    name=name,
                    kind=_kind(name),
                    flops=flops,
                    reads=tuple({self._operand(tensor) for tensor in read}),
                    writes=written,
                )
            )
        self._note()
        return out

    def _note(self) -> None:
        gradients = sum(self._sizes.get(each, 0) for each in self._gradients)
        activations = self._live - gradients
        self._trace.curve.append((activations, gradients))
        self._trace.peak_bytes = max(self._trace.peak_bytes, activations)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = self._storage(tensor)
        if storage not in self._state:
            self._trace.saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def _gradient_is_there(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._gradients.add(self._storage(parameter.grad))

    def _operand(self, tensor: Tensor) -> Operand:
        # A broadcast tensor is read once.
        whole = tensor.numel() * tensor.element_size()
        return Operand(self._storage(tensor), min(whole, tensor.untyped_storage().nbytes()))

    def _storage(self, tensor: Tensor) -> int:
        """Return a number of the tensor's storage that no other storage ever has."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._ids:
            number = self._ids[address] = next(self._serial)
            self._sizes[number] = storage.nbytes()
            self._live += storage.nbytes()
            # Python's object of a storage lives as long as the storage does.
            weakref.finalize(storage, self._free, address, number)
        return self._ids[address]

    def _free(self, address: int, number: int) -> None:
        del self._ids[address]
        self._live -= self._sizes.pop(number)


class _OnGpu(TorchFunctionMode):
    """Lets attention be FlashAttention's operation, and computes as autocast on a GPU does.

    Autocast is on where there is a function to tell of the copies that it makes of weights.
    """

    def __init__(self, copied: Callable[[Tensor], None] | None) -> None:
        super().__init__()
        self._copied = copied

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            # On the meta device PyTorch itself would take the path of plain products.
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        if self._copied and func is functional.linear:
            args = [self._cast(a) if isinstance(a, Tensor) else a for a in args]
        if self._copied and func is functional.layer_norm:
            args = [args[0].float(), *args[1:]]
        return func(*args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        low = tensor.to(torch.bfloat16)
        if self._copied and low is not tensor and tensor.is_leaf and tensor.requires_grad:
            self._copied(low)
        return low


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _is_view(func: Any) -> bool:
    infos = [result.alias_info for result in func._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


def _kind(name: str) -> str:
    if name in _PRODUCTS:
        return "product"
    return "attention" if "attention" in name else "pointwise"
