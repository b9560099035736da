"""Make a folder for what a benchmark writes, and remove it afterwards."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from dtr_scale.engines.world import World
from dtr_scale.storage.folder import Folder, open_folder


@contextmanager
def temporary_folder(place: str | None, world: World) -> Iterator[Folder]:
    """Yield the same new folder on all ranks, below `place`, local or s3://, or the temporary one.

    Rank 0 removes it. It may not exist where nothing was written.
    """
    folder = open_folder(place or tempfile.gettempdir())
    # All ranks save to one folder, so rank 0 alone draws its name.
    name = world.broadcast_object(f"dtr-scale-bench-{uuid.uuid4().hex[:8]}")
    try:
        yield folder.child(name)
    finally:
        if world.is_main:
            with contextlib.suppress(OSError):  # the error that ended it matters more
                folder.remove(name)
