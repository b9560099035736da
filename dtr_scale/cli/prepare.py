"""Parse the commands on data: `prepare SOURCE` writes a data set, `data` verifies and shows it.

As in `main`, nothing heavy is imported before a command is known.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_scale.cli.arguments import (
    Commands,
    actions,
    fraction,
    positive_integer,
    positive_number,
    runs,
    split_name,
)

if TYPE_CHECKING:
    from dtr_scale.jobs.prepare import Manifest, Prepared, Writing

EXIT_GO_ON = 75  # as training's: start the same command again

_EXAMPLES = """dtr-scale prepare imagefolder /data/imagenet --out s3://my-bucket/imagenet256/
  torchrun --nproc_per_node 8 launch/prepare.py imagefolder /data/imagenet --out /data/latents
  dtr-scale prepare digits --out s3://my-bucket/digits/"""

_VAE = "stabilityai/sd-vae-ft-ema"
_RESUME = "A run that was stopped goes on when the same command is given again."
_CAPTIONS = "captions as CLIP tokens: an open_clip name, or a folder with open_clip_config.json"


def add_prepare(commands: Commands) -> None:
    """Add the command with its sources."""
    summary = "write a data set as webdataset shards with a manifest"
    parser = commands.add("prepare", "prepare data", summary, _EXAMPLES)
    runs(parser, _image_folder, on_ranks=True)  # each source has a call of its own
    sources = actions(parser, "source")
    _add_image_folder(sources)
    _add_coco(sources)
    _add_ffhq(sources)
    _add_webdataset(sources)
    _add_digits(sources)
    _add_idx(sources)


def add_data(commands: Commands) -> None:
    """Add the command that looks into prepared data."""
    parser = commands.add(
        "data",
        "prepare data",
        "verify prepared data, or show what it holds",
        "dtr-scale data verify s3://my-bucket/imagenet256/\n"
        "  dtr-scale data inspect data/imagenet256 --num-samples 64 --sheet sheet.png",
    )
    parts = actions(parser)
    _add_verify(parts)
    _add_inspect(parts)


_Sources = Any  # argparse names the type of its sub-parsers privately


def _source(sources: _Sources, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    return sources.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  dtr-scale prepare {name} {example}",
    )


def _add_image_folder(sources: _Sources) -> None:
    parser = _source(
        sources,
        "imagefolder",
        "a tree of class folders (SRC/train and SRC/val are two splits), or ImageNet's tar of tars",
        "ILSVRC2012_img_train.tar --out data/imagenet256\n"
        "  dtr-scale prepare imagefolder /data/imagenet/val --split val --out data/imagenet256",
    )
    parser.add_argument(
        "path", type=Path, metavar="SRC", help="the folder that holds the class folders, or a tar"
    )
    _add_writing(
        parser, "default: train, or what SRC's folders say; a further split joins its manifest"
    )
    parser.set_defaults(run=_image_folder)


def _add_coco(sources: _Sources) -> None:
    parser = _source(
        sources,
        "coco",
        "COCO's pictures with their first five captions, or without from a JSON of instances",
        "--images /data/coco/train2017 --annotations captions_train2017.json --out data/coco256",
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="where the pictures are")
    add("--annotations", type=Path, required=True, metavar="JSON", help="captions or instances")
    _add_writing(parser)
    _add_text_encoder(parser, "ViT-L-14")
    parser.set_defaults(run=_coco)


def _add_ffhq(sources: _Sources) -> None:
    summary = "FFHQ, or any tree of pictures of one class"
    parser = _source(sources, "ffhq", summary, "/data/ffhq/images1024x1024 --out data/ffhq256")
    parser.add_argument("path", type=Path, metavar="SRC", help="the folder, at any depth")
    _add_writing(parser)
    parser.set_defaults(run=_ffhq)


def _add_webdataset(sources: _Sources) -> None:
    summary = "pictures of webdataset tars: KEY.jpg with KEY.cls, or KEY.txt with captions"
    parser = _source(sources, "webdataset", summary, "/data/tars --out s3://my-bucket/latents/")
    parser.add_argument("path", type=Path, metavar="SRC", help="a folder of tars, or one")
    parser.add_argument(
        "--num-classes", type=positive_integer, help="default: the largest class that occurs + 1"
    )
    _add_writing(parser)
    _add_text_encoder(parser, None)
    parser.set_defaults(run=_webdataset)


def _add_digits(sources: _Sources) -> None:
    summary = "scikit-learn's handwritten digits, 8x8, 10 classes; needs no download"
    parser = _source(sources, "digits", summary, "--out data/digits")
    parser.add_argument("--out", required=True, metavar="DIR_OR_S3", help="folder or s3:// prefix")
    parser.set_defaults(run=_digits)


def _add_idx(sources: _Sources) -> None:
    summary = "grey pictures of IDX files: MNIST, Fashion-MNIST and the like"
    example = "/usr/share/datasets/fashion-mnist --size 32 --out data/fashion32"
    parser = _source(sources, "idx", summary, example)
    parser.add_argument("path", type=Path, metavar="SRC", help="folder of train-* and t10k-* files")
    parser.add_argument("--out", required=True, metavar="DIR_OR_S3", help="folder or s3:// prefix")
    parser.add_argument(
        "--size", type=positive_integer, help="pad with black to this (default: as they are)"
    )
    parser.set_defaults(run=_idx)


def _add_verify(parts: _Sources) -> None:
    summary = "read and check every byte of prepared data; exit with 1 if any is damaged"
    parser = parts.add_parser("verify", help=summary, description=summary)
    parser.add_argument("url", metavar="DIR_OR_S3", help="where the manifest is")
    runs(parser, _verify)


