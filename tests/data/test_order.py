"""The global order is a pure function: complete, the same however it is split, and seekable."""

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.data.order import GlobalOrder

orders = st.builds(
    GlobalOrder,
    shard_samples=st.lists(st.integers(0, 12), min_size=1, max_size=9).map(
        lambda sizes: (*sizes, 1)  # at least one sample
    ),
    seed=st.integers(0, 2**31),
    window_shards=st.integers(1, 6),
)


@given(orders, st.integers(0, 5))
def test_every_epoch_has_every_sample_once(order, epoch):
    start = epoch * order.num_samples
    seen = Counter(order.samples(start, start + order.num_samples))
    every = {(s, i) for s, size in enumerate(order.shard_samples) for i in range(size)}
    assert seen == Counter(every)


@given(orders, st.integers(0, 60), st.integers(0, 30))
def test_seeking_equals_running_there(order, start, length):
    running = order.samples(0, start + length)
    assert order.samples(start, start + length) == running[start:]
    located = [order.locate(position) for position in range(start, start + length)]
    assert [(shard, index) for _, shard, index in located] == running[start:]
    assert all(epoch == (start + k) // order.num_samples for k, (epoch, _, _) in enumerate(located))


@given(orders, st.integers(0, 9), st.sampled_from([(1, 12), (2, 3), (3, 2), (4, 3), (6, 1)]))
def test_a_global_batch_is_the_same_at_any_split(order, step, split):
    world_size, micro_batch_size = split
    batch = order.samples(step * 12, (step + 1) * 12)
    pieces = [
        order.samples(first, first + micro_batch_size)
        for rank in range(world_size)
        for first in range(
            step * 12 + rank * 12 // world_size,
            step * 12 + (rank + 1) * 12 // world_size,
            micro_batch_size,
        )
    ]
    assert list(itertools.chain(*pieces)) == batch


@given(orders, st.integers(0, 200))
def test_the_shards_ahead_hold_the_next_samples(order, position):
    ahead = order.shards_ahead(position)
    assert len(set(ahead)) == len(ahead) <= 2 * order.window_shards
    _, shard, _ = order.locate(position)
    assert shard in ahead[: order.window_shards]


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_epochs_and_seeds_differ(seed):
    order = GlobalOrder((40, 40, 40), seed, window_shards=2)
    first, second = order.samples(0, 120), order.samples(120, 240)
    assert first != second
    assert first != GlobalOrder((40, 40, 40), seed + 1, window_shards=2).samples(0, 120)
    assert len({shard for shard, _ in first[:80]}) == 2  # a window mixes two shards
    assert first[:80] != sorted(first[:80])


def test_a_position_far_away_is_as_cheap():
    order = GlobalOrder((1000,) * 1281, seed=0)
    assert order.locate(10**12)[0] == 10**12 // order.num_samples
