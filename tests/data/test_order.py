"""The global order is a pure function: complete, the same however it is split, and seekable."""

import heapq
import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.data.order import GlobalOrder, lane_major

orders = st.builds(
    GlobalOrder,
    shard_samples=st.lists(st.integers(0, 12), min_size=1, max_size=9).map(
        lambda sizes: (*sizes, 1)  # at least one sample
    ),
    seed=st.integers(0, 2**31),
    window_shards=st.integers(1, 6),
    num_lanes=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
BATCH = 12


def _located(order, start, stop):
    return [tuple(pair) for pair in order.samples(range(start, stop)).tolist()]


@given(orders, st.integers(0, 5))
def test_every_epoch_has_every_sample_once(order, epoch):
    start = epoch * order.num_samples
    seen = Counter(_located(order, start, start + order.num_samples))
    every = {(s, i) for s, size in enumerate(order.shard_samples) for i in range(size)}
    assert seen == Counter(every)


@given(orders, st.integers(0, 60), st.integers(0, 30))
def test_resuming_equals_running_there(order, start, length):
    running = _located(order, 0, start + length)
    resumed = GlobalOrder(order.shard_samples, order.seed, order.window_shards, order.num_lanes)
    assert _located(resumed, start, start + length) == running[start:]


@given(orders, st.integers(0, 9), st.sampled_from([(1, 12), (2, 3), (3, 2), (4, 3), (6, 1)]))
def test_a_global_batch_is_the_same_at_any_split(order, step, split):
    world_size, micro_batch_size = split
    batch = _located(order, step * BATCH, (step + 1) * BATCH)
    places = lane_major(BATCH, order.num_lanes)
    found = {}
    for rank in places.reshape(world_size, -1):
        for micro in rank.reshape(-1, micro_batch_size):
            located = order.samples(step * BATCH + micro).tolist()
            found |= dict(zip(micro.tolist(), map(tuple, located), strict=True))
    assert [found[place] for place in range(BATCH)] == batch


@given(st.integers(1, 12), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_consecutive_ranks_share_few_lanes(node_ranks, num_lanes):
    for world_size in (1, 2, 3, 4, 6, 12):
        ranks = lane_major(BATCH, num_lanes).reshape(world_size, -1)
        for first in range(0, world_size, node_ranks):
            lanes = np.unique(ranks[first : first + node_ranks] % num_lanes)
            assert len(lanes) <= -(-node_ranks * num_lanes // world_size) + 1


@given(
    st.integers(1, 30), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 2**31)
)
def test_a_lane_needs_its_part_of_the_shards(num_shards, size, num_lanes, seed):
    order = GlobalOrder((size,) * num_shards, seed, window_shards=2, num_lanes=num_lanes)
    for lane in range(num_lanes):
        positions = [p for p in range(order.num_samples) if p % num_lanes == lane]
        located = order.samples(np.array(positions, np.int64))
        assert len(set(located[:, 0].tolist())) <= -(-num_shards // num_lanes) + 1


@given(orders, st.integers(0, 60), st.data())
def test_next_uses_are_those_that_come(order, position, data):
    lanes = data.draw(st.sets(st.integers(0, order.num_lanes - 1), min_size=1))
    end = (position // order.num_samples + 2) * order.num_samples
    mine = [p for p in range(position, end) if p % order.num_lanes in lanes]
    first_reads = {}
    for p, (shard, _) in zip(mine, order.samples(np.array(mine, np.int64)).tolist(), strict=True):
        first_reads.setdefault(shard, p)
    windows = heapq.merge(*(order.windows(lane, position) for lane in lanes))
    begins = {}  # of each shard's next window; inside windows the samples are mixed
    for window in itertools.takewhile(lambda window: window.first < end, windows):
        for shard in window.shards:
            begins.setdefault(shard, window.first)
    assert order.shards_ahead(position, sorted(lanes)) == list(begins)
    assert list(begins.values()) == sorted(begins.values())
    assert all(begins[shard] <= at for shard, at in first_reads.items())
    read = [shard for shard, begin in begins.items() if begin >= position]
    assert {shard for shard in read if order.shard_samples[shard]} <= first_reads.keys()


@given(orders, st.integers(0, 60), st.data())
def test_windows_follow_each_other(order, position, data):
    lane = data.draw(st.integers(0, order.num_lanes - 1))
    windows = itertools.islice(order.windows(lane, position), 4)
    for window, following in itertools.pairwise(windows):
        assert window.first % order.num_lanes == lane
        inside = range(window.first, following.first, order.num_lanes)
        assert set(order.samples(inside)[:, 0].tolist()) <= set(window.shards)


@given(orders, st.integers(0, 200), st.data())
def test_two_windows_of_each_lane_hold_what_is_read_now(order, position, data):
    lanes = data.draw(st.sets(st.integers(0, order.num_lanes - 1), min_size=1))
    wanted = order.shards_of_two_windows(position, sorted(lanes))
    assert len(set(wanted)) == len(wanted) <= 2 * order.window_shards * len(lanes)
    now = np.arange(position, position + order.num_lanes)
    located = order.samples(now[np.isin(now % order.num_lanes, list(lanes))])
    assert set(located[:, 0].tolist()) <= set(wanted[: order.window_shards * len(lanes)])


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_epochs_and_seeds_differ(seed):
    order = GlobalOrder((40, 40, 40), seed, window_shards=2)
    first, second = _located(order, 0, 120), _located(order, 120, 240)
    assert first != second
    assert first != _located(GlobalOrder((40, 40, 40), seed + 1, window_shards=2), 0, 120)
    assert len({shard for shard, _ in first[:80]}) == 2  # a window mixes two shards
    assert first[:80] != sorted(first[:80])


def test_each_epoch_has_the_shards_in_another_order():
    order = GlobalOrder((3,) * 20, seed=0, window_shards=1)
    epochs = [
        tuple(dict.fromkeys(shard for shard, _ in _located(order, first, first + 60)))
        for first in range(0, 300, 60)
    ]
    assert len(set(epochs)) == 5
    assert {tuple(sorted(shards)) for shards in epochs} == {tuple(range(20))}


def test_lanes_are_shuffled_apart():
    order = GlobalOrder((40,) * 4, seed=0, num_lanes=2)
    even, odd = (order.samples(np.arange(lane, 160, 2)) for lane in range(2))
    assert not set(even[:, 0].tolist()) & set(odd[:, 0].tolist())
    assert even[:, 1].tolist() != odd[:, 1].tolist()


def test_a_position_far_away_is_as_cheap():
    order = GlobalOrder((1000,) * 1281, seed=0, num_lanes=8)
    assert order.samples(range(10**12, 10**12 + 1)).shape == (1, 2)
    assert len(order._shuffled) == 1  # one window was shuffled, none before it
