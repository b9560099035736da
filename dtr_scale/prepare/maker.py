"""Make shards of pictures: read ahead in threads, encode in batches, sum up channels."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import numpy as np

from dtr_scale.logs import ProgressBar
from dtr_scale.prepare.encode import PictureEncoder, TextEncoder
from dtr_scale.prepare.images import UnreadablePictureError, read_ahead, read_picture
from dtr_scale.prepare.listing import Picture, utf8_name
from dtr_scale.prepare.writer import StoredSample, shard_name

log = logging.getLogger(__name__)


class Work(NamedTuple):
    """A shard to be made."""

    split: str
    number: int
    first_key: int
    pictures: list[Picture]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    def told(self, picture: Picture) -> str:
        """Return the picture's name for the manifest."""
        return f"{self.split}/{utf8_name(picture.name)}"


@dataclass
class MadeShard:
    """A shard with its samples, not stored yet."""

    work: Work
    channels: int
    samples: list[StoredSample] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = np.zeros(self.channels)  # float64 [C], of stored numbers
        self.squares = np.zeros(self.channels)

    def count(self, numbers: np.ndarray) -> None:
        """Add one sample's [C, H, W] to the sums: one by one, they do not leave the cache."""
        channels = numbers.reshape(self.channels, -1).astype(np.float64)
        self.sums += channels.sum(1)
        self.squares += np.einsum("cn,cn->c", channels, channels)


class ShardMaker:
    """Makes shards one after the other; batches never reach over the end of a shard.

    So a shard's bytes do not depend on which shards this process makes beside it.
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        text_encoder: TextEncoder | None,
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self._encoder = encoder
        self._text_encoder = text_encoder
        self._batch_size = batch_size
        self._num_workers = num_workers

    def make(
        self, works: Sequence[Work], on_batch: Callable[[int, int], bool]
    ) -> Iterator[MadeShard]:
        """Yield shards until `on_batch`, told of pictures and unreadable ones, says to stop."""
        batches = (batch for work in works for batch in self._batches(work))
        read = read_ahead(batches, self.read, num_workers=self._num_workers)
        try:
            for work in works:
                shard = MadeShard(work, self._encoder.shape[0])
                # The same batches again, in step with `read`, which is some of them ahead.
                for batch in self._batches(work):
                    before = len(shard.unreadable)
                    self._add(shard, batch, next(read))
                    if not on_batch(len(batch), len(shard.unreadable) - before):
                        return
                yield shard
        finally:
            read.close()

    def _batches(self, work: Work) -> Iterator[list[Picture]]:
        for first in range(0, len(work.pictures), self._batch_size):
            yield work.pictures[first : first + self._batch_size]

    def read(self, picture: Picture) -> np.ndarray | UnreadablePictureError:
        """Return a picture, uint8 [C, size, size], or what is wrong with it."""
        if picture.array is not None:
            return picture.array
        try:
            size = self._encoder.size
            return read_picture(picture.path, size, picture.offset, picture.length)
        except UnreadablePictureError as error:
            return error

    def is_storable(self, picture: Picture) -> bool:
        """Tell whether a picture can be read, and encoded to finite numbers."""
        answer = self.read(picture)
        return isinstance(answer, np.ndarray) and bool(
            np.isfinite(self._encoder.encode(answer[None])).all()
        )

    def _add(
        self,
        shard: MadeShard,
        batch: Sequence[Picture],
        answers: Sequence[np.ndarray | UnreadablePictureError],
    ) -> None:
        pictures: list[Picture] = []
        arrays: list[np.ndarray] = []
        for picture, answer in zip(batch, answers, strict=True):
            if isinstance(answer, UnreadablePictureError):
                _leave_out(shard, picture, f"cannot be read: {answer}")
            else:
                pictures.append(picture)
                arrays.append(answer)
        if not pictures:
            return
        stored = self._encoder.encode(np.stack(arrays))
        parts = zip(
            pictures, stored, self._encoder.means(stored), self._contexts(pictures), strict=True
        )
        for picture, array, numbers, context in parts:
            # Not stored: training would draw it again in every epoch.
            if not np.isfinite(array).all():
                _leave_out(shard, picture, "is encoded to numbers that are not finite")
            elif context is not None and not np.isfinite(context).all():
                _leave_out(shard, picture, "has captions whose tokens are not finite")
            else:
                shard.count(numbers)
                shard.samples.append(StoredSample(array, picture.label, picture.captions, context))

    def _contexts(self, pictures: Sequence[Picture]) -> Sequence[np.ndarray | None]:
        """Return the tokens of each picture's captions, float16 [captions, L, D]."""
        if self._text_encoder is None:
            return [None] * len(pictures)
        tokens = self._text_encoder.encode([text for one in pictures for text in one.captions])
        return np.split(tokens, np.cumsum([len(one.captions) for one in pictures])[:-1])


def _leave_out(shard: MadeShard, picture: Picture, reason: str) -> None:
    shard.unreadable.append(shard.work.told(picture))
    log.warning("%s %s", shard.unreadable[-1], reason)


class Progress:
    """What a person sees: a bar with pictures/s and time left, or a line per shard in a log."""

    def __init__(self, pictures: int, shards: int, *, shown: bool) -> None:
        self._pictures, self._shards = pictures, shards
        self.num_made = self._stored = 0
        self._start = time.monotonic()
        self._bar = ProgressBar("pictures", pictures, shown=shown)

    def made(self, pictures: int) -> None:
        self.num_made += pictures
        # A shard may take an hour: in a log too, it is told how far the first one is.
        self._bar.advance(pictures)

    def stored(self, name: str, samples: int) -> None:
        self._stored += 1
        speed = max(1, self.num_made) / (time.monotonic() - self._start)
        left = timedelta(seconds=round((self._pictures - self.num_made) / speed))
        told = f"{name}: {samples} samples, shard {self._stored} of {self._shards}"
        log.info("%s, %.1f pictures/s, eta %s", told, speed, left)

    def close(self) -> None:
        self._bar.close()
