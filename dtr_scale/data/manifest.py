"""Describe what a folder of shards holds, and read and check that description."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from dtr_scale.errors import DataError
from dtr_scale.storage.folder import Folder

MANIFEST_NAME = "manifest.json"
NULL_CONTEXT_NAME = "null_context.npy"

# Of a file in the folder itself: a manifest of somebody else's must not lead out of it.
ShardName = Annotated[str, Field(pattern=r"^\w[\w.-]*\.tar$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# No pydantic model, each of which has a dict and a set of its own: 100,000 shards then take 40 MB
# of every rank and worker instead of 200.
@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Shard:
    """One tar of a split, with the sizes and hashes that it and its index must have."""

    name: ShardName
    split: str
    samples: NonNegativeInt
    bytes: PositiveInt
    sha256: Sha256
    index_sha256: Sha256

    @property
    def index_name(self) -> str:
        """Name of the file that tells where in the tar the samples' numbers lie."""
        return f"{self.name.removesuffix('.tar')}.index.npy"


class Encoder(_Record):
    """The network that made stored numbers of pictures or captions."""

    name: str
    sha256: Sha256
    """Of its weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of its matrix products and convolutions."""


class Origin(_Record):
    """The pictures that a split was made of, and how they were dealt out to shards."""

    source: str
    pictures: PositiveInt
    listing_sha256: Sha256
    """Of every picture's name, class and captions, in the source's order."""
    samples_per_shard: PositiveInt


class Manifest(_Record):
    """The contents of a folder of shards, where x_start = stored * scale_factor + shift.

    "pixels" stores arrays [C, H, W]; "posterior" stores [2, 2, C, H, W]: for the image and its
    mirror image the mean and standard deviation of the encoder's posterior.
    """

    format: Literal[2] = 2
    encoding: Literal["pixels", "posterior"]
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    dtype: Literal["uint8", "float16", "float32"]
    scale_factor: float = 1.0
    shift: float = 0.0
    num_classes: PositiveInt
    class_names: tuple[str, ...] = ()
    context_shape: tuple[PositiveInt, PositiveInt] | None = None
    """Tokens of a caption and their width, where conditions are texts."""
    null_context_sha256: Sha256 | None = None
    """Of `null_context.npy`, the tokens of the empty caption, float16 of `context_shape`."""
    encoder: Encoder | None = None
    text_encoder: Encoder | None = None
    channel_mean: tuple[float, ...] = ()
    """Of x_start over split "train", without draws."""
    channel_std: tuple[float, ...] = ()
    unreadable: tuple[str, ...] = ()
    """What the source listed and no decoder could read: <split>/<name in the source>."""
    origins: dict[str, Origin] = {}
    """By split, where it was made of a listing of pictures."""
    shards: tuple[Shard, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of one stored array."""
        return self.shape if self.encoding == "pixels" else (2, 2, *self.shape)

    def hash(self, split: str) -> str:
        """Return the sha256 of the canonical JSON without other splits: it names a run's data.

        What is told about the numbers, but does not change them, may change later.
        """
        told = {"origins", "unreadable", "channel_mean", "channel_std"}
        data = self.model_copy(update={"shards": self.split(split)})
        content = data.model_dump(mode="json", exclude=told)
        # The same data must give the same name, so keys are sorted and nothing is indented.
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def split(self, name: str) -> tuple[Shard, ...]:
        """Return the shards of one split, in the order in which they were written."""
        return tuple(shard for shard in self.shards if shard.split == name)

    def num_samples(self, split: str) -> int:
        """Return how many samples a split has."""
        return sum(shard.samples for shard in self.split(split))

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """Return x_start, float32 [C, H, W], of a stored array; of a posterior, of its mean."""
        numbers = stored[0, 0] if self.encoding == "posterior" else stored
        return numbers.astype(np.float32) * np.float32(self.scale_factor) + np.float32(self.shift)


def read_manifest(folder: Folder, split: str | None = "train") -> Manifest:
    """Return the manifest of a folder; DataError unless it describes samples of `split`, if any."""
    with data_errors(folder, MANIFEST_NAME):
        content = folder.read_bytes(MANIFEST_NAME)
    where = f"{folder.url}/{MANIFEST_NAME}"
    fix = "fix: prepare the data again (dtr-scale prepare)"
    if not content.strip():
        raise DataError(f"{where} is empty, a JSON manifest is expected; {fix}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("format",) and isinstance(first["input"], int) and first["input"] > 2:
            raise DataError(
                f"{where}: format {first['input']} is newer than this dtr-scale, which reads "
                "format 2; fix: install the dtr-scale that wrote it"
            ) from error
        field = ".".join(map(str, first["loc"])) or "the file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise DataError(f"{where}: {field}: {first['msg']}{more}; {fix}") from error
    if not manifest.shards:
        raise DataError(f"{where} lists no shards; {fix}")
    for name, times in Counter(shard.name for shard in manifest.shards).items():
        if times > 1:  # each time would be trained on
            raise DataError(f"{where} lists shard {name} {times} times; list it once")
    if split is None:
        return manifest
    if not manifest.split(split):
        splits = ", ".join(sorted({shard.split for shard in manifest.shards}))
        raise DataError(f"{where} has no split {split!r}; accepted: {splits}")
    if not manifest.num_samples(split):
        raise DataError(f"{where}: the shards of split {split!r} hold 0 samples; {fix}")
    return manifest


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest: the last step, which makes the shards a data set."""
    folder.write_bytes(MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def data_errors(folder: Folder, name: str) -> Iterator[None]:
    """Turn what storage raises about a file of the data set into one line that names the fix."""
    try:
        yield
    except OSError as error:
        reason = one_line(error)
        if isinstance(error, FileNotFoundError):
            fix = "fix: check the folder, or prepare the data (dtr-scale prepare)"
            # On disk the reason is the same again: no such file.
            why = "" if folder.is_local else f" ({reason})"
            message = f"{name} is missing in {folder.url}{why}; {fix}"
        elif isinstance(error, PermissionError):
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or data.storage_options"
            fix = "the file's permissions" if folder.is_local else keys
            message = f"no access to {name} in {folder.url} ({reason}); fix: check {fix}"
        else:
            server = "AWS_ENDPOINT_URL or data.storage_options.endpoint_url, and the server"
            fix = "the disk" if folder.is_local else server
            message = f"cannot read {name} in {folder.url} ({reason}); fix: check {fix}"
        raise DataError(message) from error
