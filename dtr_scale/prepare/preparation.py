"""Prepare a listing of pictures as shards with a manifest, on any number of ranks.

Shard i of a split is a function of the listing, the settings and i alone, and rank r of W makes
the shards r, r + W, ...: whatever was killed and however many ranks go on, the bytes are the same.
Pictures are dealt out to shards in a random order, fixed for ever, because training shuffles
within a window of shards and sources are sorted by class; a listing that is mixed keeps its own.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dtr_scale.data.manifest import NULL_CONTEXT_NAME, Manifest, Origin, read_manifest
from dtr_scale.errors import DataError
from dtr_scale.prepare.encode import PictureEncoder, TextEncoder
from dtr_scale.prepare.images import UnreadablePictureError, read_ahead
from dtr_scale.prepare.ledger import Ledger, ShardRecord
from dtr_scale.prepare.listing import MAX_CAPTIONS, Listing
from dtr_scale.prepare.maker import MadeShard, Progress, ShardMaker, Work
from dtr_scale.prepare.writer import write_shard
from dtr_scale.randomness import keyed_generator
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

_LOOK_AHEAD = 10_000  # pictures that are still read when too many could not be
_TAR_BLOCK = 512  # bytes: a member has a header of one, and is filled up to whole ones


class Outcome(NamedTuple):
    """How far a preparation has come."""

    manifest: Manifest | None
    """None: shards are missing, which other ranks or the next start will make."""
    stored: int = 0
    shards: int = 0


class Preparation:
    """One rank's part of writing a listing of pictures to a folder."""

    def __init__(
        self,
        listing: Listing,
        folder: Folder,
        encoder: PictureEncoder,
        text_encoder: TextEncoder | None = None,
        *,
        shard_bytes: int,
        batch_size: int = 32,
        num_workers: int = 1,
        max_unreadable: float = 0.01,
        rank: int = 0,
        world_size: int = 1,
        leaving: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._listing = listing
        self._folder = folder
        self._text_encoder = text_encoder
        self._max_unreadable = max_unreadable
        self._num_workers = num_workers
        self._rank, self._world_size = rank, world_size
        self._leaving = leaving
        self._unreadable = 0
        self._plan = plan_of(listing, encoder, text_encoder, shard_bytes)
        self._ledger = Ledger(folder, self._plan)
        self._maker = ShardMaker(
            encoder, text_encoder, batch_size=batch_size, num_workers=num_workers
        )

    def run(self) -> Outcome:
        """Make this rank's shards, and the manifest if they were the last ones.

        Raises ConfigError when the folder holds other data, DataError when too many pictures
        cannot be read. Shards that an earlier run stored are taken as they are, unless they are
        cut or removed since, or a picture that could not be read then can be now.
        """
        splits = self._ledger.begin()
        self._store_null_context()
        if not splits:
            told = "%s: all of it is there already, by its sizes; data verify reads every byte"
            log.info(told, self._folder.url)
            return Outcome(read_manifest(self._folder, split=None))
        works = [work for split in splits for work in self._works(split)]
        names = [work.name for work in works]
        done = self._ledger.finished(names)
        for work in works:
            if work.name in done and self._is_mended(work, done[work.name]):
                self._ledger.forget(done.pop(work.name))
        if done:
            log.info("going on: %d of %d shards are there", len(done), len(works))
        mine = works[self._rank :: self._world_size]
        self._make([work for work in mine if work.name not in done])
        records = self._ledger.finished(names)
        self._check_unreadable(sum(len(record.unreadable) for record in records.values()))
        manifest = None
        if len(records) == len(works):
            manifest = self._ledger.finish([records[name] for name in names])
        return Outcome(manifest, len(records), len(works))

    def _works(self, split: str) -> Iterator[Work]:
        pictures = self._listing.splits[split]
        size = self._plan.origins[split].samples_per_shard
        order = np.arange(len(pictures))
        if self._listing.shuffled:
            # No seed of the user's: prepared again, the same pictures give the same shards.
            order = keyed_generator(0, f"prepare/{split}").permutation(order)
        for number, first in enumerate(range(0, len(pictures), size)):
            some = [pictures[place] for place in order[first : first + size]]
            yield Work(split, number, first, some)

    def _is_mended(self, work: Work, record: ShardRecord) -> bool:
        """Tell whether a picture that a shard lacks can be read by now."""
        unreadable = set(record.unreadable)
        lacking = (picture for picture in work.pictures if work.told(picture) in unreadable)
        return any(self._maker.is_storable(picture) for picture in lacking)

    def _make(self, works: Sequence[Work]) -> None:
        """Make and store shards, each stored while the next is made."""
        pictures = sum(len(work.pictures) for work in works)
        progress = Progress(pictures, len(works), shown=self._rank == 0)

        def on_batch(pictures: int, unreadable: int) -> bool:
            progress.made(pictures)
            self._unreadable += unreadable
            if self._are_too_many(self._unreadable):
                self._look_ahead(works, progress.num_made)
            self._check_unreadable(self._unreadable)
            return not self._leaving()

        storing: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="storing") as thread:
            try:
                for shard in self._maker.make(works, on_batch):
                    if storing is not None:
                        # One at a time: each holds a whole shard in memory.
                        storing.result()
                    storing = thread.submit(self._store, shard, progress)
                if storing is not None:
                    storing.result()
            finally:
                progress.close()

    def _look_ahead(self, works: Sequence[Work], first: int) -> None:
        """Read on from picture `first` without encoding, so that more are named at once."""
        rest = [(work, picture) for work in works for picture in work.pictures]
        rest = rest[first : first + _LOOK_AHEAD]
        if rest:
            log.warning("too many pictures cannot be read; looking at %d more", len(rest))
        read = read_ahead(
            [[one] for one in rest],
            lambda one: self._maker.read(one[1]),
            num_workers=self._num_workers,
            ahead=2 * self._num_workers,
        )
        for (work, picture), (answer,) in zip(rest, read, strict=True):
            if isinstance(answer, UnreadablePictureError):
                self._unreadable += 1
                log.warning("%s cannot be read: %s", work.told(picture), answer)

    def _store(self, shard: MadeShard, progress: Progress) -> None:
        work = shard.work
        stored = write_shard(self._folder, work.split, work.number, shard.samples, work.first_key)
        self._ledger.add(stored, shard.unreadable, shard.sums.tolist(), shard.squares.tolist())
        progress.stored(work.name, stored.samples)

    def _store_null_context(self) -> None:
        if self._text_encoder is not None and not self._folder.exists(NULL_CONTEXT_NAME):
            content = io.BytesIO()
            np.save(content, self._text_encoder.encode([""])[0])
            self._ledger.add_null_context(content.getvalue())

    @property
    def _num_pictures(self) -> int:
        return sum(origin.pictures for origin in self._plan.origins.values())

    def _are_too_many(self, unreadable: int) -> bool:
        return unreadable > self._max_unreadable * self._num_pictures

    def _check_unreadable(self, unreadable: int) -> None:
        if self._are_too_many(unreadable):
            raise DataError(
                f"{unreadable} of {self._num_pictures} pictures cannot be read (the log names "
                f"them), more than --max-unreadable={self._max_unreadable:g} allows; fix: mend "
                "them, or allow more, and start the command again; after removing some, give "
                "another --out"
            )


