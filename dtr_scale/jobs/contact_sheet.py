"""Draw contact sheets of prepared data: a column for each class, or each picture with its class."""

import io
import logging

import torch

from dtr_scale.data.manifest import Manifest
from dtr_scale.errors import DtrScaleError
from dtr_scale.evaluation.grid import Titles, class_title, save_grid
from dtr_scale.prepare.encode import PictureEncoder
from dtr_scale.prepare.inspection import evenly_spread, places_by_class, read_samples
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

_MOST_COLUMNS = 16  # classes with a column of their own
NUM_PICTURES = 64


def contact_sheet(
    folder: Folder, manifest: Manifest, split: str, decoder: PictureEncoder, num: int
) -> bytes:
    """Return a PNG of about `num` pictures of a split, with the names of their classes."""
    num_classes, places = manifest.num_classes, None
    if 1 < num_classes <= min(_MOST_COLUMNS, num):
        places = places_by_class(folder, manifest, split, num // num_classes)
    period = num_classes if places is not None else 0
    if places is None:
        places = evenly_spread(manifest, split, num)
    x_start, labels = read_samples(folder, manifest, split, places)

    def titles(indices: range) -> list[str]:
        return [class_title(labels[index], manifest.class_names) for index in indices]

    file = io.BytesIO()
    save_grid(
        file,
        decoder.decode(torch.from_numpy(x_start)),
        titles=Titles(titles, period) if num_classes > 1 else None,
    )
    return file.getvalue()


def write_contact_sheets(folder: Folder, manifest: Manifest, decoder: PictureEncoder) -> None:
    """Write a sheet beside the shards for each split that has none; what fails is told."""
    if manifest.encoding == "pixels" and manifest.shape[0] not in (1, 3):
        return
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        name = sheet_name(split)
        try:
            if not folder.exists(name):
                sheet = contact_sheet(folder, manifest, split, decoder, NUM_PICTURES)
                folder.write_bytes(name, sheet)
                log.info("contact sheet: %s/%s", folder.url, name)
        except (DtrScaleError, OSError) as error:
            # The data is whole: a picture of it is no reason to fail.
            log.warning("%s is not drawn: %s", name, error)


def sheet_name(split: str) -> str:
    """Return the file of a split's contact sheet."""
    return f"contact_sheet_{split}.png"
