import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.errors import ConfigError
from dtr_scale.models.routing import (
    ROUTING_TYPES,
    RoutingSpec,
    build_routing,
    routing_mask,
    routing_windows,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "masks_dtr.npz")
CASES = sorted(name.removesuffix("_start") for name in GOLDEN.files if name.endswith("_start"))

shapes = {
    "num_timesteps": st.integers(1, 300),
    "num_channels": st.integers(4, 200),
    "alpha": st.floats(0.25, 8.0),
    "beta": st.floats(0.25, 1.0),
}


def windows(kind, num_timesteps, num_channels, **settings):
    spec = RoutingSpec(kind, **settings)
    start, stop = routing_windows(spec, num_timesteps, num_channels)
    return start.numpy(), stop.numpy()


@pytest.mark.parametrize("case", CASES)
def test_dtr_equals_the_released_code(case):
    match = re.fullmatch(r"T(\d+)_C(\d+)_a([\d.]+)_b([\d.]+)", case)
    assert match
    num_timesteps, num_channels = int(match[1]), int(match[2])
    mask = routing_mask("dtr", num_timesteps, num_channels, float(match[3]), float(match[4]))
    first_active = mask.to(torch.int8).argmax(dim=1)
    assert np.array_equal(first_active, GOLDEN[f"{case}_start"])
    assert np.array_equal(mask.sum(dim=1), GOLDEN[f"{case}_active"])


@settings(deadline=None)
@given(**shapes)
def test_dtr_windows_slide_forward_at_one_width(num_timesteps, num_channels, alpha, beta):
    shape = {"num_timesteps": num_timesteps, "num_channels": num_channels}
    start, stop = windows("dtr", **shape, alpha=alpha, beta=beta)
    width = int(beta * num_channels)
    assert np.all(stop - start == width)
    assert np.all(np.diff(start) >= 0)
    assert start[0] == 0
    if num_timesteps > 1:
        assert stop[-1] == num_channels
    mask = routing_mask("dtr", **shape, alpha=alpha, beta=beta).numpy()
    overlap = (mask[:-1] & mask[1:]).sum(axis=1)
    assert np.array_equal(overlap, np.maximum(width - np.diff(start), 0))


@settings(deadline=None)
@given(**shapes)
def test_equation_4_windows_end_where_the_next_begins_plus_the_width(
    num_timesteps, num_channels, alpha, beta
):
    start, stop = windows(
        "dtr_eq4", num_timesteps=num_timesteps, num_channels=num_channels, alpha=alpha, beta=beta
    )
    width = int(beta * num_channels)
    assert np.array_equal(stop[:-1], start[1:] + width)
    assert start[0] == 0
    assert stop[-1] == num_channels
    assert np.all(stop - start >= width)


def test_equation_4_by_hand():
    # C = 10, C_beta = 5, T = 5, alpha = 1: floor(5 t/5) = t.
    start, stop = windows("dtr_eq4", num_timesteps=5, num_channels=10, alpha=1.0, beta=0.5)
    assert start.tolist() == [0, 1, 2, 3, 4]
    assert stop.tolist() == [6, 7, 8, 9, 10]


def test_the_two_forms_of_dtr_differ_by_at_most_three_channels():
    shape = {"num_timesteps": 1000, "num_channels": 768}
    differing = (routing_mask("dtr", **shape) != routing_mask("dtr_eq4", **shape)).sum(dim=1)
    assert 400 < int((differing > 0).sum()) < 600
    assert int(differing.max()) <= 3


def test_none_uses_every_channel():
    assert routing_mask("none", 7, 12).shape == (7, 12)
    assert routing_mask("none", 7, 12).all()


@pytest.mark.parametrize(
    ("kind", "alpha", "beta", "message"),
    [
        ("drt", 4.0, 0.8, "model.routing.type = 'drt': .* give one of none, dtr, dtr_eq4, cdtr, e"),
        ("dtr", 0.0, 0.8, "model.routing.alpha = 0.0: not accepted; give a number above 0"),
        ("dtr", float("nan"), 0.8, "model.routing.alpha = nan"),
        ("dtr_eq4", 4.0, 1.5, "model.routing.beta = 1.5"),
        (
            "dtr",
            4.0,
            0.01,
            "model.routing.beta = 0.01: leaves none of 64 channels; give at least 0",
        ),
        ("random", 4.0, 0.01, "leaves none of 64 channels"),
    ],
)
def test_a_bad_setting_is_named(kind, alpha, beta, message):
    with pytest.raises(ConfigError, match=message):
        routing_mask(kind, 10, 64, alpha, beta)


