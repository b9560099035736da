"""Write shards: plain webdataset tars, each with an index beside it.

A sample is `<key>.npy` (the array), `<key>.cls` (the class index) and, where it has captions,
`<key>.captions.json` and `<key>.context.npy` (their tokens, float16 [captions, L, D]). The index
is int64 [samples, 4]: where the array's numbers start in the tar, the class, where the tokens'
numbers start, how many captions there are (both 0 without captions). A reader needs no tar
parsing, and any other program reads the tars without the index.
"""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dtr_scale.data.manifest import Shard
from dtr_scale.storage.folder import Folder


class StoredSample(NamedTuple):
    """What a shard holds of one sample."""

    array: np.ndarray
    label: int = 0
    captions: tuple[str, ...] = ()
    context: np.ndarray | None = None  # float16 [captions, L, D]


def shard_name(split: str, number: int) -> str:
    """Return the name of a split's shard."""
    return f"{split}-{number:06d}.tar"


def write_shard(
    folder: Folder, split: str, number: int, samples: Sequence[StoredSample], first_key: int
) -> Shard:
    """Write one shard and its index; the same samples give the same bytes, whenever and by whom.

    The tar is made in memory: a killed process leaves nothing behind in a temporary folder.
    """
    file = io.BytesIO()
    _write_tar(file, samples, first_key)
    index = _build_index(file)
    with file.getbuffer() as content:
        shard = Shard(
            name=shard_name(split, number),
            split=split,
            samples=len(samples),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        folder.write_bytes(shard.name, content)
    # Before there is an index, which says that the shard is whole.
    if (stored := folder.size(shard.name)) != shard.bytes:
        raise OSError(f"{folder.url}/{shard.name} has {stored} bytes after writing {shard.bytes}")
    folder.write_bytes(shard.index_name, index)
    return shard


def _write_tar(file: io.BytesIO, samples: Sequence[StoredSample], first_key: int) -> None:
    from webdataset.writer import TarWriter

    # Whose it is and when it was made would differ between two who write the same samples.
    with TarWriter(file, user="", group="", mtime=0) as tar:
        for key, sample in enumerate(samples, first_key):
            members = {"__key__": f"{key:09d}", "npy": sample.array, "cls": sample.label}
            if sample.context is not None:
                members |= {"captions.json": sample.captions, "context.npy": sample.context}
            tar.write(members)


def _build_index(file: io.BytesIO) -> bytes:
    """Return the .npy file of a tar's index."""
    rows: dict[str, list[int]] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            row = rows.setdefault(key, [0, 0, 0, 0])
            file.seek(member.offset_data)
            if kind == "cls":
                row[1] = int(file.read(member.size))
            elif kind.endswith("npy"):
                shape = _npy_shape(file)
                if kind == "npy":
                    row[0] = file.tell()
                else:
                    row[2:] = file.tell(), shape[0]
    content = io.BytesIO()
    np.save(content, np.array(list(rows.values()), np.int64).reshape(-1, 4))
    return content.getvalue()


def _npy_shape(file: io.BytesIO) -> tuple[int, ...]:
    """Read the header of a .npy file, up to where its numbers start."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)[0]
