"""Real pictures, and small networks with random weights, for tests of preparing data."""

import gzip
import io
import json
import random
import struct
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FASHION = Path("/usr/share/datasets/fashion-mnist")
EMOJI = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def noise_picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Return a smooth random picture of its own for every seed."""
    generator = np.random.default_rng(seed)
    blobs = Image.fromarray(generator.integers(0, 256, (4, 5, 3), np.uint8))
    return blobs.resize((width, height), Image.Resampling.BICUBIC)


def as_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    """Return a picture as the bytes of a file."""
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def class_folders(root: Path, sizes: Mapping[str, int], first_seed: int = 0) -> Path:
    """Write `sizes[name]` random pictures into each folder `name`."""
    seed = first_seed
    for name, size in sizes.items():
        (root / name).mkdir(parents=True)
        for i in range(size):
            (root / name / f"{i:03d}.png").write_bytes(as_bytes(noise_picture(seed)))
            seed += 1
    return root


def tar_of(members: Mapping[str, bytes]) -> bytes:
    """Return a tar with these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def captioned(root: Path, pictures: Mapping[str, bytes], captions: Mapping[str, list[str]]) -> Path:
    """Write pictures and their captions as COCO does; return the folder of both."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, (name, content) in enumerate(pictures.items()):
        (root / "images" / name).write_bytes(content)
        images.append({"id": 100 + i, "file_name": name})
        for caption in captions[name]:
            one = {"image_id": 100 + i, "id": 7 * len(annotations), "caption": caption}
            annotations.append(one)
    content = {"images": images, "annotations": annotations}
    (root / "captions.json").write_text(json.dumps(content))
    return root


def fashion_folders(root: Path, count: int) -> Path:
    """Write photos of Fashion-MNIST, 28x28 grey, into folders of their classes."""
    assert FASHION.is_dir(), "photos are missing; fix: apt-get install dataset-fashion-mnist"
    images = gzip.decompress((FASHION / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    for i, label in enumerate(labels[8 : 8 + count]):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(folder / f"{i:05d}.png")
    return root


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of bytes as an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_files(root: Path, *, num_train: int, num_val: int) -> Path:
    """Write scikit-learn's digits, 8x8, as MNIST's four files."""
    from sklearn.datasets import load_digits

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    pixels = (images.reshape(-1, 8, 8) * 15).astype(np.uint8)
    root.mkdir(parents=True)
    stop = num_train + num_val
    for prefix, part in (("train", slice(num_train)), ("t10k", slice(num_train, stop))):
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels[part]))
        of_part = labels[part].astype(np.uint8)
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(of_part))
    return root


def small_autoencoder(path: Path) -> Path:
    """Save an AutoencoderKL with random weights: 4 channels, a quarter of the size."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    AutoencoderKL(**config).save_pretrained(path)
    return path


def small_clip(path: Path, width: int = 32) -> Path:
    """Save a CLIP of open_clip with random weights and the real vocabulary."""
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    path.mkdir(parents=True)
    save_file(open_clip.CLIP(**config).state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return path


def emoji(count: int) -> dict[str, tuple[bytes, list[str]]]:
    """Return emoji as PNGs of 136x128 with five captions each, made of their Unicode names."""
    assert EMOJI.is_file(), "emoji are missing; fix: apt-get install fonts-noto-color-emoji"
    font = ImageFont.truetype(EMOJI, 109)  # the one size that its pictures have
    found: dict[str, tuple[bytes, list[str]]] = {}
    for code in range(0x1F400, 0x1F400 + count):  # animals, food, people, things
        picture = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(picture).text((0, 0), chr(code), font=font, embedded_color=True)
        name = unicodedata.name(chr(code)).lower()
        captions = [
            f"{form} of a {name}." for form in ("A drawing", "An emoji", "A picture", "An icon")
        ]
        found[f"{code:05x}.png"] = as_bytes(picture), [name, *captions]
    return found


def shapes(root: Path, count: int, size: int = 64) -> Path:
    """Draw `count` pictures each of discs, squares and stripes, in colours and places of chance."""
    chance = random.Random(0)
    for name in ("discs", "squares", "stripes"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            colour = tuple(chance.randrange(80, 256) for _ in range(3))
            x, y, r = (chance.randrange(size // 3, size // 2) for _ in range(3))
            picture = Image.new("RGB", (size, size), (20, 20, 40))
            draw = ImageDraw.Draw(picture)
            if name == "discs":
                draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=colour)
            elif name == "squares":
                draw.rectangle((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=colour)
            else:
                for left in range(x % 16, size, 16):
                    draw.rectangle((left, 0, left + 7, size), fill=colour)
            picture.save(root / name / f"{number:03}.png")
    return root