masks = {
    "num_timesteps": st.integers(1, 60),
    "num_channels": st.integers(4, 64),
    "beta": st.floats(0.25, 1.0),
    "seed": st.integers(0, 100),
}


@settings(deadline=None)
@given(**masks, block=st.integers(0, 30))
def test_random_masks_have_one_width_and_belong_to_seed_and_block(
    num_timesteps, num_channels, beta, seed, block
):
    shape = (num_timesteps, num_channels)
    mask = routing_mask("random", *shape, beta=beta, seed=seed, block=block)
    width = int(beta * num_channels)
    assert (mask.sum(dim=1) == width).all()
    assert torch.equal(mask, routing_mask("random", *shape, beta=beta, seed=seed, block=block))


def test_random_masks_differ_between_timesteps_blocks_and_seeds():
    mask = routing_mask("random", 50, 384)
    assert len({tuple(row.tolist()) for row in mask}) == 50
    assert not torch.equal(mask, routing_mask("random", 50, 384, block=1))
    assert not torch.equal(mask, routing_mask("random", 50, 384, seed=1))


@pytest.mark.parametrize(("num_channels", "beta"), [(384, 0.8), (64, 0.5), (100, 0.25)])
def test_random_masks_share_as_many_channels_as_equation_9_expects(num_channels, beta):
    width = int(beta * num_channels)
    probability = [  # P(k) of eq. 9
        math.comb(width, k) * math.comb(num_channels - width, width - k) for k in range(width + 1)
    ]
    expected = sum(k * p for k, p in enumerate(probability)) / math.comb(num_channels, width)
    mask = routing_mask("random", 400, num_channels, beta=beta).double().numpy()
    shared = (mask @ mask.T)[~np.eye(400, dtype=bool)]
    assert shared.mean() == pytest.approx(expected, rel=0.003)
    # No prior of affinity: neighbours share no more than distant timesteps.
    neighbours = np.diagonal(mask @ mask.T, offset=1)
    assert neighbours.mean() == pytest.approx(expected, rel=0.02)


