"""DeepSpeed with ZeRO stages 0 to 2. The only module that imports deepspeed.

DeepSpeed offers no complete public view of its fp32 state (`safe_get_*` misses parameter groups),
so `_fragments_*` read the optimizers' own fields; they are checked against the live weights at the
start, and pyproject.toml bounds DeepSpeed's version.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtr_scale.engines.base import (
    ADAM_MOMENTS,
    Engine,
    Fragment,
    adam_state,
    build_optimizer,
    whole_fragment,
)
from dtr_scale.engines.world import World
from dtr_scale.errors import EngineError

# Set before the import: DeepSpeed's loggers read it once; its progress lines are not ours.
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

_REDUCE_BUCKET_SIZE = 50_000_000
"""Gradients exchanged at once; DeepSpeed's default of 5e8 stages all of a DiT-L in one copy."""


class DeepSpeedEngine(Engine):
    """ZeRO behind the engine's surface; DeepSpeed's averaging over ranks is undone."""

    def __init__(
        self,
        network: nn.Module,
        *,
        world: World,
        micro_batch_size: int,
        grad_accum_steps: int,
        lr: float,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
        precision: str = "bf16",
        zero_stage: int = 1,
    ) -> None:
        self.network = network
        self._world_size = world.world_size
        self._stage = zero_stage
        config = _deepspeed_config(
            micro_batch_size=micro_batch_size,
            grad_accum_steps=grad_accum_steps,
            grad_clip=grad_clip,
            precision=precision,
            zero_stage=zero_stage,
        )
        _prepare_process(world)
        optimizer = build_optimizer(list(network.parameters()), lr=lr, weight_decay=weight_decay)
        initial = {name: p.detach().clone() for name, p in network.named_parameters()}
        self._engine: Any = deepspeed.initialize(
            model=network.to(world.device), optimizer=optimizer, config=config
        )[0]
        self._fragments = list(self._whole_fragments() if zero_stage == 0 else self._zero_parts())
        self._adam_states = list(self._basic_optimizer.state.values())
        self._check_masters()
        # DeepSpeed casts the network before it copies the masters: give them their fp32 back.
        for part in self._fragments:
            whole = initial[part.name].view(-1)
            part.master.copy_(whole[part.offset : part.offset + part.master.numel()])

    @property
    def _basic_optimizer(self) -> torch.optim.AdamW:
        """The AdamW that makes the update: DeepSpeed's ZeRO optimizer wraps it."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        return self._engine(x_t, t, y, step).float()

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # The gradient is averaged over ranks on its way; ours is a sum.
        self._engine.backward(loss * self._world_size, scale_wrt_gas=False)

    def step(self) -> float:
        # Stage 0 offers no norm in fp32; its gradients are already exchanged and whole.
        norm = self._total_norm() if self._stage == 0 else None
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float(norm)

    def fragments(self) -> list[Fragment]:
        return self._fragments

    @property
    def optimizer_step(self) -> int:
        return int(self._adam_states[0]["step"])

    @optimizer_step.setter
    def optimizer_step(self, step: int) -> None:
        for state in self._adam_states:
            state["step"].fill_(step)

    def push_masters(self) -> None:
        if self._stage > 0:
            self._engine.optimizer.update_lp_params()

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _whole_fragments(self) -> Iterator[Fragment]:
        """Stage 0: every rank holds every parameter, fp32, with its Adam state."""
        for name, parameter in self.network.named_parameters():
            yield whole_fragment(name, parameter, adam_state(self._basic_optimizer, parameter))

    def _zero_parts(self) -> Iterator[Fragment]:
        """Stages 1, 2: this rank's piece of a flat fp32 buffer per parameter group."""
        zero = self._engine.optimizer
        flats = zero.single_partition_of_fp32_groups
        states = [adam_state(self._basic_optimizer, flat) for flat in flats]
        for name, parameter in self.network.named_parameters():
            mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
            if mapping is None:
                continue  # other ranks hold all of it
            piece = mapping.hp_fragment_address
            group = mapping.param_group_index

            def cut(flat: Tensor, start: int = piece.start, numel: int = piece.numel) -> Tensor:
                return flat.detach().narrow(0, start, numel)

            yield Fragment(
                name,
                tuple(parameter.shape),
                mapping.lp_fragment_address.start,
                cut(flats[group]),
                **{moment: cut(states[group][moment]) for moment in ADAM_MOMENTS},
            )

    def _check_masters(self) -> None:
        """Refuse to train if the private fields do not hold what this module takes them for."""
        weights = dict(self.network.named_parameters())
        for part in self._fragments:
            live = weights[part.name].detach().view(-1).narrow(0, part.offset, part.master.numel())
            if not torch.equal(part.master.to(live.dtype), live):
                raise EngineError(
                    f"DeepSpeed {deepspeed.__version__} keeps the fp32 master of {part.name} "
                    "elsewhere than 0.19.8 does; install the version in constraints.txt"
                )


def _prepare_process(world: World) -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # Its shared-memory collectives would be compiled for a minute at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")


def _deepspeed_config(
    *,
    micro_batch_size: int,
    grad_accum_steps: int,
    grad_clip: float | None,
    precision: str,
    zero_stage: int,
) -> dict[str, Any]:
    bf16 = precision == "bf16"
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": grad_clip or 0.0,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": _REDUCE_BUCKET_SIZE},
        "bf16": {"enabled": bf16 and zero_stage > 0},
        # Stage 0's bf16 optimizer makes a dummy Adam step at its start (losses off by 4%).
        "torch_autocast": {"enabled": bf16 and zero_stage == 0, "dtype": "bfloat16"},
        "communication_data_type": "fp32",
        # Stage 1 adds micro-steps in bf16: for fp32 DeepSpeed would change to another optimizer.
        "data_types": {"grad_accum_dtype": "fp32" if bf16 and zero_stage == 2 else None},
        "steps_per_print": 2**31,
    }
