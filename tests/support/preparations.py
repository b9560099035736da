"""A preparation of small shards, and what it wrote."""

from typing import Any

from s3fs import S3FileSystem

from dtr_scale.prepare.encode import PixelEncoder
from dtr_scale.prepare.listing import image_folder
from dtr_scale.prepare.preparation import Preparation

SIZE = 16
SAMPLE_BYTES = 5 * 512  # of a tar: two headers, a class, 128 + 768 bytes of an array


def preparation(source, folder, encoder=None, **options):
    listing = source if hasattr(source, "splits") else image_folder(source)
    settings: dict[str, Any] = {"shard_bytes": 10 * SAMPLE_BYTES, "batch_size": 4}
    return Preparation(listing, folder, encoder or PixelEncoder(SIZE), **settings | options)


def contents(folder):
    return {name: folder.read_bytes(name) for name in folder.names()}


def written(folder, names):
    """Return what changes whenever a file is written: inode and time, or S3's time."""
    if folder.is_local:
        stats = [(folder.local_path / name).stat() for name in names]
        return [(stat.st_ino, stat.st_mtime_ns) for stat in stats]
    return [S3FileSystem().info(f"{folder.url}/{name}")["LastModified"] for name in names]


def stop_after(batches):
    """Return what says, after so many batches, that the process should leave."""
    calls = iter(range(batches))
    return lambda: None if next(calls, None) is not None else "SIGTERM"
