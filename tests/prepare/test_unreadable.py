"""Pictures that cannot be read, or give no finite latents, are left out and listed."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch

from dtr_scale.data.manifest import MANIFEST_NAME, read_manifest
from dtr_scale.errors import DataError
from dtr_scale.prepare.encode import PosteriorEncoder
from dtr_scale.prepare.images import read_picture
from dtr_scale.prepare.inspection import verify
from dtr_scale.prepare.listing import image_folder, one_class
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import (
    class_folders,
    noise_picture,
)
from tests.support.preparations import SIZE, contents, preparation, written

CPU = torch.device("cpu")


@pytest.fixture
def damaged(tmp_path):
    """Forty pictures, of which three are none."""
    root = class_folders(tmp_path / "damaged", {"a": 20, "b": 20})
    (root / "a" / "004.png").write_bytes(b"")
    (root / "b" / "000.png").write_text("no picture")
    content = (root / "b" / "010.png").read_bytes()
    (root / "b" / "010.png").write_bytes(content[: len(content) // 2])
    return root


def test_unreadable_pictures_are_listed(damaged, folder, warnings_of):
    manifest = preparation(damaged, folder, max_unreadable=0.1, batch_size=1).run().manifest
    assert manifest is not None
    names = ["train/a/004.png", "train/b/000.png", "train/b/010.png"]
    assert sorted(manifest.unreadable) == names
    assert manifest.num_samples("train") == 37
    assert sum(shard.samples for shard in manifest.shards) == 37
    warnings = sorted(warnings_of("dtr_scale.prepare.maker"))
    assert [w.partition(" cannot be read: ")[0] for w in warnings] == names
    assert not [problem for *_, problem in verify(folder, manifest) if problem]
    keys = [name for shard in manifest.shards for name in _keys(folder, shard)]
    assert len(set(keys)) == 37


def test_an_unreadable_picture_whose_name_is_not_utf_8_is_listed(tmp_path, warnings_of):
    root = class_folders(tmp_path / "src", {"a": 3})
    (root / "a" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    folder = open_folder(tmp_path / "out")
    preparation(root, folder, max_unreadable=1.0).run()
    assert read_manifest(folder).unreadable == (r"train/a/caf\xe9.png",)
    (warning,) = warnings_of("dtr_scale.prepare.maker")
    assert warning.startswith(r"train/a/caf\xe9.png cannot be read")


def _keys(folder, shard):
    with tarfile.open(fileobj=io.BytesIO(folder.read_bytes(shard.name))) as tar:
        return [name for name in tar.getnames() if name.endswith(".cls")]


def test_a_shard_of_unreadable_pictures_alone_is_empty(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(12):
        (tmp_path / "src" / f"{i}.png").write_bytes(b"")
    folder = open_folder(tmp_path / "out")
    manifest = preparation(one_class(tmp_path / "src"), folder, max_unreadable=1.0).run().manifest
    assert manifest is not None
    assert [shard.samples for shard in manifest.shards] == [0, 0]
    assert len(manifest.unreadable) == 12
    assert not [problem for *_, problem in verify(folder, manifest) if problem]


@pytest.mark.parametrize("rank", [0, 1])
def test_too_many_unreadable_pictures_stop_the_run(damaged, tmp_path, rank):
    folder = open_folder(tmp_path / "out")
    message = (
        "of 40 pictures cannot be read .*--max-unreadable=0.05 allows; fix: mend .*another --out"
    )
    options = {"max_unreadable": 0.05, "world_size": 2}
    if rank == 0:
        preparation(damaged, folder, rank=1, **options | {"max_unreadable": 1.0}).run()
    with pytest.raises(DataError, match=message):
        preparation(damaged, folder, rank=0, **options).run()
        preparation(damaged, folder, rank=1, **options).run()
    assert not folder.exists(MANIFEST_NAME)
    preparation(damaged, folder, max_unreadable=0.1).run()
    assert read_manifest(folder).num_samples("train") == 37


def test_of_too_many_unreadable_pictures_all_are_named(tmp_path, warnings_of):
    root = class_folders(tmp_path / "src", {"a": 200})
    broken = [f"a/{i:03d}.png" for i in range(0, 200, 40)]
    for name in broken:
        (root / name).write_bytes(b"")
    with pytest.raises(DataError, match="5 of 200 pictures cannot be read"):
        preparation(root, open_folder(tmp_path / "out"), max_unreadable=0.0).run()
    told = warnings_of("dtr_scale.prepare.maker") + warnings_of("dtr_scale.prepare.preparation")
    assert {w.split()[0] for w in told if "cannot be read: " in w} == {f"train/{n}" for n in broken}


class Overflowing(PosteriorEncoder):
    """An autoencoder whose numbers overflow for pictures that are dark at the corner."""

    def encode(self, pictures):
        stored = super().encode(pictures)
        stored[pictures[:, 0, 0, 0] < 64, 1, 1] = np.inf
        return stored


def test_pictures_with_latents_that_are_not_finite_are_left_out(vae_path, tmp_path, warnings_of):
    """Also at the next start, which does not make their shard again and again."""
    root = class_folders(tmp_path / "src", {"a": 20})
    dark = {
        f"train/{p.name}"
        for p in image_folder(root).splits["train"]
        if read_picture(p.path, SIZE)[0, 0, 0] < 64
    }
    assert 0 < len(dark) < 20
    encoder = Overflowing(str(vae_path), SIZE, CPU)
    folder = open_folder(tmp_path / "out")
    options = {"shard_bytes": 10_000, "max_unreadable": 1.0, "world_size": 2}
    with pytest.raises(DataError, match="pictures cannot be read"):
        preparation(root, folder, encoder, **options | {"max_unreadable": 0.0}).run()
    preparation(root, folder, encoder, rank=0, **options).run()
    records = [name for name in folder.names() if name.endswith(".record.json")]
    before = written(folder, records)
    preparation(root, folder, encoder, rank=0, **options).run()
    assert written(folder, records) == before
    preparation(root, folder, encoder, rank=1, **options).run()
    manifest = read_manifest(folder)
    assert set(manifest.unreadable) == dark
    assert manifest.num_samples("train") == 20 - len(dark)
    assert np.isfinite(manifest.channel_mean).all()
    assert not [problem for *_, problem in verify(folder, manifest) if problem]
    assert "is encoded to numbers that are not finite" in warnings_of("dtr_scale.prepare.maker")[0]


def test_mended_pictures_are_stored_by_the_next_start(damaged, folder, tmp_path):
    """The shards that lack them are made again, the others are left alone."""
    ranks = {"world_size": 2, "max_unreadable": 1.0}
    preparation(damaged, folder, rank=1, **ranks).run()
    records = [name for name in folder.names() if name.endswith(".record.json")]
    lacking = {name: json.loads(folder.read_bytes(name))["unreadable"] for name in records}
    names = {name for some in lacking.values() for name in some}
    assert names and not all(lacking.values())
    complete = [
        json.loads(folder.read_bytes(n))["shard"]["name"] for n in records if not lacking[n]
    ]
    before = written(folder, complete)
    for name in names:
        noise_picture(500).save(damaged / name.removeprefix("train/"))

    assert preparation(damaged, folder, rank=0, **ranks).run().manifest is None
    assert written(folder, complete) == before
    manifest = preparation(damaged, folder, rank=1, **ranks).run().manifest
    assert manifest is not None and not names & set(manifest.unreadable)
    alone = open_folder(tmp_path / "alone")
    preparation(damaged, alone, max_unreadable=1.0).run()
    assert contents(folder) == contents(alone)


def test_shards_without_pictures_that_stay_unreadable_are_left_alone(damaged, folder):
    ranks = {"world_size": 2, "max_unreadable": 1.0}
    preparation(damaged, folder, rank=0, **ranks).run()
    tars = [name for name in folder.names() if name.endswith(".tar")]
    before = written(folder, tars)
    assert preparation(damaged, folder, rank=1, **ranks).run().manifest is not None
    assert written(folder, tars) == before
