"""Pictures are read as they were written, and rounded as DiT rounds them."""

import numpy as np
import pytest
import torch

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.pictures import ArrayPictures, NpzPictures, file_sha256, to_uint8


def test_levels_go_to_images_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(levels / 127.5 - 1).equal(levels)
    # Below and above each level by a bit less than half of one.
    for shift in (-0.49, 0.49):
        assert to_uint8((levels + shift) / 127.5 - 1).equal(levels)
    assert to_uint8(torch.tensor([-1.5, -1.0, 1.0, 1.5])).tolist() == [0, 0, 255, 255]


def test_the_other_rounding_is_half_a_level_darker():
    images = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trap = ((images + 1) / 2 * 255).to(torch.uint8)
    shift = to_uint8(images).float() - trap
    assert set(shift.tolist()) == {0, 1}
    assert shift.mean() == pytest.approx(0.5, abs=0.02)
    assert to_uint8(images).float().sub((images + 1) * 127.5).mean().abs() < 0.01


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_read_batch_by_batch(tmp_path, save, channels):
    stored = np.random.default_rng(0).integers(0, 256, (7, 5, 6, channels), dtype=np.uint8)
    save(tmp_path / "samples.npz", stored, np.arange(7))  # with labels, as ADM's
    pictures = NpzPictures(tmp_path / "samples.npz")
    assert (len(pictures), pictures.shape) == (7, (channels, 5, 6))
    for batch_size in (1, 3, 7, 50):
        batches = list(pictures.batches(batch_size))
        assert [len(batch) for batch in batches][:-1] == [batch_size] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate(batches), stored.transpose(0, 3, 1, 2))
    assert pictures.sha256 == file_sha256(tmp_path / "samples.npz")


def test_pictures_in_memory_are_told_apart():
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    hashes = {ArrayPictures(each, "").sha256 for each in (images, images + 1, images[:, :, ::-1])}
    assert len(hashes) == 3
    assert ArrayPictures(images.copy(), "elsewhere").sha256 in hashes
    assert [len(batch) for batch in ArrayPictures(images, "").batches(1)] == [1, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"latents": np.zeros((2, 4, 4, 3), np.uint8)}, "has no arr_0; accepted: an .npz with"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"arr_0 is float32 \[2, 4, 4, 3\]"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"arr_0 is uint8 \[2, 3, 4, 4\]"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, r"arr_0 is uint8 \[0, 4, 4, 3\]"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(EvaluationError, match=message):
        NpzPictures(tmp_path / "x.npz")


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(EvaluationError, match="cannot be read"):
        NpzPictures(path)
    path.write_bytes(b"no zip")
    with pytest.raises(EvaluationError, match="cannot be read"):
        NpzPictures(path)
    np.savez(path, np.zeros((50, 40, 40, 3), np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(NpzPictures(path).batches(50))
