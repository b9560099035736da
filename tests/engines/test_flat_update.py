"""AdamW's update with the averages in one pass, against PyTorch's AdamW and `lerp`."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dtr_scale.engines.base import Average, Averaging
from dtr_scale.engines.flat_group import FlatGroup
from dtr_scale.engines.flat_shard import FlatShard
from dtr_scale.engines.flat_update import FusedUpdate
from dtr_scale.engines.world import World
from tests.engines.test_flat import assert_norms, dit, flat, train

TOLERANCE = 4e-7
"""Of a buffer's largest value: some four roundings in fp32."""
LR, STEPS = 1e-2, 6
sizes = st.lists(st.integers(1, 300), min_size=1, max_size=4)
weights = st.lists(st.sampled_from([1e-4, 0.1, 0.7, 1.0]), max_size=3)


class Case(NamedTuple):
    groups: list[list[int]]
    """Elements of each group's parameters, every second of which is not decayed."""
    weights: list[float]
    """Of the averages."""
    skipped: set[int]
    grad_clip: float | None
    weight_decay: float
    betas: tuple[float, float]
    world_size: int = 1
    exchange: torch.dtype = torch.float32

    def shard(self) -> FlatShard:
        torch.manual_seed(0)
        world = World(self.world_size - 1, 0, self.world_size, torch.device("cpu"))
        groups = [
            FlatGroup(
                {f"{n}.{k}": nn.Parameter(torch.randn(size)) for k, size in enumerate(found)},
                world=world,
                dtype=torch.bfloat16,
                exempt={f"{n}.{k}" for k in range(1, len(found), 2)},
            )
            for n, found in enumerate(self.groups)
        ]
        adam = {"lr": LR, "weight_decay": self.weight_decay, "betas": self.betas, "eps": 1e-8}
        return FlatShard(groups, adam, self.exchange)  # pyright: ignore[reportArgumentType]


def gradients(shard: FlatShard, step: int) -> Tensor:
    """Return gradients of all sizes, as those of a network are, and 0 in the padding."""
    torch.manual_seed(step)
    found = torch.randn_like(shard.master) * 10.0 ** torch.randint(-6, 1, shard.master.shape)
    return found * (shard.master != 0)


def check(case: Case, *, compiled: bool) -> None:
    """Make the same updates by both, and compare all that they change."""
    ours, theirs = case.shard(), case.shard()
    update = FusedUpdate(ours, case.grad_clip, compiled=compiled)
    parts = [part for group in theirs.adam.param_groups for part in group["params"]]
    averages = [[shard.master.clone() for _ in case.weights] for shard in (ours, theirs)]
    for step in range(1, STEPS + 1):
        # A skipped step's gradients are what it is skipped for.
        gradient = gradients(ours, step) * (float("nan") if step in case.skipped else 1.0)
        gradient = gradient.to(case.exchange)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        skip = torch.tensor(float(step in case.skipped))
        lr = LR / step
        for shard in (ours, theirs):
            shard.gradient.copy_(gradient)
            for group in shard.adam.param_groups:
                group["lr"] = lr
        pairs = zip(averages[0], case.weights, strict=True)
        update(norm, skip, [Averaging(Average([ours.master], [a], {}), w / step) for a, w in pairs])
        if step not in case.skipped:
            theirs.give_gradient()
            if case.grad_clip is not None:
                nn.utils.clip_grads_with_norm_(parts, case.grad_clip, norm)
            theirs.adam.step()
            for average, weight in zip(averages[1], case.weights, strict=True):
                average.lerp_(theirs.master, weight / step)
    assert_close(ours.master, theirs.master)
    for moment, values in theirs.moments.items():
        assert_close(ours.moments[moment], values)
    for pair in zip(*averages, strict=True):
        assert_close(*pair)
    assert torch.equal(ours.cast, ours.master.bfloat16())
    counts = [next(iter(shard.adam.state.values()))["step"] for shard in (ours, theirs)]
    assert counts[0] == counts[1] == STEPS - len(case.skipped)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    limit = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=limit)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Case,
        groups=st.lists(sizes, min_size=1, max_size=3),
        weights=weights,
        skipped=st.sets(st.integers(1, STEPS)),
        grad_clip=st.sampled_from([None, 0.01, 1e3]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        betas=st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
        world_size=st.sampled_from([1, 3]),
        exchange=st.sampled_from([torch.float32, torch.bfloat16]),
    )
)
def test_it_is_adamw_with_averages(case):
    check(case, compiled=False)


CASES = [
    Case([[300, 70], [64]], [1e-4], {3}, None, 0.0, (0.9, 0.999)),
    Case([[300, 70], [64]], [1e-4, 0.7], {1, 4}, 0.01, 0.1, (0.9, 0.999)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_it_is_the_same_and_each_step_has_the_graphs_of_the_first():
    for case in CASES:
        torch.compiler.reset()
        counters.clear()
        check(case, compiled=True)
        assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_an_engine_that_compiles_it_trains_as_one_that_does_not():
    """With several groups, frozen parameters, what is not decayed, and averages."""
    engines, averages, norms = [], [], []
    for compiled in (False, True):
        network = dit()
        network.blocks[1].requires_grad_(False)
        # Keys' biases have no gradient but roundings, which an eps as small would make updates of.
        settings = {"decayed": "matrices", "grad_clip": 0.5, "eps": 1e-3}
        engine = flat(network, compiled=compiled, **settings)
        averages.append(engine.new_average())
        norms.append(train(engine, averaging=[Averaging(averages[-1], 0.3)]))
        engines.append(engine)
    assert_norms(*norms)
    eager, compiled = (engine.pieces() for engine in engines)
    # Gradients of weights that are a rounding apart differ by more than that.
    for key, piece in eager.items():
        assert_close(compiled[key].data, piece.data, 1e-5)
    for name, piece in averages[0].pieces.items():
        assert_close(averages[1].pieces[name].data, piece.data, 1e-5)
        assert torch.equal(piece.data, eager[f"master/{name}"].data) == ("blocks.1." in name)
    assert engines[0].optimizer_step == engines[1].optimizer_step == 3
