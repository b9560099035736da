"""Shards: written the same every time, readable by tar and webdataset, described by a manifest."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from dtr_scale.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.data.synthetic import SyntheticSource
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.prepare.digits import digits, prepare_digits
from dtr_scale.prepare.writer import StoredSample, write_shard
from dtr_scale.randomness import keyed_generator
from dtr_scale.storage.folder import open_folder


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = open_folder(tmp_path_factory.mktemp("digits"))
    prepare_digits(folder)
    return folder


def test_digits_are_read_back(folder, tmp_path):
    written = prepare_digits(folder)
    manifest = read_manifest(folder)
    assert manifest == written
    assert (manifest.num_samples("train"), manifest.num_samples("val")) == (1500, 297)
    assert (manifest.num_classes, manifest.class_names[3]) == (10, "3")
    stored = [name for shard in manifest.shards for name in (shard.index_name, shard.name)]
    assert sorted(folder.names()) == [MANIFEST_NAME, *stored]

    reader = SampleReader(folder, manifest, "val", cache_dir=tmp_path / "cache")
    for index, digit in enumerate(digits().splits["val"]):
        stored, stored_label = reader.read(0, index)
        assert stored_label == digit.label
        np.testing.assert_array_equal(stored, digit.array)
    x_start = manifest.decode(reader.read(0, 0)[0])
    assert (x_start.dtype, x_start.shape) == (np.float32, (1, 8, 8))
    assert -1 <= x_start.min() < 0 < x_start.max() <= 1
    reader.close()


def test_a_second_run_writes_the_same_bytes(digits_folder, tmp_path):
    again = open_folder(tmp_path)
    prepare_digits(again)
    assert again.names() == digits_folder.names()
    for name in again.names():
        assert again.read_bytes(name) == digits_folder.read_bytes(name)
    assert read_manifest(again).hash("val") == read_manifest(digits_folder).hash("val")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset 1.0.2's own
def test_tar_and_webdataset_read_the_shards(digits_folder):
    path = digits_folder.local_path / "train-000001.tar"
    listed = subprocess.run(["tar", "-tf", path], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:2] == ["000000500.cls", "000000500.npy"]

    dataset: Any = WebDataset(str(path), shardshuffle=False).decode()
    samples = [(sample["npy"], sample["cls"]) for sample in dataset]
    expected = list(digits().splits["train"])[500:1000]
    assert len(samples) == 500
    for (array, label), digit in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(array, digit.array)
        assert label == digit.label


def test_the_index_tells_where_numbers_lie(tmp_path):
    folder = open_folder(tmp_path)
    generator = keyed_generator(0, "test")
    samples = [
        StoredSample(
            array=generator.standard_normal((2, 3), np.float32),
            label=7 + i,
            captions=("one", "two") if i else (),
            context=generator.standard_normal((2, 5, 4)).astype(np.float16) if i else None,
        )
        for i in range(2)
    ]
    shard = write_shard(folder, "train", 0, samples, first_key=0)
    tar = folder.read_bytes(shard.name)
    index = np.load(folder.local_path / shard.index_name)
    for row, sample in zip(index, samples, strict=True):
        stored = np.frombuffer(tar, np.float32, 6, row[0]).reshape(2, 3)
        np.testing.assert_array_equal(stored, sample.array)
        assert (row[1], row[3]) == (sample.label, len(sample.captions))
        if sample.context is not None:
            context = np.frombuffer(tar, np.float16, 2 * 5 * 4, row[2]).reshape(2, 5, 4)
            np.testing.assert_array_equal(context, sample.context)


def test_decoding_a_posterior_takes_the_mean_of_the_image():
    manifest = Manifest(
        encoding="posterior",
        shape=(1, 2, 2),
        dtype="float16",
        scale_factor=0.5,
        shift=1.0,
        num_classes=1,
        shards=(),
    )
    stored = np.stack([np.full((2, 1, 2, 2), view) for view in (2.0, 6.0)]).astype(np.float16)
    stored[:, 1] = 0.25
    assert manifest.stored_shape == (2, 2, 1, 2, 2)
    decoded = manifest.decode(stored)
    assert np.all(decoded == 2.0)
    assert (decoded.dtype, decoded.shape) == (np.float32, (1, 2, 2))


HASHES = {"sha256": "0" * 64, "index_sha256": "0" * 64}
GOOD = {
    "encoding": "pixels",
    "shape": [1, 8, 8],
    "dtype": "uint8",
    "num_classes": 10,
    "shards": [
        {"name": "a.tar", "split": "train", "samples": 0, "bytes": 10} | HASHES,
        {"name": "b.tar", "split": "val", "samples": 5, "bytes": 10} | HASHES,
    ],
}


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        (
            None,
            "train",
            r"manifest.json is missing in [^ ]+; fix: check the folder, .*dtr-scale prepare",
        ),
        (b"", "train", "manifest.json is empty.*fix: prepare the data again"),
        (b"not json", "train", "manifest.json: the file: Invalid JSON.*fix"),
        (b"[]", "train", "manifest.json: the file: Input should be an object.*fix"),
        (GOOD | {"format": 1}, "train", "manifest.json: format: Input should be 2.*fix"),
        (GOOD | {"format": 9}, "train", "format 9 is newer than this dtr-scale.*fix: install"),
        (GOOD | {"dtype": "int3", "num_classes": 0}, "val", r"dtype: .*\(and 1 more\); fix"),
        (GOOD | {"shards": []}, "train", "manifest.json lists no shards; fix"),
        (
            GOOD | {"shards": [GOOD["shards"][1]] * 2},
            "val",
            "manifest.json lists shard b.tar 2 times",
        ),
        (GOOD, "test", "has no split 'test'; accepted: train, val"),
        (GOOD, "train", "the shards of split 'train' hold 0 samples; fix"),
    ],
)
def test_a_bad_manifest_is_one_line_with_the_fix(tmp_path, content, split, message):
    folder = open_folder(tmp_path)
    if content is not None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        folder.write_bytes(MANIFEST_NAME, content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(folder, split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bucket", "options", "message"),
    [
        (None, {"key": "nobody", "secret": "wrong"}, "no access to .*AWS_ACCESS_KEY_ID"),
        (None, {"endpoint_url": "http://127.0.0.1:9", "max_attempts": 1}, "fix: check AWS_ENDPOI"),
        ("s3://nobucket/x", {}, r"missing in s3://nobucket/x \(.*NoSuchBucket"),
    ],
)
def test_unreachable_storage_is_one_line_with_the_fix(s3_url, bucket, options, message):
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(open_folder(bucket or s3_url, options))
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install dtr-scale\[prepare\]"):
        digits()


def test_synthetic_samples_are_keyed_and_normal():
    source = SyntheticSource((3, 4, 4), num_classes=5, num_samples=400)
    arrays, labels = zip(*(source.read(0, index) for index in range(400)), strict=True)
    np.testing.assert_array_equal(source.read(0, 7)[0], arrays[7])
    assert set(labels) == set(range(5))
    assert abs(np.mean(arrays)) < 0.03
    assert abs(np.std(arrays) - 1) < 0.03
    assert arrays[0].dtype == np.float32
