"""Train with DeepSpeed, ZeRO stages 0 to 3. The only module that imports deepspeed.

DeepSpeed offers no complete public view of its fp32 state (`safe_get_*` misses parameter groups),
so `_whole`, `_fragments` and `_partitions` read the optimizers' own fields. They are checked
against the live weights at the start, and pyproject.toml bounds DeepSpeed's version.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dtr_scale.engines.base import (
    ADAM_MOMENTS,
    AdamSettings,
    Engine,
    Judge,
    Piece,
    adam_state,
    build_optimizer,
    cut,
    cut_pieces,
    pieces_of,
    undecayed,
    whole_pieces,
)
from dtr_scale.engines.deepspeed_config import SECTION
from dtr_scale.engines.flat_group import FlatWeights
from dtr_scale.engines.masters import Masters
from dtr_scale.engines.world import World, without_lines_of_gloo
from dtr_scale.errors import ConfigError, EngineError

# Set before the import: DeepSpeed's loggers read it once; its progress lines are not ours.
os.environ.setdefault("DS_LOG_LEVEL", "warning")
if not torch.cuda.is_available():
    # Or it warns of what it would choose by itself; the banner tells the device.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.utils import logger as deepspeed_logger


class DeepSpeedEngine(Engine):
    """ZeRO behind the engine's surface; DeepSpeed's averaging over ranks is undone."""

    def __init__(
        self,
        network: nn.Module,
        *,
        world: World,
        config: dict[str, Any],
        keeps_masters: bool = False,
        **adam: Unpack[AdamSettings],
    ) -> None:
        """Take over `network`, to be trained as `config` (by `build_deepspeed_config`) says.

        `keeps_masters` is for stage 0, whose own bf16 does not work: the network has bf16 weights,
        and DeepSpeed trains fp32 masters of them.
        """
        self.network = network
        self._world = world
        self._stage: int = config["zero_optimization"]["stage"]
        # DeepSpeed casts the network before it copies the masters: they get their fp32 back. The
        # cast makes new tensors, so these stay what they are.
        initial: dict[str, Tensor] = {}
        if config["bf16"]["enabled"]:
            initial = {name: p.detach() for name, p in network.named_parameters()}
        _prepare_process(world)
        exempt = undecayed(network, adam)
        self._masters = Masters(network, world.device) if keeps_masters else None
        # ZeRO makes a flat buffer of each group's trained parameters, and none can be empty.
        trained = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        given = self._whole_masters().items() if self._stage == 0 else trained
        optimizer = build_optimizer(given, exempt, adam)
        try:
            with without_lines_of_gloo():  # DeepSpeed makes groups of its own
                parts: Any = deepspeed.initialize(
                    model=self._masters or network, optimizer=optimizer, config=config
                )
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} does not accept {key} in {SECTION}: "
                f"{problem['msg']}; see https://www.deepspeed.ai/docs/config-json/"
            ) from None
        except (DeepSpeedConfigError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"DeepSpeed refuses {SECTION}: {reason}") from error
        self._engine = engine = parts[0]
        # DeepSpeed's ZeRO optimizer wraps the one that makes the update.
        self._adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._adam.register_step_pre_hook(self._before_update)
        self._unheard: Judge | None = None
        self._frozen = self._take_frozen()
        self._find_state()
        for name, piece in self.masters().items() if initial else ():
            piece.data.copy_(cut(initial[name].view(-1), piece.offset, piece.data.numel()))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        return self._engine(x_t, t, y, step).float()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        # Before the backward, whose hooks exchange gradients. Else DeepSpeed counts micro-steps.
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # Losses are shares of a sum. The factor undoes DeepSpeed's mean over ranks, the keyword its
        # mean over micro-steps.
        self._engine.backward(loss * self._world.world_size, scale_wrt_gas=False)

    def _update(self, judge: Judge | None) -> Tensor:
        # Stage 0 offers no norm in fp32. Its gradients are already exchanged and whole; the step
        # clears them.
        norm = self._total_norm() if self._stage == 0 else None
        self._unheard = judge
        if norm is not None:
            self._hear(norm)
        self._engine.step()
        if norm is None:
            norm = self._on_device(self._engine.get_global_grad_norm())
        # In fp32 and at stage 3 DeepSpeed reads the norm itself, and makes no update, nor a call
        # of Adam, where it is not finite. Then it is infinite, which the judge refuses, too.
        self._hear(norm)
        if self._masters:
            self._masters.push()
        return norm

    def _before_update(self, *_: Any) -> None:  # noqa: ANN401
        """Judge where DeepSpeed knows the norm and has changed nothing yet: before Adam's step."""
        # `_global_grad_norm` is what `get_global_grad_norm` will return after the step. Stage 3
        # calls Adam for each sub-group.
        if self._unheard is not None:
            self._hear(self._on_device(self._engine.optimizer._global_grad_norm))

    def _hear(self, norm: Tensor) -> None:
        judge, self._unheard = self._unheard, None
        if judge is not None:
            self._heed(judge, norm)

    def _on_device(self, norm: Tensor | float) -> Tensor:
        # A tensor on the device, or a number that DeepSpeed has read already.
        return torch.as_tensor(norm, dtype=torch.float64, device=self._world.device)

    def push_masters(self) -> None:
        zero = self._engine.optimizer
        if self._masters:
            self._masters.push()
        elif self._stage in (1, 2):
            # Casts this rank's masters and gathers the others': a collective.
            zero.update_lp_params()
            if self._frozen is not None:
                self._frozen.push()
                self._frozen.wait()
        elif self._stage == 3:
            zero.checkpoint_event_prologue()  # drops what is gathered
            # Casts a group's masters into the partition that weights are gathered from.
            # `ds_tensor` is a view of it.
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            self._push_frozen_partitions()
            zero.checkpoint_event_epilogue()  # gathers what stays gathered

    def _take_frozen(self) -> FlatWeights | None:
        """Hold what is not trained under stages 1 and 2, for DeepSpeed keeps no fp32 of it."""
        frozen = {n: p for n, p in self.network.named_parameters() if not p.requires_grad}
        if not frozen or self._stage not in (1, 2):
            return None
        dtype = next(iter(frozen.values())).dtype
        return FlatWeights(frozen, world=self._world, dtype=dtype)

    def _push_frozen_partitions(self) -> None:
        """Cast this rank's parts of what is not trained under stage 3."""
        masters = self.masters()
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad and name in masters:
                data = masters[name].data
                cut(parameter.ds_tensor, 0, len(data)).copy_(data)  # pyright: ignore

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self._whole_masters().values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _find_state(self) -> None:
        """Find the pieces; EngineError if DeepSpeed's fields are not what they were."""
        finders = {0: self._whole, 1: self._fragments, 2: self._fragments, 3: self._partitions}
        weights = dict(self.network.named_parameters())
        try:
            self._pieces = {k: p for found in finders[self._stage]() for k, p in found.items()}
            for name, piece in self.masters().items():
                weight, numel = weights[name], piece.data.numel()
                if self._stage == 3:
                    live = cut(weight.ds_tensor, 0, numel)  # pyright: ignore
                else:
                    live = cut(weight.view(-1), piece.offset, numel)
                # The masters, cast, are the weights to the bit. A field with another meaning or
                # offset in another version of DeepSpeed fails here, before the first step.
                if not torch.equal(piece.data.to(live), live):
                    raise EngineError(f"the fp32 weights of {name} are not the live ones")
        except (AttributeError, EngineError) as error:
            raise EngineError(
                f"DeepSpeed {deepspeed.__version__} does not keep its fp32 weights where this "
                f"trainer reads them ({error}); install the version in constraints.txt, and "
                f"remove what {SECTION} says about weights and gradients"
            ) from None

    def _whole(self) -> Iterator[dict[str, Piece]]:
        """Stage 0: every rank holds every parameter, fp32, with its Adam state."""
        for name, parameter in self._whole_masters().items():
            yield whole_pieces(name, parameter, adam_state(self._adam, parameter))

    def _whole_masters(self) -> dict[str, nn.Parameter]:
        masters = self._masters
        return masters.named_masters() if masters else dict(self.network.named_parameters())

    def _fragments(self) -> Iterator[dict[str, Piece]]:
        """Stages 1, 2: this rank's range of a flat fp32 buffer per parameter group."""
        flats = self._engine.optimizer.single_partition_of_fp32_groups
        states = [adam_state(self._adam, flat) for flat in flats]
        if self._frozen is not None:
            still = self._frozen.master
            yield from self._frozen.pieces({m: torch.zeros_like(still) for m in ADAM_MOMENTS})
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            # `_hp_mapping` (deepspeed/utils/tensor_fragment.py) links a parameter with its part of
            # the flat fp32 buffer. `lp_fragment_address` is where that part begins in the
            # parameter, `hp_fragment_address` where it begins in this rank's buffer.
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                continue  # other ranks hold all of it
            address, group = mapping.hp_fragment_address, mapping.param_group_index
            yield cut_pieces(
                name,
                parameter.shape,
                mapping.lp_fragment_address.start,
                flats[group],
                states[group],
                address.start,
                address.numel,
            )

    def _partitions(self) -> Iterator[dict[str, Piece]]:
        """Stage 3: an equal part of each parameter, the last ones padded, in flat fp32 buffers."""
        zero = self._engine.optimizer
        flats = zero.fp32_partitioned_groups_flat
        states = [adam_state(self._adam, flat) for flat in flats]
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                yield self._frozen_partition(name, parameter)
                continue
            # `grad_position` holds [sub-group, offset in its flat buffer, elements of a part with
            # its padding] by the parameter's id.
            group, start, part_size = zero.grad_position[zero.get_param_id(parameter)]
            shape = parameter.ds_shape  # pyright: ignore[reportAttributeAccessIssue]
            offset = self._world.rank * part_size
            numel = min(part_size, shape.numel() - offset)
            if numel > 0:  # else other ranks hold all of it
                yield cut_pieces(name, shape, offset, flats[group], states[group], start, numel)

    def _frozen_partition(self, name: str, parameter: Any) -> dict[str, Piece]:  # noqa: ANN401
        """Return this rank's equal part of what is not trained, with masters of our own."""
        shape, part_size = parameter.ds_shape, parameter.ds_tensor.numel()
        offset = self._world.rank * part_size
        numel = min(part_size, shape.numel() - offset)
        if numel <= 0:
            return {}
        master = cut(parameter.ds_tensor, 0, numel).float().clone()
        return pieces_of(
            name, shape, offset, master, [torch.zeros_like(master) for _ in ADAM_MOMENTS]
        )


def _prepare_process(world: World) -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # Its shared-memory collectives would be compiled for a minute at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        # DeepSpeed takes the GPU of this number; a scheduler may show each rank its own alone.
        os.environ["LOCAL_RANK"] = str(world.device.index)
    # Takes over the process group that `join_world` made, which has its timeout and device.
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
