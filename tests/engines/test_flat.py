"""The flat engine in one process; `test_engines.py` and `test_matrix.py` have it on more."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from dtr_scale.engines.base import Averaging, Engine
from dtr_scale.engines.flat import FlatEngine
from dtr_scale.engines.flat_group import ALIGNMENT, FlatGroup
from dtr_scale.engines.flat_shard import FlatShard
from dtr_scale.engines.single import SingleEngine
from dtr_scale.engines.world import World
from dtr_scale.engines.wrap import checkpoint_activations
from dtr_scale.models.dit import DiT
from dtr_scale.models.routing import RoutingSpec

LONE = World(0, 0, 1, torch.device("cpu"))
ANY = torch.zeros(1)
OPTIMIZER: Any = {"lr": 1e-2, "weight_decay": 0.1}


def dit() -> DiT:
    torch.manual_seed(0)
    network = DiT(
        hidden_size=32, depth=3, num_heads=2, patch_size=2, input_size=8, num_classes=5,
        routing=RoutingSpec("dtr"),
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def flat(network: Any, **settings: Any) -> FlatEngine:
    settings = {"precision": "fp32", **OPTIMIZER, **settings}
    return FlatEngine(network, blocks=network.routed_blocks(), world=LONE, **settings)


def train(
    engine: Engine, micro_steps: int = 2, averaging: Sequence[Averaging] = ()
) -> list[torch.Tensor]:
    """Return the gradient norms of three steps."""
    torch.manual_seed(1)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])
    norms = []
    for step in range(3):
        for micro in range(micro_steps):
            with engine.micro_step(last=micro == micro_steps - 1):
                out = engine.forward(torch.randn(3, 4, 8, 8), t, y, step)
                engine.backward(out.square().mean())
        norms.append(engine.step(averaging=averaging))
    return norms


def assert_norms(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0, check_dtype=False)


@pytest.mark.parametrize("kind", ["plain", "recomputed", "frozen input", "frozen block"])
def test_it_trains_as_one_process_does(kind):
    reference, network = dit(), dit()
    for model in (reference, network):
        # Without a gradient of its input, a block has no hook.
        model.x_embedder.requires_grad_(kind != "frozen input")
        model.blocks[1].requires_grad_(kind != "frozen block")
    if kind == "recomputed":
        checkpoint_activations(network.routed_blocks())
    expected = SingleEngine(reference, device=LONE.device, **OPTIMIZER)
    engine = flat(network)
    assert_norms(train(engine), train(expected))
    assert engine.pieces().keys() == expected.pieces().keys()
    for key, piece in expected.pieces().items():
        found = engine.pieces()[key]
        assert (found.shape, found.offset) == (piece.shape, piece.offset)
        assert torch.equal(found.data, piece.data), key
    assert engine.optimizer_step == 3


def test_biases_norms_and_embeddings_are_a_group_without_decay():
    settings: Any = {**OPTIMIZER, "weight_decay": 10.0}
    norms = {}
    for decayed in ("all", "matrices"):
        expected = SingleEngine(dit(), device=LONE.device, decayed=decayed, **settings)
        engine = flat(dit(), decayed=decayed, **settings)
        train(engine)
        train(expected)
        assert engine.pieces().keys() == expected.pieces().keys()
        for key, piece in expected.pieces().items():
            assert torch.equal(engine.pieces()[key].data, piece.data), key
        norms[decayed] = {name: m.data.norm().item() for name, m in expected.masters().items()}
    for name, norm in norms["matrices"].items():
        is_matrix = name.endswith(".weight") and "embedding_table" not in name
        # Three steps shrink by 0.1 each; the gradients differ a little.
        assert (norm < 1.1 * norms["all"][name]) == is_matrix, name


@pytest.mark.parametrize("settings", [{"betas": (0.5, 0.9)}, {"eps": 1.0}])
def test_adam_is_told_its_settings(settings):
    engines = [flat(dit(), **told) for told in ({}, settings, settings)]
    first, *others = [torch.stack(train(engine)) for engine in engines]
    assert torch.equal(*others)
    assert not torch.equal(first, others[0])


def test_the_masters_of_a_rank_are_cut_where_decay_ends():
    """Whatever rank the cut falls to; the moments of both parts are those of the whole."""
    sizes = {"a.bias": (70,), "a.weight": (100, 3), "b.weight": (64, 3), "b.bias": (5,)}
    exempt = {"a.bias", "b.bias"}
    held: dict[str, int] = {}
    for rank in range(3):
        parameters = {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
        world = World(rank, rank, 3, LONE.device)
        group = FlatGroup(parameters, world=world, dtype=torch.float32, exempt=exempt)
        shard = FlatShard([group], {"lr": 1.0})
        shard.gradient.fill_(1.0)
        shard.adam.step()
        for kind, _, numel in shard.runs():
            held[kind] = held.get(kind, 0) + numel
        for pieces in shard.pieces():
            for key, piece in pieces.items():
                if key.startswith("exp_avg/"):
                    assert torch.equal(piece.data, torch.full_like(piece.data, 0.1)), key
        assert bool((shard.master == 1).any()) is False
    # 300 and 192 decayed, with their alignment 320 + 192; 128 + 64 exempt, and the padding.
    assert held == {"decayed": 512, "exempt": 256}


def test_weights_are_casts_of_masters_that_keep_what_bf16_has_not():
    initial = dict(dit().named_parameters())
    engine = flat(dit(), precision="bf16")
    for name, master in engine.masters().items():
        assert torch.equal(master.data.view(master.shape), initial[name])
    train(engine)
    for master in engine.masters().values():
        master.data.add_(1.0)
    engine.push_masters()
    for name, weight in engine.network.named_parameters():
        master = engine.masters()[name]
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, master.data.view(master.shape).bfloat16())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_no_number_leaves_nothing_behind(precision):
    """Neither in the padding of the buffers, which clipping multiplies as well."""
    engine = flat(dit(), precision=precision, grad_clip=0.5)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 2])
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        before = {key: piece.data.clone() for key, piece in engine.pieces().items()}
        engine.backward(engine.forward(x, t, y, step).square().mean() * factor)
        norm = engine.step(lambda norm: norm.isfinite().logical_not().float())
        assert bool(norm.isfinite()) == (factor == 1.0)
        same = all(torch.equal(piece.data, before[key]) for key, piece in engine.pieces().items())
        assert same == (factor != 1.0)
    assert engine.optimizer_step == 2


def test_blocks_are_exchanged_during_the_last_backward_alone(monkeypatch):
    network = dit()
    engine = flat(network)
    events: list[Any] = []
    names = {
        group: "outside" if number == 0 else number - 1
        for number, group in enumerate(engine._groups)
    }
    monkeypatch.setattr(FlatGroup, "reduce", lambda group: events.append(names[group]))
    network.x_embedder.proj.weight.register_hook(lambda gradient: events.append("last product"))
    train(engine)
    assert events == 3 * ["last product", 2, 1, 0, "last product", "outside"]


def test_a_forward_waits_for_the_weights_that_it_uses(monkeypatch):
    network = dit()
    engine = flat(network)
    events: list[Any] = []
    names: dict[Any, str] = {group: f"{n} waits" for n, group in enumerate(engine._groups)}
    monkeypatch.setattr(FlatGroup, "wait", lambda group: events.append(names[group]))
    for number, block in enumerate(network.blocks, start=1):
        block.register_forward_pre_hook(lambda block, inputs, n=number: events.append(f"{n} runs"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 7])
    in_turn = [f"{n} {what}" for n in (1, 2, 3) for what in ("waits", "runs")]
    engine.forward(x, t, t % 5, 0)
    assert events == ["0 waits", *in_turn]
    events.clear()
    with torch.no_grad():
        network(x, t, t % 5)
    assert events == ["0 waits", "1 waits", "2 waits", "3 waits", *in_turn]


class Chain(nn.Module):
    """Linear blocks, of which one can be left out, and one's weight used once more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.left_out: int | None = None
        self.used_again = False

    def routed_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, x: torch.Tensor, *others: Any) -> torch.Tensor:
        x = self.first(x)
        if self.used_again:
            block: Any = self.blocks[2]
            x = x @ block.weight
        for number, block in enumerate(self.blocks):
            if number != self.left_out:
                x = block(x)
        return x


