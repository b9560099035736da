"""Keyed draws: the same numbers from a generator that is made and from one that is moved."""

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.randomness import KeyedStream, keyed_generator

words = st.integers(0, 2**64 - 1)


@given(words, st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_a_moved_generator_is_a_new_one(seed, keys):
    stream = KeyedStream(seed, "noise")
    for position, salt in keys:
        moved, made = stream.at(position, salt), keyed_generator(seed, "noise", position, salt)
        for draw in ("standard_normal", "random"):  # the first leaves numbers behind
            numbers = getattr(moved, draw)(3, dtype=np.float32)
            np.testing.assert_array_equal(numbers, getattr(made, draw)(3, dtype=np.float32))


def test_uniform_numbers_belong_to_their_positions():
    stream = KeyedStream(3, "flip")
    numbers = stream.uniform(np.array([5, 9, 5]), salt=2)
    expected = [keyed_generator(3, "flip", position, 2).random() for position in (5, 9, 5)]
    assert numbers.tolist() == expected
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.uniform(np.array([9]), 2) == expected[1]
