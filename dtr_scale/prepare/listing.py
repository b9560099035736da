"""List the pictures of a source: folders of classes, COCO, FFHQ, and tars, never unpacked.

A picture is a place in a file, so listing reads names and tar headers alone, and any thread of
any rank reads any picture. What is hidden (`.cache`, `._x.jpg`) in folders, or in a tar of tars, is
left out.
"""

import hashlib
import json
import logging
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dtr_scale.data.manifest import one_line
from dtr_scale.errors import DataError
from dtr_scale.prepare.images import PICTURE_ENDINGS

log = logging.getLogger(__name__)

MAX_CAPTIONS = 5
_MAX_CLASSES = 10**6  # a class beyond is a mistake: every one of them has a row in the network
_SPLITS = {"train", "val", "test"}


class Picture(NamedTuple):
    """A picture of a source: `length` bytes at `offset` of a file (-1: all of it), or an array."""

    name: str
    path: str = ""
    label: int = 0
    captions: tuple[str, ...] = ()
    offset: int = 0
    length: int = -1
    array: np.ndarray | None = None
    """Pixels that are in memory already: no file is read."""


def utf8_name(name: str) -> str:
    """Return a name that JSON can hold, whatever bytes a disk or a tar has in it."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _without_surrogates(caption: str) -> str:
    r"""Return a caption that UTF-8 can hold: JSON may have half a pair of surrogates, "\ud83d"."""
    return caption.encode(errors="replace").decode().strip()


@dataclass(frozen=True)
class Listing:
    """The pictures of a source by split, in the source's own order."""

    source: str
    splits: Mapping[str, Sequence[Picture]]
    num_classes: int = 1
    class_names: tuple[str, ...] = ()
    shuffled: bool = True
    """Whether shards are dealt pictures at random; False keeps the order of a mixed source."""

    def __post_init__(self) -> None:
        for split, pictures in self.splits.items():
            if not pictures:
                raise DataError(
                    f"split {split} of the {self.source} has no pictures; fix: the path"
                )

    @property
    def has_captions(self) -> bool:
        # The first of a split tells for all: a source with captions for some is refused.
        return any(pictures[0].captions for pictures in self.splits.values())

    def sha256(self, split: str) -> str:
        """Return the hash of every picture's name, class and captions."""
        digest = hashlib.sha256()
        for picture in self.splits[split]:
            # Name, class and captions, not the place: the source may have moved at the next start.
            digest.update(json.dumps(picture[:1] + picture[2:4]).encode())
        return digest.hexdigest()


def image_folder(root: Path, split: str | None = None) -> Listing:
    """List a tree of class folders, or a tar of one tar per class as ILSVRC's.

    The sorted names of the folders are the classes (for ImageNet: the usual order). Where the
    folders are train, val or test themselves, each is a split with the classes of the first.
    """
    if root.is_file():
        return _tar_of_tars(root, split or "train")
    folders = _folders(root)
    if not _SPLITS.issuperset(folders):
        return Listing(
            "imagefolder", {split or "train": _labelled(root, folders)}, *_classes(folders)
        )
    if split is not None and split not in folders:
        raise DataError(f"{root} has no split {split!r}; accepted: {', '.join(folders)}")
    # All splits get the classes of the first, so that a label means the same in each.
    names = [split] if split else [name for name in ("train", "val", "test") if name in folders]
    folders = _folders(root / names[0])
    splits = {name: _labelled(root / name, folders) for name in names}
    return Listing("imagefolder", splits, *_classes(folders))


def one_class(root: Path, split: str = "train", source: str = "ffhq") -> Listing:
    """List a tree of pictures without classes, such as FFHQ's."""
    _must_be_a_folder(root)
    return Listing(source, {split: [Picture(n, f"{root}/{n}") for n in _picture_names(root)]})


