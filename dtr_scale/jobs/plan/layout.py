"""Say how an engine lays a training out over ranks: what is whole on each, and what is shared."""

from dataclasses import dataclass

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.fsdp2 import GROUP_SIZE
from dtr_scale.jobs.build import RESHARDED_PARAMETERS

ENGINES = ("single", "zero-0", "zero-1", "zero-2", "zero-3", "fsdp2", "flat")


@dataclass(frozen=True)
class Layout:
    """An engine's way, as its module in `engines/` does it; "ddp" is the released code's."""

    name: str
    world_size: int
    shard: int
    """Ranks that share what is sharded; the others hold copies (HSDP)."""
    precision: str
    on_gpu: bool = True
    gathers_twice: bool = False
    """fsdp2: drops gathered weights between forward and backward."""
    grad_accum_steps: int = 1
    exchange: str = "fp32"
    """What gradients are summed over ranks in."""

    @property
    def computes_in(self) -> str:
        """Return "bf16" (bf16 weights), "autocast" or "fp32"."""
        by_autocast = self.name in ("single", "zero-0") and not self.on_gpu
        return "autocast" if self.precision == "bf16" and by_autocast else self.precision

    @property
    def is_flat(self) -> bool:
        """Whether the flat engine trains: for "single", too, in bf16 on a GPU."""
        return self.name == "flat" or (self.name == "single" and self.computes_in == "bf16")

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose gradients are exchanged as one."""
        return GROUP_SIZE if self.name == "fsdp2" and not self.gathers_twice else 1

    @property
    def compiles(self) -> bool:
        """Whether blocks can be compiled: under ZeRO-3 they would fall into pieces."""
        return self.name != "zero-3"

    @property
    def weight_bytes(self) -> int:
        """Of a weight as the network computes with it, and of its gradient."""
        return 2 if self.computes_in == "bf16" else 4


def layout_of(
    experiment: Experiment, world_size: int, num_parameters: int, name: str | None = None
) -> Layout:
    """Return the layout of an experiment's engine, or of another engine for the same experiment."""
    engine, train = experiment.engine, experiment.train
    own = f"zero-{engine.zero_stage}" if engine.type == "deepspeed" else engine.type
    name = name or own
    shard, gathers_twice = world_size, False
    if name == "fsdp2":
        if own == name:
            _, shard = engine.mesh(world_size)
        gathers_twice = engine.reshard_after_forward is True or (
            engine.reshard_after_forward == "auto" and num_parameters >= RESHARDED_PARAMETERS
        )
    micro_batch_size = experiment.micro_batch_size(world_size)
    return Layout(
        name=name,
        world_size=world_size,
        shard=shard,
        precision=engine.precision,
        gathers_twice=gathers_twice,
        grad_accum_steps=train.global_batch_size // world_size // micro_batch_size,
        exchange=engine.exchange,
    )
