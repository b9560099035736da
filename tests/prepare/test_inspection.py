"""Damage of every kind is found, and what is in a folder is told and shown."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dtr_scale.data.manifest import NULL_CONTEXT_NAME, read_manifest, write_manifest
from dtr_scale.errors import DataError
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.prepare.encode import PixelEncoder, TextEncoder
from dtr_scale.prepare.inspection import (
    describe,
    evenly_spread,
    places_by_class,
    read_samples,
    verify,
)
from dtr_scale.prepare.listing import coco
from dtr_scale.prepare.preparation import Preparation
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import as_bytes, captioned, noise_picture, small_clip
from tests.support.shards import write_data


@pytest.fixture(scope="module")
def captions_data(tmp_path_factory):
    """Nine captioned pictures in three shards."""
    path = tmp_path_factory.mktemp("captions")
    captions = {f"{i}.png": ["one", f"two {i}"] for i in range(9)}
    pictures = {name: as_bytes(noise_picture(i)) for i, name in enumerate(captions)}
    root = captioned(path / "coco", pictures, captions)
    listing = coco(root / "images", root / "captions.json")
    text_encoder = TextEncoder(str(small_clip(path / "clip")), "", torch.device("cpu"))
    folder = open_folder(path / "out")
    encoders = PixelEncoder(16), text_encoder
    made = Preparation(listing, folder, *encoders, shard_bytes=10**5, batch_size=4).run()
    assert made.manifest is not None
    return folder


def damages(folder):
    return {
        name: problem
        for name, _, problem in verify(folder, read_manifest(folder, split=None))
        if problem
    }


@pytest.fixture
def copy(captions_data, folder):
    """A copy to be damaged, on disk and on S3."""
    for name in captions_data.names():
        folder.write_bytes(name, captions_data.read_bytes(name))
    return folder


def test_whole_data_is_whole(copy):
    manifest = read_manifest(copy)
    files = list(verify(copy, manifest))
    assert [problem for *_, problem in files if problem] == []
    expected = [NULL_CONTEXT_NAME, *(n for s in manifest.shards for n in (s.name, s.index_name))]
    assert sorted(name for name, *_ in files) == sorted(expected)
    assert sum(size for _, size, _ in files) == sum(shard.bytes for shard in manifest.shards)


def test_every_damage_is_named(copy):
    manifest = read_manifest(copy)
    first, second, third = manifest.shards[:3]
    content = bytearray(copy.read_bytes(first.name))
    content[len(content) // 2] ^= 1
    copy.write_bytes(first.name, bytes(content))
    copy.remove(second.name)
    copy.write_bytes(third.name, copy.read_bytes(third.name)[:-10240])
    copy.write_bytes(second.index_name, copy.read_bytes(second.index_name)[:-32])
    copy.remove(third.index_name)
    copy.write_bytes(NULL_CONTEXT_NAME, copy.read_bytes(NULL_CONTEXT_NAME)[:-2])
    altered = "its bytes are not those that were written"
    assert damages(copy) == {
        first.name: altered,
        second.name: "missing",
        third.name: f"{third.bytes - 10240} bytes, the manifest says {third.bytes}",
        second.index_name: altered,
        third.index_name: "missing",
        NULL_CONTEXT_NAME: altered,
    }


def test_a_manifest_that_counts_wrong_is_told(copy):
    manifest = read_manifest(copy)
    first = replace(manifest.shards[0], samples=77)
    write_manifest(copy, manifest.model_copy(update={"shards": (first, *manifest.shards[1:])}))
    (problem,) = damages(copy).values()
    assert problem == f"{manifest.shards[0].samples} samples, the manifest says 77"


def test_numbers_that_are_not_finite_are_told(folder, monkeypatch):
    """Also where a shard is read in many pieces; in the tokens of captions, too."""
    arrays = np.ones((9, 2, 2, 4, 4, 4), np.float16)
    arrays[3, 1, 0, 2, 1, 1], arrays[8, 0, 0, 0, 0, 0] = np.nan, np.inf
    tokens = np.ones((9, 2, 3, 5), np.float16)
    tokens[5, 1, 2, 4] = -np.inf
    samples = [
        StoredSample(array, 0, ("a", "b"), context)
        for array, context in zip(arrays, tokens, strict=True)
    ]
    told = {"encoding": "posterior", "shape": (4, 4, 4), "dtype": "float16"}
    manifest = write_data(folder, samples, 5, **told, context_shape=(3, 5))
    for num_bytes in (32 * 2**20, 1024, 100):
        monkeypatch.setattr("dtr_scale.prepare.inspection._PIECE_BYTES", num_bytes)
        assert {name: problem for name, _, problem in verify(folder, manifest) if problem} == {
            "train-000000.tar": "numbers that are not finite in samples 3",
            "train-000001.tar": "numbers that are not finite in samples 0, 3",
        }


def test_a_class_too_many_is_told(folder):
    manifest = prepare_digits(folder)
    write_manifest(folder, manifest.model_copy(update={"num_classes": 9}))
    assert set(damages(folder).values()) == {"classes 0 to 9 of 9"}


def test_a_store_that_does_not_answer_is_no_damage(s3_url):
    manifest = prepare_digits(open_folder(s3_url))
    away = open_folder(s3_url, {"endpoint_url": "http://127.0.0.1:9", "max_attempts": 1})
    with pytest.raises(DataError, match=r"cannot read train-0.*fix: check AWS_ENDPOINT_URL"):
        list(verify(away, manifest))


def test_the_description_tells_what_is_there(captions_data, digits):
    told = "\n".join(describe(captions_data, read_manifest(captions_data)))
    for expected in (
        "pixels, stored uint8 [3, 16, 16]",
        "x_start: stored * 0.00784314 + -1",
        "x_start of train by channel: mean ",
        "train: 9 samples, ",
        "18 captions",
        "captions: ",
    ):
        assert expected in told
    folder = open_folder(digits)
    told = "\n".join(describe(folder, read_manifest(folder)))
    assert "train: 1500 samples, 3 shards, 0.003 GB, 10 classes of 146 to 153 samples" in told
    assert "val: 297 samples, 1 shards" in told


@pytest.mark.parametrize("num", [1, 7, 297, 500])
def test_samples_are_drawn_evenly_from_a_split(digits, num):
    folder = open_folder(digits)
    manifest = read_manifest(folder)
    every, every_label = read_samples(folder, manifest, "val", evenly_spread(manifest, "val", 297))
    x_start, labels = read_samples(folder, manifest, "val", evenly_spread(manifest, "val", num))
    places = np.arange(min(num, 297)) * 297 // min(num, 297)
    np.testing.assert_array_equal(x_start, every[places])
    assert labels == [every_label[place] for place in places]
    assert (every.shape, every.dtype) == ((297, 1, 8, 8), np.float32)


def test_places_by_class_go_through_the_classes_in_turn(digits):
    folder = open_folder(digits)
    manifest = read_manifest(folder)
    places = places_by_class(folder, manifest, "val", 3)
    assert places is not None
    _, labels = read_samples(folder, manifest, "val", places)
    assert labels == [*range(10)] * 3
    every = places_by_class(folder, manifest, "val", 1000)
    assert every is not None and 20 < len(every) // 10 < 30, "as many as the smallest class has"
    more = manifest.model_copy(update={"num_classes": 11})
    assert places_by_class(folder, more, "val", 3) is None


def test_a_cut_shard_is_named_when_samples_are_drawn(digits, tmp_path):
    folder = open_folder(tmp_path)
    for path in digits.iterdir():
        folder.write_bytes(path.name, path.read_bytes())
    folder.write_bytes("val-000000.tar", folder.read_bytes("val-000000.tar")[:1000])
    with pytest.raises(DataError, match=r"val-000000.tar is cut; see dtr-scale data verify"):
        read_samples(folder, read_manifest(folder), "val", np.arange(10))
