"""Choose what runs on the stub: cases with every pair of settings, or all cases there are."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any, NamedTuple

from tests.gpu_stub.build import A100, H100
from tests.support.engine_jobs import ENGINES

# Not "single", which is flat with one rank here; nor HSDP, since groups of ranks can be split off
# once in a process here: the second time ends it.
COMBINED = tuple(name for name in ENGINES if name not in ("single", "hsdp"))
_TINY = (
    "--model.variant=null", "--model.hidden_size=128", "--model.depth=2", "--model.num_heads=2",
    "--model.patch_size=2", "--model.input_size=16",
)  # fmt: skip
# Its heads lie as they do by default, as (head, qkv, channel).
_TINY_ADM = (
    "--model.image_size=16", "--model.model_channels=32", "--model.num_res_blocks=1",
    "--model.attention_resolutions=[2]", "--model.channel_mult=[1,2]",
    "--model.num_head_channels=32", "--model.use_new_attention_order=false",
)  # fmt: skip
NUM_EXPERTS = 2
NETWORKS: dict[str, tuple[str, ...]] = {
    "class": _TINY,
    "text": (
        *_TINY, "--model.conditioning=text", "--model.context_length=8", "--model.context_dim=64",
    ),
    "experts": (*_TINY, f"--model.num_experts={NUM_EXPERTS}"),
    "max_roaming": (*_TINY, "--model.routing.type=max_roaming"),
    "adm": _TINY_ADM,
}  # fmt: skip
BATCH = 8


class Case(NamedTuple):
    """One way to train."""

    engine: str
    network: str
    attention: str
    compiled: bool
    gpu: int
    world_size: int

    @property
    def is_possible(self) -> bool:
        return self.engine != "zero3" or not self.compiled  # which has no effect, as it says

    @property
    def pairs(self) -> frozenset[Any]:
        return frozenset(combinations(enumerate(self), 2))

    def arguments(self) -> dict[str, Any]:
        """Return what `jobs.live` takes of it."""
        adm = self.network == "adm"
        return {
            "config": "adm_imagenet64_dtr_vanilla" if adm else "dit_l_dtr_antuw",
            "overrides": [
                *ENGINES[self.engine],
                *NETWORKS[self.network],
                f"--engine.compile={str(self.compiled).lower()}",
                f"--model.attention={self.attention}",
                f"--train.global_batch_size={BATCH * self.world_size}",
                f"--train.micro_batch_size={BATCH // 2}",
            ],
            "gpu": self.gpu,
            "world_size": self.world_size,
            "num_experts": NUM_EXPERTS if self.network == "experts" else 1,
        }


HSDP = Case("hsdp", "class", "sdpa", False, H100, 8)
# Compiling takes as long as ten cases that do not: a few, for each kind of weights that is kept,
# one with an expert that has no samples. `test_compiled.py` has ZeRO-1.
COMPILED = (
    Case("fsdp2", "max_roaming", "sdpa", True, A100, 1),
    Case("flat", "class", "sdpa", True, A100, 1),
    Case("zero2", "experts", "sdpa", True, H100, 8),
)


def all_cases() -> list[Case]:
    combined = product(
        COMBINED, NETWORKS, ("sdpa", "xformers"), (False, True), (A100, H100), (1, 8)
    )
    return [case for values in combined if (case := Case(*values)).is_possible]


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Return few of the cases that have every pair of settings that all have."""
    cases, chosen = list(cases), []
    left = frozenset().union(*(case.pairs for case in cases))
    while left:
        best = max(cases, key=lambda case: len(case.pairs & left))
        chosen.append(best)
        left -= best.pairs
    return chosen