def _add_inspect(parts: _Sources) -> None:
    summary = "tell what prepared data holds, and draw a contact sheet of it"
    parser = parts.add_parser("inspect", help=summary, description=summary)
    parser.add_argument("url", metavar="DIR_OR_S3", help="where the manifest is")
    parser.add_argument("--split", help="of the contact sheet (default: the first)")
    parser.add_argument("--num-samples", type=positive_integer, default=64, help="pictures")
    parser.add_argument(
        "--sheet",
        type=Path,
        default=Path("contact_sheet.png"),
        metavar="PNG",
        help="the contact sheet to write",
    )
    parser.add_argument(
        "--vae", help="decodes latents (default: the one that encoded them, if it is on this disk)"
    )
    runs(parser, _inspect)


def _add_writing(parser: argparse.ArgumentParser, split: str = "default: train") -> None:
    add = parser.add_argument
    add("--out", required=True, metavar="DIR_OR_S3", help="folder or s3:// prefix")
    add("--split", type=split_name, help=split)
    add(
        "--size",
        type=positive_integer,
        help="of the square pictures (default: 256, with --pixels 64)",
    )
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--vae", default=_VAE, help="autoencoder: a hub's name, or a folder")
    stored.add_argument(
        "--pixels", action="store_true", help="no autoencoder: store uint8 pictures"
    )
    add("--batch-size", type=positive_integer, default=32, help="pictures encoded at once")
    add("--workers", type=positive_integer, help="threads that decode (default: this rank's cores)")
    add("--shard-mb", type=positive_number, default=256.0, help="size of a shard, about")
    add(
        "--max-unreadable",
        type=fraction,
        default=0.01,
        metavar="FRACTION",
        help="of the pictures that may be broken; the manifest lists them, more are an error",
    )
    parser.description = f"{parser.description} {_RESUME}"


def _add_text_encoder(parser: argparse.ArgumentParser, default: str | None) -> None:
    told = _CAPTIONS if default else f"{_CAPTIONS} (default: no captions)"
    parser.add_argument("--text-encoder", default=default, metavar="NAME", help=told)
    parser.add_argument(
        "--text-pretrained",
        default="openai",
        metavar="WEIGHTS",
        help="a tag of open_clip or a file",
    )


def _image_folder(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_image_folder

    return _tell(
        arguments, prepare_image_folder(arguments.path, arguments.split, _writing(arguments))
    )


def _ffhq(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_one_class

    split = arguments.split or "train"
    return _tell(arguments, prepare_one_class(arguments.path, split, _writing(arguments)))


def _coco(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_coco

    places = arguments.images, arguments.annotations
    return _tell(arguments, prepare_coco(*places, arguments.split or "train", _writing(arguments)))


def _webdataset(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_webdataset

    split, classes = arguments.split or "train", arguments.num_classes
    return _tell(arguments, prepare_webdataset(arguments.path, split, classes, _writing(arguments)))


def _writing(arguments: argparse.Namespace) -> "Writing":
    from dataclasses import fields

    from dtr_scale.jobs.prepare import Writing

    # Options are named as the fields; the source's own, such as --images, are left out.
    given = vars(arguments)
    return Writing(**{f.name: given[f.name] for f in fields(Writing) if f.name in given})


def _digits(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_digits

    if (manifest := prepare_digits(arguments.out)) is not None:
        _tell_manifest(arguments.out, manifest)
    return 0


def _idx(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import prepare_idx

    manifest = prepare_idx(arguments.path, arguments.size, arguments.out)
    if manifest is not None:
        _tell_manifest(arguments.out, manifest)
    return 0


def _tell(arguments: argparse.Namespace, prepared: "Prepared") -> int:
    """Print how far a preparation has come, and return the exit code."""
    if prepared.manifest is not None:
        _tell_manifest(arguments.out, prepared.manifest)
        return 0
    print(f"{prepared.stored} of {prepared.shards} shards are stored", end="", file=sys.stderr)
    if prepared.leave_reason is None:
        print("; the rank that stores the last one writes the manifest", file=sys.stderr)
        return 0
    reason = prepared.leave_reason
    print(f"; told to leave ({reason}): start the command again to go on", file=sys.stderr)
    return EXIT_GO_ON


def _tell_manifest(out: str, manifest: "Manifest") -> None:
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        shards, samples = manifest.split(split), manifest.num_samples(split)
        many = "s" if len(shards) > 1 else ""
        print(f"{split}: {samples:,} samples in {len(shards):,} shard{many}")
    if manifest.unreadable:
        print(f"unreadable: {len(manifest.unreadable)} pictures, listed in the manifest")
    place = out.rstrip("/")
    print(f"manifest: {place}/manifest.json")
    file = f"{place.rpartition('/')[2]}.json"
    print(f"next: dtr-scale config init --data {shlex.quote(place)} --out {shlex.quote(file)}")


def _verify(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import verify_data

    found = verify_data(arguments.url, print)
    verdict = f"{found.damaged} of {found.files} files damaged"
    if not found.damaged:
        verdict = f"{found.files} files as written"
    print(f"{found.url}: {verdict}, {found.num_bytes / 1e9:.3f} GB")
    return 1 if found.damaged else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from dtr_scale.jobs.prepare import inspect_data

    lines = inspect_data(
        arguments.url,
        split=arguments.split,
        num_samples=arguments.num_samples,
        sheet=arguments.sheet,
        vae=arguments.vae,
    )
    for line in lines:
        print(line)
    return 0
