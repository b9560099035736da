"""Pictures as arrays: ADM's crop, what no decoder reads, and reading ahead."""

import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtr_scale.errors import DataError
from dtr_scale.prepare import images
from dtr_scale.prepare.images import UnreadablePictureError, center_crop, read_ahead, read_picture
from tests.support.pictures import as_bytes, noise_picture


def test_halving_is_the_mean_of_blocks():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 16), np.float64)
    halved = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))  # 64 >= 2 * 16, and 32 again
    expected = halved.reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(cropped - expected).max() <= 2  # four passes, each rounded to bytes


@pytest.mark.parametrize(("width", "height"), [(50, 20), (20, 50), (33, 20), (20, 20)])
def test_the_middle_is_cropped(width, height):
    image = noise_picture(3, width, height)
    pixels = np.asarray(image)
    left, top = (width - 20) // 2, (height - 20) // 2
    expected = pixels[top : top + 20, left : left + 20]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 20)), expected)


@pytest.mark.parametrize(("width", "height"), [(7, 5), (511, 300), (64, 4000), (1025, 1024)])
@pytest.mark.parametrize("size", [8, 64])
def test_every_picture_becomes_a_square(width, height, size):
    assert center_crop(noise_picture(1, width, height), size).size == (size, size)


def test_scaling_is_bicubic_after_halving_with_a_box():
    image = noise_picture(4, 150, 90)
    halved = image.resize((75, 45), Image.Resampling.BOX)
    scaled = halved.resize((round(75 * 32 / 45), 32), Image.Resampling.BICUBIC)
    left = (scaled.width - 32) // 2
    expected = np.asarray(scaled)[:, left : left + 32]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    image = noise_picture(0).convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 256)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    image.save(path)
    array = read_picture(path, 16)
    assert (array.shape, array.dtype) == ((3, 16, 16), np.uint8)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_shades(tmp_path, dtype, kind):
    shades = np.array([[0, 255, 256, 511], [512, 1000, 32768, 65535]] * 2, dtype)
    Image.fromarray(shades).save(tmp_path / "x", kind)
    expected = [[0, 0, 1, 1], [2, 3, 128, 255]] * 2
    np.testing.assert_array_equal(read_picture(tmp_path / "x", 4), [expected] * 3)


def test_a_16_bit_png_that_pillow_opens_as_32_bits_keeps_its_shades():
    image = Image.fromarray(np.array([[0, 256, 65535]], np.int32))  # as Pillow before 11 does
    image.format = "PNG"
    assert np.asarray(images._as_rgb(image))[..., 0].tolist() == [[0, 1, 255]]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_shades_without_a_known_white_are_unreadable(tmp_path, dtype, mode):
    Image.fromarray(np.ones((16, 16), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(UnreadablePictureError, match=f"^mode {mode} does not tell .*8 or 16 bits"):
        read_picture(tmp_path / "x.tif", 16)


def test_a_picture_inside_of_a_file_is_read(tmp_path):
    content = as_bytes(noise_picture(1), "JPEG")
    (tmp_path / "x.jpg").write_bytes(content)
    (tmp_path / "tar").write_bytes(b"before" + content + b"after")
    whole = read_picture(tmp_path / "x.jpg", 16)
    np.testing.assert_array_equal(read_picture(tmp_path / "tar", 16, 6, len(content)), whole)


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "cut png", "folder", "bomb"])
def test_what_no_decoder_reads_is_one_kind_of_error(tmp_path, damage, monkeypatch):
    path = tmp_path / "picture"
    content = as_bytes(noise_picture(0, 400, 300), "PNG" if "png" in damage else "JPEG")
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("nothing")
        case "cut" | "cut png":
            path.write_bytes(content[: len(content) // 2])
        case "folder":
            path.mkdir()
        case "bomb":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            path.write_bytes(content)
    with pytest.raises(UnreadablePictureError) as caught:
        read_picture(path, 16)
    assert "0x" not in str(caught.value)


@pytest.fixture
def failing(monkeypatch):
    """Let the first `times` calls of Path.open fail; return the list of the waits in between."""
    waits: list[float] = []
    opened = Path.open

    def fail(error, times):
        left = iter([error] * times)

        def open_or_fail(*arguments, **options):
            if (failure := next(left, None)) is not None:
                raise failure
            return opened(*arguments, **options)

        monkeypatch.setattr(Path, "open", open_or_fail)
        monkeypatch.setattr(images.time, "sleep", waits.append)
        return waits

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_hiccup_of_storage_loses_no_picture(tmp_path, failing, number):
    path = tmp_path / "x.png"
    noise_picture(0).save(path)
    expected = read_picture(path, 16)
    waits = failing(OSError(number, "hiccup"), 3)
    np.testing.assert_array_equal(read_picture(path, 16), expected)
    assert waits == [0.2, 1.0, 5.0]


def test_storage_that_does_not_get_over_it_is_no_unreadable_picture(tmp_path, failing):
    failing(OSError(errno.EIO, "Input/output error"), 4)
    with pytest.raises(DataError, match=r"x.png cannot be read: Input/output error; fix: check"):
        read_picture(tmp_path / "x.png", 16)


def test_postscript_is_unreadable_and_starts_no_program(tmp_path, monkeypatch):
    """Pillow opens it by Ghostscript, whatever the file's name."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # look for it on PATH again
    (tmp_path / "x.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UnreadablePictureError, match="UnidentifiedImageError"):
        read_picture(tmp_path / "x.jpg", 16)
    assert not (tmp_path / "started").exists()


def test_a_lack_of_memory_is_no_unreadable_picture(tmp_path, monkeypatch):
    def lacking(image, size):
        raise MemoryError

    noise_picture(0).save(tmp_path / "x.png")
    monkeypatch.setattr(images, "center_crop", lacking)
    with pytest.raises(MemoryError):
        read_picture(tmp_path / "x.png", 16)


def test_answers_come_in_order_and_not_too_early():
    asked, gate = [], threading.Event()

    def read(number):
        asked.append(number)
        if number == 0:
            gate.wait(10)
        return -number

    def batches():
        for first in range(0, 100, 2):
            if first == 6:
                gate.set()
            yield [first, first + 1]

    answers = read_ahead(batches(), read, num_workers=2, ahead=3)
    assert next(answers) == [0, -1]
    assert max(asked) <= 7
    assert [n for pair in answers for n in pair] == [-n for n in range(2, 100)]


def test_reading_ahead_ends_when_nobody_wants_more():
    answers = read_ahead(([n] for n in range(10**9)), lambda n: n, num_workers=2)
    assert next(answers) == [0]
    answers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("picture")]
