"""Read pictures as arrays: decode them, crop as ADM does, and read ahead in threads."""

import io
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from dtr_scale.errors import DataError

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
# Of these endings. Pillow left to itself looks at the content and starts Ghostscript, a program
# with files and pipes at its hand, on PostScript that is named .jpg.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_READ_AGAIN_SECONDS = (0.2, 1.0, 5.0)  # waits after what storage may get over

_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


class UnreadablePictureError(Exception):
    """No decoder makes a picture of these bytes."""


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centre [size, size] of a picture whose shorter side is scaled to `size`.

    As guided-diffusion's center_crop_arr: halved with a box filter as long as the shorter side is
    at least twice the size, then bicubic.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_picture(path: str | Path, size: int, offset: int = 0, length: int = -1) -> np.ndarray:
    """Return a picture as uint8 [3, size, size], of a file or of `length` bytes inside of one.

    Raises UnreadablePictureError, whatever the decoder's complaint, and DataError when storage does
    not give the bytes: that says nothing about the picture.
    """
    content = _read_bytes(Path(path), offset, length)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data and palettes: nothing is wrong with x
            image = _as_rgb(Image.open(io.BytesIO(content), formats=_FORMATS))
        pixels = np.asarray(center_crop(image, size))
    except (MemoryError, UnreadablePictureError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        # Pillow ends with the buffer's address, which would differ at each start.
        reason = str(error).partition(" <_io.")[0]
        raise UnreadablePictureError(f"{type(error).__name__}: {reason}") from error
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def picture_size(path: str | Path) -> tuple[int, int]:
    """Return width and height of a file's picture by its header; UnreadablePictureError if none."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.size
    except (OSError, ValueError) as error:  # a kind of OSError, too, for what is no picture
        raise UnreadablePictureError(f"{type(error).__name__}: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB of 8 bits a channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # The upper 8 bits. Pillow's `convert` cuts 16 bits off at 255, which makes pictures white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnreadablePictureError(
            f"mode {image.mode} does not tell which number is white; accepted: 8 or 16 bits"
        )
    return image.convert("RGB")


def _read_bytes(path: Path, offset: int, length: int) -> bytes:
    for wait in (*_READ_AGAIN_SECONDS, None):
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(length)
        except (FileNotFoundError, IsADirectoryError, ValueError) as error:  # or no file's name
            reason = error.strerror if isinstance(error, OSError) else error
            raise UnreadablePictureError(f"{type(error).__name__}: {reason}") from error
        except OSError as error:
            if wait is None:
                raise DataError(
                    f"{path} cannot be read: {error.strerror or error}; "
                    "fix: check the storage and the file's permissions, and start again"
                ) from error
            # Storage may get over it. Taken for unreadable, a good picture would be left out.
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def read_ahead(
    batches: Iterable[list[_Asked]],
    read: Callable[[_Asked], _Answer],
    *,
    num_workers: int,
    ahead: int = 3,
) -> Generator[list[_Answer]]:
    """Yield the answers to one batch after the other, while threads work `ahead` batches on.

    Threads do: Pillow decodes and scales without the interpreter's lock.
    """
    waiting: deque[list[Future[_Answer]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="picture")
    try:
        for batch in batches:
            waiting.append([pool.submit(read, asked) for asked in batch])
            if len(waiting) > ahead:
                yield [answer.result() for answer in waiting.popleft()]
        while waiting:
            yield [answer.result() for answer in waiting.popleft()]
    finally:
        # Also where the caller stops early: what is queued is not read any more.
        pool.shutdown(cancel_futures=True)