def plan_of(
    listing: Listing,
    encoder: PictureEncoder,
    text_encoder: TextEncoder | None,
    shard_bytes: int,
) -> Manifest:
    """Return the manifest to be, yet without shards."""
    plan = Manifest(
        encoding=encoder.encoding,
        shape=encoder.shape,
        dtype=encoder.dtype,
        scale_factor=encoder.scale_factor,
        shift=encoder.shift,
        num_classes=listing.num_classes,
        class_names=listing.class_names,
        context_shape=text_encoder.context_shape if text_encoder else None,
        encoder=encoder.record,
        text_encoder=text_encoder.record if text_encoder else None,
        shards=(),
    )
    samples_per_shard = max(1, shard_bytes // sample_bytes(plan))
    origins = {
        split: Origin(
            source=listing.source,
            pictures=len(pictures),
            listing_sha256=listing.sha256(split),
            samples_per_shard=samples_per_shard,
        )
        for split, pictures in listing.splits.items()
    }
    return plan.model_copy(update={"origins": origins})


def sample_bytes(plan: Manifest) -> int:
    """Return about how many bytes of a tar a sample takes, with five captions if it has any."""
    shapes = [(plan.stored_shape, np.dtype(plan.dtype).itemsize)]
    if plan.context_shape is not None:
        shapes.append(((MAX_CAPTIONS, *plan.context_shape), np.dtype(np.float16).itemsize))
    size = 0
    for shape, itemsize in shapes:
        npy_bytes = 128 + int(np.prod(shape)) * itemsize
        text = 2 * _TAR_BLOCK  # the class, or the captions
        size += _TAR_BLOCK + -(-npy_bytes // _TAR_BLOCK) * _TAR_BLOCK + text
    return size
