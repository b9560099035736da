"""IDX files, as of MNIST, become shards of grey pictures."""

import gzip

import numpy as np
import pytest

from dtr_scale.cli.main import main
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.evaluation.report import read_all
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import idx_bytes, idx_files


@pytest.fixture
def source(tmp_path):
    return idx_files(tmp_path / "idx", num_train=40, num_val=12)


def read_split(folder, split):
    manifest = read_manifest(folder, split)
    return manifest, *read_all(SampleReader(folder, manifest, split))


def test_pictures_are_stored_padded_with_their_labels(source, tmp_path, capsys):
    out = tmp_path / "data"
    assert main(["prepare", "idx", str(source), "--size=12", f"--out={out}"]) == 0
    assert "train: 40 samples" in capsys.readouterr().out
    manifest, images, labels = read_split(open_folder(out), "train")
    assert (manifest.num_classes, images.shape) == (10, (40, 1, 12, 12))
    stored = np.frombuffer((source / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    pixels = stored.reshape(40, 8, 8) / 127.5 - 1
    whole = np.full((40, 12, 12), -1.0)
    whole[:, 2:10, 2:10] = pixels
    # Mixed, so they are found by what they show.
    order = [int(np.abs(whole - image[0]).sum(axis=(1, 2)).argmin()) for image in images]
    assert sorted(order) == list(range(40)) != order
    np.testing.assert_allclose(images[:, 0], whole[order], atol=1e-6)
    truth = np.frombuffer((source / "train-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    assert labels.tolist() == truth[order].tolist()
    assert len(read_split(open_folder(out), "val")[1]) == 12


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", "has no t10k-labels-idx1-ubyte"),
        ("cut", "is no IDX file of bytes with 3 axes"),
        ("other", "its header says type 0x0d"),
        ("fewer", "t10k has 12 pictures and 11 labels"),
        ("small", "--size=7 is less than the 8 pixels"),
    ],
)
def test_what_is_wrong_with_the_files_is_told(how, told, source, tmp_path, capsys):
    images, labels = source / "train-images-idx3-ubyte", source / "t10k-labels-idx1-ubyte"
    if how == "missing":
        labels.unlink()
    elif how == "cut":
        images.write_bytes(images.read_bytes()[:-1])
    elif how == "other":
        images.write_bytes(b"\0\0\x0d\x03" + images.read_bytes()[4:])
    elif how == "fewer":
        labels.unlink()
        content = gzip.compress(idx_bytes(np.zeros(11, np.uint8)))
        (source / f"{labels.name}.gz").write_bytes(content)
    size = ["--size=7"] if how == "small" else []
    assert main(["prepare", "idx", str(source), *size, f"--out={tmp_path / 'data'}"]) == 2
    assert told in capsys.readouterr().err
