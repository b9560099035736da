"""The simulation of a thousand ranks, small; and its parts beside what really does them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.engines.flat_group import FlatGroup
from dtr_scale.engines.world import World
from dtr_scale.jobs.plan.goodput import Failures, rounded_steps
from dtr_scale.jobs.scale.checkpoints import (
    flat_places,
    fsdp2_places,
    measure_checkpoint,
    network_parts,
)
from dtr_scale.jobs.scale.failures import simulated_goodput
from dtr_scale.models.dit import DiT

CONFIG = str(Path(__file__).parents[3] / "configs" / "demo_digits.json")
RANKS = 5


@pytest.fixture(scope="module")
def parts():
    with torch.device("meta"):
        network = DiT(
            hidden_size=36, depth=2, num_heads=2, patch_size=2, input_size=8, num_classes=5
        )
    return network_parts(network, network.routed_blocks())


def test_flat_places_are_those_of_the_engine(parts):
    found = flat_places(parts, RANKS)
    meta = torch.device("meta")
    for rank, places in enumerate(found):
        expected = []
        for part in parts:
            with meta:
                named = {name: torch.nn.Parameter(torch.empty_like(p)) for name, p in part.items()}
                group = FlatGroup(named, world=World(rank, 0, RANKS, meta), dtype=torch.bfloat16)
            master: torch.Tensor = group.master
            for pieces in group.pieces({"exp_avg": master, "exp_avg_sq": master}):
                ((key, piece),) = ((k, p) for k, p in pieces.items() if k.startswith("master/"))
                name = key.removeprefix("master/")
                expected.append((name, piece.offset, piece.data.numel()))
        assert places == expected


def test_fsdp2_places_are_chunks(parts):
    found = fsdp2_places(parts, RANKS, RANKS)
    chunks = {n: torch.chunk(p, RANKS) for part in parts for n, p in part.items()}
    for rank, places in enumerate(found):
        held = {name: numel for name, _, numel in places}
        for name, pieces in chunks.items():
            assert held.get(name, 0) == (pieces[rank].numel() if rank < len(pieces) else 0), name
    # Two copies, neighbours share one: rank 2 holds what rank 0 does.
    copies = fsdp2_places(parts, 4, 2)
    assert copies[0] == copies[2] != copies[1] == copies[3]


def test_a_checkpoint_stores_each_piece_once(parts, tmp_path):
    shapes = {name: tuple(p.shape) for part in parts for name, p in part.items()}
    total = 4 * 4 * sum(p.numel() for part in parts for p in part.values())
    for held in (flat_places(parts, RANKS), fsdp2_places(parts, 4, 2)):
        figures = measure_checkpoint(held, shapes, 1, tmp_path)
        assert figures.least_stored <= figures.most_stored < total
        index = json.loads((tmp_path / "index.json").read_bytes())
        stored = sum(p["numel"] for t in index["tensors"].values() for p in t["pieces"])
        assert 4 * stored == total
        assert figures.index_bytes == (tmp_path / "index.json").stat().st_size


def test_the_formula_of_goodput_is_that_of_played_runs():
    failures = Failures(
        seconds_between=7.9 * 3600, restart_seconds=120, stall_seconds=0.1, write_seconds=5
    )
    for interval in (60, 600, 3600):
        played = simulated_goodput(failures, interval)
        expected = failures.goodput(interval)
        assert sum(played) / len(played) == pytest.approx(expected, abs=0.004)
    # Neither half nor twice of it is better.
    best = failures.best_interval()
    assert best == pytest.approx((2 * 0.1 * 7.9 * 3600) ** 0.5)
    assert failures.goodput(best) >= max(failures.goodput(best / 2), failures.goodput(2 * best))
    assert replace(failures, write_seconds=60).best_interval() == 120
    assert [rounded_steps(x) for x in (0.3, 1.6, 4800, 7000, 8000)] == [1, 2, 5000, 5000, 10000]


def test_the_command_tells_what_was_wanted_and_found(capsys, tmp_path):
    path = tmp_path / "scale.json"
    code = main(
        ["bench", "scale", "--config", CONFIG, "--nodes=4", "--gpus=2", "--shards=200",
         "--samples=20000", "--failures=100000", f"--json={path}"]
    )  # fmt: skip
    assert code == 0
    table, found = capsys.readouterr().out, json.loads(path.read_bytes())
    assert table.splitlines()[0].startswith("8 ranks (4 nodes of 2 h100-80gb), 200 shards")
    assert table.count("  met") == 5
    assert "MISSED" not in table
    assert set(found["checkpoints"]) == {"flat", "fsdp2", "hsdp"}
    assert {"lanes_1", "lanes_4"} <= set(found["data"])
    assert found["global_batch_size"] == 128
    assert found["simulated_goodput"]["min"] > 0.99
