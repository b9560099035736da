"""Write a source of pictures as shards, and look into what was written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dtr_scale.data.manifest import Manifest, read_manifest
from dtr_scale.errors import ConfigError, DtrScaleError
from dtr_scale.jobs.contact_sheet import contact_sheet, write_contact_sheets
from dtr_scale.launchers import launched_rank, launched_world_size, local_world_size
from dtr_scale.logs import ProgressBar, telling
from dtr_scale.prepare import digits, idx, listing
from dtr_scale.prepare.encode import (
    PictureEncoder,
    PixelEncoder,
    PosteriorEncoder,
    TextEncoder,
    decoder_of,
)
from dtr_scale.prepare.inspection import describe, verify
from dtr_scale.prepare.preparation import Preparation
from dtr_scale.signals import LeaveRequest
from dtr_scale.storage.folder import open_folder

_IDX_SHARD_BYTES = 8 * 2**20  # a window of shards is mixed, and some fifteen make 60,000 pictures


@dataclass(frozen=True)
class Writing:
    """Where and how a source is written."""

    out: str
    vae: str
    pixels: bool
    size: int | None
    """None: 64 for pixels, else 256."""
    batch_size: int
    workers: int | None
    """None: the cores of this rank."""
    shard_mb: float
    max_unreadable: float
    text_encoder: str | None = None
    text_pretrained: str = "openai"


class Prepared(NamedTuple):
    """How far this rank has come."""

    manifest: Manifest | None
    """None: shards are missing."""
    stored: int
    shards: int
    leave_reason: str | None
    """Why it was told to leave before the end, if it was."""


def prepare_image_folder(path: Path, split: str | None, writing: Writing) -> Prepared:
    """Write class folders, or a tar of one tar per class."""
    return _prepare(lambda: listing.image_folder(path, split), writing)


def prepare_one_class(path: Path, split: str, writing: Writing) -> Prepared:
    """Write a tree of pictures without classes."""
    return _prepare(lambda: listing.one_class(path, split), writing)


def prepare_coco(images: Path, annotations: Path, split: str, writing: Writing) -> Prepared:
    """Write COCO's pictures with their captions."""
    return _prepare(lambda: listing.coco(images, annotations, split), writing)


def prepare_webdataset(
    path: Path, split: str, num_classes: int | None, writing: Writing
) -> Prepared:
    """Write the pictures of webdataset tars, with captions if there is a text encoder."""
    with_captions = writing.text_encoder is not None
    return _prepare(
        lambda: listing.webdataset(
            path, split, num_classes=num_classes, with_captions=with_captions
        ),
        writing,
    )


def prepare_digits(out: str) -> Manifest | None:
    """Write scikit-learn's digits; None on ranks above 0, which have nothing to do."""
    if launched_rank() > 0:
        return None
    with _writing_errors(out):
        folder = open_folder(out)
        manifest = digits.prepare_digits(folder)
        write_contact_sheets(folder, manifest, digits.ENCODER)
        return manifest


def prepare_idx(path: Path, size: int | None, out: str) -> Manifest | None:
    """Write the grey pictures of IDX files; None on ranks above 0, which have nothing to do."""
    if launched_rank() > 0:
        return None
    with _writing_errors(out):
        pictures = idx.idx_folder(path, size)
        encoder = PixelEncoder(idx.picture_size(pictures), channels=1)
        folder = open_folder(out)
        made = Preparation(pictures, folder, encoder, shard_bytes=_IDX_SHARD_BYTES).run()
        if made.manifest is not None:
            write_contact_sheets(folder, made.manifest, encoder)
        return made.manifest


def _prepare(list_pictures: Callable[[], listing.Listing], writing: Writing) -> Prepared:
    folder = open_folder(writing.out)
    request = LeaveRequest()
    with _writing_errors(writing.out), request.listening():
        with telling("looking for pictures"):
            pictures = list_pictures()
        encoder, text_encoder = _encoders(writing, pictures)
        outcome = Preparation(
            pictures,
            folder,
            encoder,
            text_encoder,
            shard_bytes=round(writing.shard_mb * 1e6),
            batch_size=writing.batch_size,
            num_workers=writing.workers or _own_cores(),
            max_unreadable=writing.max_unreadable,
            # From the launcher's variables, without a process group: ranks exchange nothing.
            rank=launched_rank(),
            world_size=launched_world_size(),
            leaving=lambda: request.reason,
        ).run()
        if outcome.manifest is not None:
            write_contact_sheets(folder, outcome.manifest, encoder)
    return Prepared(*outcome, request.reason)


def _encoders(
    writing: Writing, pictures: listing.Listing
) -> tuple[PictureEncoder, TextEncoder | None]:
    """Return what turns this listing's pictures and captions into numbers."""
    text_encoder = None
    if pictures.has_captions and writing.text_encoder is not None:
        text_encoder = TextEncoder(writing.text_encoder, writing.text_pretrained, _device())
    if writing.pixels:
        return PixelEncoder(writing.size or 64), text_encoder
    try:
        return PosteriorEncoder(writing.vae, writing.size or 256, _device()), text_encoder
    except ConfigError as error:
        raise ConfigError(f"{error}; or give --pixels, which needs no autoencoder") from None


def _device() -> torch.device:
    """Return the device of this rank: a GPU of its own where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # More ranks than GPUs share them.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _own_cores() -> int:
    return min(16, max(1, len(os.sched_getaffinity(0)) // local_world_size()))


@contextmanager
def _writing_errors(out: str) -> Iterator[None]:
    """Turn what storage raises into one line."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out={out} cannot be written: {error.strerror or error}; choose another"
        ) from error


class Verified(NamedTuple):
    """What was found of a data set."""

    url: str
    files: int
    damaged: int
    num_bytes: int


def verify_data(url: str, tell: Callable[[str], None]) -> Verified:
    """Read and check every byte of prepared data; `tell` is given a line for each damage."""
    folder = open_folder(url)
    manifest = read_manifest(folder, split=None)
    size = sum(shard.bytes for shard in manifest.shards)
    files = damaged = 0
    done = 0
    with ProgressBar("MB", -(-size // 10**6)) as bar:
        for name, num_bytes, problem in verify(folder, manifest):
            bar.advance((done + num_bytes) // 10**6 - done // 10**6)
            done += num_bytes
            files += 1
            if problem is not None:
                damaged += 1
                with bar.cleared():
                    tell(f"{name}: {problem}")
    return Verified(folder.url, files, damaged, size)


def inspect_data(
    url: str, *, split: str | None, num_samples: int, sheet: Path, vae: str | None
) -> Iterator[str]:
    """Yield the lines of a report on prepared data, and draw a contact sheet of it."""
    folder = open_folder(url)
    manifest = read_manifest(folder, split)
    yield from describe(folder, manifest)
    try:
        decoder = decoder_of(manifest, vae, _device())
    except DtrScaleError as error:
        if vae is not None:
            raise
        yield f"no contact sheet: {error}"
        return
    drawn = split or manifest.shards[0].split
    content = contact_sheet(folder, manifest, drawn, decoder, num_samples)
    open_folder(sheet.parent).write_bytes(sheet.name, content)
    yield f"contact sheet of {drawn}: {sheet}"