def coco(images: Path, annotations: Path, split: str = "train") -> Listing:
    """List the pictures of a COCO JSON with their first five captions.

    A JSON of instances has none: its pictures are of one class.
    """
    _must_be_a_folder(images)
    captions: dict[int, list[str]] = defaultdict(list)
    with _reading(annotations, "a COCO JSON with images and annotations"):
        content = json.loads(annotations.read_bytes())
        # By id, so that the first five captions are the same in any copy of the JSON.
        for one in sorted(content["annotations"], key=lambda one: one["id"]):
            if "caption" in one:
                captions[one["image_id"]].append(_without_surrogates(one["caption"]))
        pictures = [
            Picture(
                image["file_name"],
                f"{images}/{image['file_name']}",
                captions=tuple(captions[image["id"]][:MAX_CAPTIONS]),
            )
            for image in sorted(content["images"], key=lambda image: image["file_name"])
        ]
    for picture in pictures:
        # Pictures of elsewhere would end up in shards that are handed on.
        if picture.name.startswith("/") or ".." in picture.name.split("/"):
            raise DataError(
                f"{annotations} names {picture.name!r}, which is not below {images}; accepted: "
                "paths relative to the folder of pictures"
            )
    _all_or_none(annotations, pictures, [bool(picture.captions) for picture in pictures], "caption")
    return Listing("coco", {split: pictures})


def webdataset(
    root: Path, split: str = "train", *, num_classes: int | None = None, with_captions: bool = False
) -> Listing:
    """List webdataset tars: KEY.jpg (.png, ...), KEY.cls, KEY.txt with a caption per line.

    `root` is a folder of tars or one of them. Without any .cls all are of one class.
    """
    tars = [root] if root.is_file() else _tars(root)
    if not tars:
        raise DataError(f"{root} has no .tar files; fix: give a folder of tars, or one tar")
    pictures: list[Picture] = []
    labelled: list[bool] = []
    for path in tars:
        with _reading(path, "an uncompressed webdataset tar"):
            for key, members in _samples(path):
                pictures.append(_picture(path, key, members, with_captions))
                labelled.append("cls" in members)
    _all_or_none(root, pictures, labelled, "class (.cls)")
    found = max((picture.label for picture in pictures), default=0) + 1
    if num_classes is not None and found > num_classes:
        raise DataError(f"{root}: --num-classes={num_classes} is too few: class {found - 1} occurs")
    return Listing("webdataset", {split: pictures}, num_classes or found)


def _tars(root: Path) -> list[Path]:
    paths = root.iterdir() if root.is_dir() else ()
    return sorted(path for path in paths if _is_tar(path.name))


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    """Tell whether a file, or a folder that it is in, starts with a dot; "./" does not count."""
    return any(part.startswith(".") for part in name.split("/") if part not in (".", ".."))


_Members = dict[str, tuple[int, int, bytes]]  # by ending: offset, length, content if it is text


def _samples(path: Path) -> Iterator[tuple[str, _Members]]:
    """Yield the samples of a tar: neighbours whose names differ after the first dot alone."""
    last, members = None, {}
    # Uncompressed alone: places in a compressed tar cannot be read at an offset.
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            ending = ending.lower()
            if not member.isfile() or not dot or not stem:
                continue
            if (key := folder + slash + stem) != last:
                if last is not None:
                    yield last, members
                last, members = key, {}
            # Classes and captions are read at once; of pictures only the place is kept.
            file = tar.extractfile(member) if ending in ("cls", "txt") else None
            text = file.read() if file else b""
            if ending in members:
                raise ValueError(f"{member.name} stands twice")
            members[ending] = member.offset_data, member.size, text
    if last is not None:
        yield last, members


def _picture(path: Path, key: str, members: _Members, with_captions: bool) -> Picture:
    # KEY.depth.png and the like are other things than the picture.
    endings = [ending for ending in members if f".{ending}" in PICTURE_ENDINGS]
    if not endings:
        found = ", ".join(f".{ending}" for ending in members)
        raise DataError(f"{path}: sample {key} has no picture, only {found}; accepted: .jpg, .png")
    if len(endings) > 1:
        names = " and ".join(f"{key}.{ending}" for ending in endings)
        raise DataError(f"{path}: {names} are pictures of one sample; accepted: one of them")
    offset, length, _ = members[endings[0]]
    label = int(members["cls"][2]) if "cls" in members else 0
    if not 0 <= label < _MAX_CLASSES:
        raise DataError(
            f"{path}: sample {key} is of class {label}; accepted: 0, 1, 2, ..., {_MAX_CLASSES - 1}"
        )
    captions: list[str] = []
    if with_captions:
        lines = members.get("txt", (0, 0, b""))[2].decode().splitlines()
        captions = [line.strip() for line in lines if line.strip()][:MAX_CAPTIONS]
        if not captions:
            raise DataError(f"{path}: sample {key} has no caption; fix: add {key}.txt to the tar")
    name = f"{path.name}/{key}.{endings[0]}"
    return Picture(name, str(path), label, tuple(captions), offset, length)