def test_a_block_that_was_not_called_has_no_part_in_a_clipped_norm():
    norms: list[list[torch.Tensor]] = []
    clipping = {**OPTIMIZER, "grad_clip": 0.5}
    reference = SingleEngine(Chain(), device=LONE.device, **clipping)
    for engine in (flat(Chain(), **clipping), reference):
        network: Any = engine.network
        norms.append([])
        for left_out in (None, 1):
            network.left_out = left_out
            for last in (False, True):
                with engine.micro_step(last=last):
                    engine.backward(engine.forward(torch.ones(2, 4), ANY, ANY, 0).sum())
            norms[-1].append(engine.step())
    assert_norms(*norms)


def test_exchanges_keep_their_order_where_a_block_is_not_called(monkeypatch):
    network = Chain()
    network.left_out = 2
    engine, order = flat(network), []
    monkeypatch.setattr(FlatGroup, "reduce", lambda group: order.append(group))
    engine.backward(engine.forward(torch.ones(2, 4), ANY, ANY, 0).sum())
    assert order == engine._groups[::-1]


def test_a_gradient_that_comes_after_its_block_was_exchanged_is_no_silent_loss():
    network = Chain()
    network.used_again = True
    engine = flat(network)
    with pytest.raises(AssertionError, match=r"blocks\.2\.weight"):
        engine.backward(engine.forward(torch.ones(2, 4), ANY, ANY, 0).sum())


def test_three_ranks_hold_every_weight_once_in_shards_of_one_size():
    sizes = {"a": (7, 3), "b": (500,), "c": (1,), "d": (64, 3)}
    initial = {name: torch.randn(size) for name, size in sizes.items()}
    joined: dict[str, list[torch.Tensor]] = {name: [] for name in sizes}
    for rank in range(3):
        parameters = {name: nn.Parameter(values.clone()) for name, values in initial.items()}
        world = World(rank, rank, 3, LONE.device)
        group = FlatGroup(parameters, world=world, dtype=torch.bfloat16)
        state = {moment: torch.zeros_like(group.master) for moment in ("exp_avg", "exp_avg_sq")}
        for pieces in group.pieces(state):
            for key, piece in pieces.items():
                kind, _, name = key.partition("/")
                if kind == "master":
                    assert piece.offset == sum(part.numel() for part in joined[name])
                    joined[name].append(piece.data)
        assert group.master.numel() == 5 * ALIGNMENT  # 64 + 512 + 64 + 192 in three
        for name, parameter in parameters.items():
            assert torch.equal(parameter, initial[name].bfloat16())
            assert parameter.storage_offset() % ALIGNMENT == 0
    for name, parts in joined.items():
        assert torch.equal(torch.cat(parts), initial[name].view(-1)), name
