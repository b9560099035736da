"""Write arrays that a test makes up as shards with a manifest, without pictures and encoders."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from dtr_scale.data.manifest import Manifest, Shard, write_manifest
from dtr_scale.prepare.writer import StoredSample, write_shard
from dtr_scale.storage.folder import Folder


def write_data(
    folder: Folder, samples: Iterable[StoredSample], samples_per_shard: int, **told: Any
) -> Manifest:
    """Write samples as split "train", and a manifest that says what is `told` of them."""
    remaining = iter(samples)
    shards: list[Shard] = []
    while content := list(islice(remaining, samples_per_shard)):
        number = len(shards)
        shards.append(write_shard(folder, "train", number, content, number * samples_per_shard))
    manifest = Manifest.model_validate({"num_classes": 1} | told | {"shards": tuple(shards)})
    write_manifest(folder, manifest)
    return manifest