def _tar_of_tars(path: Path, split: str) -> Listing:
    pictures: list[Picture] = []
    accepted = "a folder of classes, or an uncompressed tar of one tar per class"
    with _reading(path, accepted), tarfile.open(path, "r:") as outer:
        classes = sorted(member.name for member in outer if _is_tar(member.name))
        for label, name in enumerate(classes):
            # An inner tar lies whole in the outer one: a picture's place is the sum of offsets.
            start, wnid = outer.getmember(name).offset_data, Path(name).stem
            with tarfile.open(fileobj=outer.extractfile(name), mode="r:") as inner:
                pictures += [
                    Picture(f"{wnid}/{m.name}", str(path), label, (), start + m.offset_data, m.size)
                    for m in sorted(inner, key=lambda member: member.name)
                    if m.isfile() and m.name.lower().endswith(PICTURE_ENDINGS)
                    if not _is_hidden(m.name)
                ]
    return Listing("imagefolder", {split: pictures}, *_classes([Path(n).stem for n in classes]))


def _classes(names: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    return max(1, len(names)), tuple(utf8_name(name) for name in names)


def _folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in a folder."""
    _must_be_a_folder(root)
    names = sorted(
        path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name)
    )
    if not names:
        raise DataError(f"{root} has no folders of classes; fix: for one class use the source ffhq")
    return names


def _labelled(root: Path, folders: Sequence[str]) -> list[Picture]:
    labels = {name: label for label, name in enumerate(folders)}
    pictures: list[Picture] = []
    for name in _picture_names(root):
        folder = name.partition("/")[0]
        if folder not in labels:
            known = f"{len(labels)} classes, {', '.join(folders[:3])}, ..."
            raise DataError(f"{root}/{name} is in none of the class folders; accepted: {known}")
        pictures.append(Picture(name, f"{root}/{name}", labels[folder]))
    return pictures


def _picture_names(root: Path) -> list[str]:
    """Return the sorted paths of all pictures below a folder, relative to it."""
    pictures: list[str] = []
    others: list[str] = []
    with _reading(root, "folders that can be read"):
        for folder, folders, names in os.walk(root, onerror=_raise, followlinks=True):
            below = folder[len(str(root)) :].lstrip("/")
            # In place: `os.walk` goes on with what is left in this list.
            folders[:] = [name for name in folders if not _is_hidden(name)]
            for name in names:
                if _is_hidden(name):
                    continue
                kind = pictures if name.lower().endswith(PICTURE_ENDINGS) else others
                kind.append(f"{below}/{name}" if below else name)
    if others:
        log.warning("%s: %d files have no picture's ending: %s", root, len(others), min(others))
    # Sorted, since disks list in any order and every rank must cut the same shards.
    return sorted(pictures)


def _raise(error: OSError) -> None:
    raise error  # os.walk would go on without what it cannot read


def _all_or_none(
    where: Path, pictures: Sequence[Picture], having: Iterable[bool], what: str
) -> None:
    lacking = [picture.name for picture, has in zip(pictures, having, strict=True) if not has]
    if lacking and len(lacking) < len(pictures):
        raise DataError(
            f"{where}: {len(lacking)} of {len(pictures)} pictures have no {what}, such as "
            f"{lacking[0]}; accepted: all or none; fix: add it, or leave these pictures out"
        )


def _must_be_a_folder(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is no folder; fix: give the local folder that holds the pictures")


@contextmanager
def _reading(path: Path, accepted: str) -> Iterator[None]:
    """Turn what is wrong with a file into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{path} cannot be listed ({reason}); accepted: {accepted}") from error