@settings(deadline=None)
@given(**masks, every=st.integers(1, 50), step=st.integers(0, 5000))
def test_roaming_masks_keep_their_width_and_change_one_channel_per_update(
    num_timesteps, num_channels, beta, seed, every, step
):
    def at(step):
        return routing_mask(
            "max_roaming", num_timesteps, num_channels, beta=beta, seed=seed, step=step,
            update_every_steps=every,
        )  # fmt: skip

    width = int(beta * num_channels)
    assert (at(step).sum(dim=1) == width).all()
    assert torch.equal(at(step), at(step // every * every))
    roams = step // every < num_channels - width
    assert ((at(step) & at(step + every)).sum(dim=1) == width - roams).all()


@settings(deadline=None, max_examples=30)
@given(**masks)
def test_roaming_masks_visit_every_channel_and_then_rest(num_timesteps, num_channels, beta, seed):
    num_updates = num_channels - int(beta * num_channels)
    visited = torch.zeros(num_timesteps, num_channels, dtype=torch.bool)
    for update in range(num_updates + 1):
        assert not visited.all() or num_updates == 0
        visited |= routing_mask(
            "max_roaming", num_timesteps, num_channels, beta=beta, seed=seed, step=update,
            update_every_steps=1,
        )  # fmt: skip
    assert visited.all()
    last = [
        routing_mask("max_roaming", num_timesteps, num_channels, beta=beta, seed=seed,
                     step=step, update_every_steps=1)
        for step in (num_updates, num_updates + 1, 10**9)
    ]  # fmt: skip
    assert torch.equal(last[0], last[1])
    assert torch.equal(last[0], last[2])


@settings(deadline=None)
@given(**shapes, num_clusters=st.integers(1, 20), kind=st.sampled_from(["cdtr", "ercddt"]))
def test_all_timesteps_of_a_cluster_have_one_mask(
    num_timesteps, num_channels, alpha, beta, num_clusters, kind
):
    num_clusters = min(num_clusters, num_timesteps)
    mask = routing_mask(kind, num_timesteps, num_channels, alpha, beta, num_clusters=num_clusters)
    cluster = torch.arange(num_timesteps) * num_clusters // num_timesteps
    for k in range(num_clusters):
        rows = mask[cluster == k]
        assert len(rows)
        assert (rows == rows[0]).all()


@settings(deadline=None)
@given(**shapes)
def test_cdtr_is_dtr_over_eight_tasks(num_timesteps, num_channels, alpha, beta):
    if num_timesteps < 8:
        num_timesteps += 8
    mask = routing_mask("cdtr", num_timesteps, num_channels, alpha, beta)
    tasks = routing_mask("dtr", 8, num_channels, alpha, beta)
    assert torch.equal(mask, tasks[torch.arange(num_timesteps) * 8 // num_timesteps])


@settings(deadline=None)
@given(num_channels=st.integers(16, 200), num_clusters=st.integers(1, 8))
def test_ercddt_shares_half_and_gives_every_other_channel_to_one_cluster(
    num_channels, num_clusters
):
    mask = routing_mask("ercddt", num_clusters, num_channels, num_clusters=num_clusters)
    half = num_channels // 2
    assert mask[:, :half].all()
    assert (mask[:, half:].sum(dim=0) == 1).all()
    sizes = mask[:, half:].sum(dim=1)
    assert sizes.max() - sizes.min() <= 1
    owner = mask[:, half:].int().argmax(dim=0)
    assert (owner.diff() >= 0).all()  # segments, in the order of the clusters


@pytest.mark.parametrize("kind", [kind for kind in ROUTING_TYPES if kind != "none"])
def test_the_module_gives_each_block_the_masks_of_its_width(kind):
    spec = RoutingSpec(kind, seed=3, num_clusters=5, update_every_steps=10)
    routing = build_routing(spec, 50, [16, 32, 16])
    t = torch.tensor([0, 49, 7, 7])
    for block, (width, mask) in enumerate(zip([16, 32, 16], routing(t, step=25), strict=True)):
        expected = routing_mask(
            kind, 50, width, seed=3, block=block, step=25, update_every_steps=10, num_clusters=5
        )
        assert torch.equal(mask, expected[t])


def test_the_module_without_routing_gives_no_masks():
    routing = build_routing(RoutingSpec(), 5, [8, 8])
    assert routing(torch.tensor([0])) == [None, None]
    assert not list(routing.buffers())


def test_windows_are_two_tables_for_all_blocks_of_a_width():
    routing = build_routing(RoutingSpec("dtr"), 50, [16, 32, 16])
    tables = dict(routing.named_buffers())
    assert list(tables) == ["start_16", "stop_16", "start_32", "stop_32"]
    assert all(table.shape == (50,) and table.dtype == torch.int64 for table in tables.values())
    assert not routing.state_dict()


def test_a_spec_is_frozen_and_compares_by_value():
    spec = RoutingSpec("dtr", beta=0.5)
    assert spec == RoutingSpec("dtr", beta=0.5)
    with pytest.raises(FrozenInstanceError):
        spec.beta = 0.6  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"type": "cdtr", "num_clusters": 0}, "num_clusters = 0: not accepted; give 1 or more"),
        ({"type": "ercddt", "num_clusters": 11}, "num_clusters = 11: exceeds .*; give 1 to 10"),
        ({"type": "cdtr", "num_clusters": 11}, "num_clusters = 11: exceeds .*; give 1 to 10"),
        ({"type": "max_roaming", "update_every_steps": 0}, "update_every_steps = 0: not accepted"),
        ({"type": "random", "beta": 0.0}, "model.routing.beta = 0.0: not accepted"),
        ({"type": "nothing"}, "model.routing.type = 'nothing': not accepted; give one of none"),
    ],
)
def test_the_module_names_a_bad_setting(setting, message):
    with pytest.raises(ConfigError, match=message):
        build_routing(RoutingSpec(**setting), 10, [64])
