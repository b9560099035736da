"""Random draws that are functions of a position, not of a history.

Every draw of a run comes from a counter-based generator named by (seed, stream, position, salt),
so any rank, worker or device can repeat it, in any order, without the draws before it.
"""

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=256)
def _stream_key(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def keyed_generator(
    seed: int, stream: str, position: int = 0, salt: int = 0
) -> np.random.Generator:
    """Return the generator of one draw: numpy's Philox at a counter of its own.

    `stream` names what is drawn ("noise", "label_drop", ...), `position` is the place in the run
    (a sample, an epoch, a step), `salt` tells a re-draw from the first. Two calls with the same
    arguments give the same numbers; the lowest 128 bits of the counter are left to the draw.
    """
    counter = (salt << 192) | (position << 128)
    return np.random.Generator(np.random.Philox(key=_stream_key(seed, stream), counter=counter))
