"""Preparing pictures: the same bytes whoever makes them, nothing lost, nothing mixed up."""

import os

import numpy as np
import pytest
from PIL import Image

from dtr_scale.data.manifest import MANIFEST_NAME, read_manifest, write_manifest
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.prepare.digits import digits, prepare_digits
from dtr_scale.prepare.encode import PixelEncoder
from dtr_scale.prepare.images import read_picture
from dtr_scale.prepare.inspection import evenly_spread, read_samples, verify
from dtr_scale.prepare.ledger import PLAN_NAME
from dtr_scale.prepare.listing import image_folder, one_class
from dtr_scale.storage.folder import open_folder
from tests.support.pictures import (
    as_bytes,
    class_folders,
    noise_picture,
    tar_of,
)
from tests.support.preparations import (
    SAMPLE_BYTES,
    SIZE,
    contents,
    preparation,
    stop_after,
    written,
)
from tests.support.runs import copied


def test_every_picture_is_stored_once(source, folder):
    outcome = preparation(source, folder).run()
    manifest = read_manifest(folder)
    assert outcome.manifest == manifest
    assert [shard.samples for shard in manifest.shards] == [10, 10, 10, 10, 6]
    padding = manifest.shards[0].bytes - 10 * SAMPLE_BYTES
    assert 0 < padding <= 10 * 1024 + 1024  # a tar ends with zeros, up to whole 10 KB
    names = [name for shard in manifest.shards for name in (shard.name, shard.index_name)]
    assert sorted(folder.names()) == sorted([MANIFEST_NAME, *names])
    assert not [problem for *_, problem in verify(folder, manifest) if problem]
    assert manifest.class_names == ("n01", "n02", "n03")
    assert (manifest.encoding, manifest.dtype, manifest.shape) == ("pixels", "uint8", (3, 16, 16))

    x_start, labels = read_samples(folder, manifest, "train", evenly_spread(manifest, "train", 46))
    found = {(x.tobytes(), label) for x, label in zip(x_start, labels, strict=True)}
    pictures = image_folder(source).splits["train"]
    expected = {
        ((read_picture(p.path, SIZE) * np.float32(1 / 127.5) - 1).tobytes(), p.label)
        for p in pictures
    }
    assert found == expected
    assert len(found) == 46
    np.testing.assert_allclose(manifest.channel_mean, x_start.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(manifest.channel_std, x_start.std((0, 2, 3)), rtol=1e-4)


def test_classes_are_mixed_within_shards(source, tmp_path):
    """Training shuffles within a window of shards, and the source is sorted by class."""
    folder = open_folder(tmp_path)
    manifest = preparation(source, folder).run().manifest
    assert manifest is not None
    for shard in manifest.shards:
        labels = np.load(tmp_path / shard.index_name)[:, 1]
        assert len(set(labels)) > 1


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_writes_the_same_bytes(source, folder, tmp_path, world_size):
    alone = open_folder(tmp_path / "alone")
    preparation(source, alone).run()
    outcomes = [
        preparation(source, folder, rank=rank, world_size=world_size).run()
        for rank in range(world_size)
    ]
    assert [outcome.manifest is not None for outcome in outcomes[:5]] == [
        rank == min(world_size, 5) - 1 for rank in range(min(world_size, 5))
    ]
    assert contents(folder) == contents(alone)


@pytest.mark.parametrize("batches", [0, 3, 8, 12])
def test_a_stopped_run_goes_on_with_what_is_missing(source, folder, tmp_path, batches):
    alone = open_folder(tmp_path / "alone")
    preparation(source, alone).run()
    outcome = preparation(source, folder, leaving=stop_after(batches)).run()
    assert outcome.manifest is None
    assert (outcome.stored, outcome.shards) == (batches // 3, 5)
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        read_manifest(folder)
    made = [name for name in folder.names() if name.endswith(".tar")]
    before = written(folder, made)
    preparation(source, folder, num_workers=3).run()
    assert written(folder, made) == before
    assert contents(folder) == contents(alone)


def test_a_shard_without_a_whole_tar_index_and_record_is_made_again(source, tmp_path):
    alone, folder = open_folder(tmp_path / "alone"), open_folder(tmp_path / "folder")
    preparation(source, alone).run()
    preparation(source, folder, leaving=stop_after(12)).run()
    path = folder.local_path
    (path / "train-000000.tar").write_bytes((path / "train-000000.tar").read_bytes()[:-512])
    (path / "train-000001.index.npy").unlink()
    (path / "train-000002.record.json").unlink()
    (path / ".train-000003.tar.123-456.part").write_bytes(b"what a killed process left")
    assert preparation(source, folder).run().manifest is not None
    assert contents(folder) == contents(alone)
    assert not list(path.glob(".*"))


def test_finished_data_is_left_alone(source, folder):
    preparation(source, folder).run()
    before = contents(folder)
    again = preparation(source, folder).run()
    assert again.manifest == read_manifest(folder)
    assert again.shards == 0
    assert contents(folder) == before


def test_what_is_lost_after_the_manifest_is_made_again(source, folder):
    """By the ranks that make it, with the same bytes; the rest is left alone."""
    preparation(source, folder).run()
    before = contents(folder)
    folder.write_bytes("train-000000.tar", before["train-000000.tar"][:-512])
    folder.remove("train-000003.index.npy")
    whole = [name for name in before if "-000001" in name or "-000002" in name]
    times = written(folder, whole)
    first = preparation(source, folder, rank=0, world_size=2).run()
    assert (first.manifest, first.stored, first.shards) == (None, 4, 5)
    assert read_manifest(folder).num_samples("train") == 46  # training may go on meanwhile
    assert preparation(source, folder, rank=1, world_size=2).run().manifest is not None
    assert contents(folder) == before
    assert written(folder, whole) == times


def test_what_is_lost_and_cannot_be_made_again_is_an_error_at_every_start(tmp_path):
    root = class_folders(tmp_path / "src", {"a": 3})
    folder = open_folder(tmp_path / "out")
    preparation(root, folder).run()
    manifest = folder.read_bytes(MANIFEST_NAME)
    noise_picture(500).save(root / "a" / "001.png")
    folder.remove("train-000000.tar")
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-000000.tar was lost, .*fix: give the pictures"):
            preparation(root, folder).run()
    assert folder.read_bytes(MANIFEST_NAME) == manifest


def test_digits_are_made_as_pictures_are(folder, tmp_path):
    """In their own order, and what a killed run has stored is kept."""
    alone = open_folder(tmp_path / "alone")
    assert prepare_digits(alone).hash("train").startswith("d3ffbda337cc")  # named in runs of then
    assert read_manifest(alone).hash("val").startswith("d39d7d46bb23")
    encoder = PixelEncoder(8, channels=1, scale_factor=1 / 8)
    options = {"encoder": encoder, "shard_bytes": 500 * 2048, "batch_size": 500}
    preparation(digits(), folder, leaving=stop_after(2), **options).run()
    assert folder.exists(PLAN_NAME) and not folder.exists(MANIFEST_NAME)
    before = written(folder, ["train-000000.tar"])
    prepare_digits(folder)
    assert contents(folder) == contents(alone)
    assert written(folder, ["train-000000.tar"]) == before


def test_what_a_kill_left_after_the_manifest_is_removed(source, tmp_path):
    folder = open_folder(tmp_path)
    preparation(source, folder, leaving=stop_after(4)).run()
    left = {n: c for n, c in contents(folder).items() if n.endswith(".json")}
    assert left.keys() == {PLAN_NAME, "train-000000.record.json"}
    preparation(source, folder).run()
    before = contents(folder)
    for name, content in left.items():
        folder.write_bytes(name, content)
    preparation(source, folder).run()
    assert contents(folder) == before


@pytest.mark.parametrize("unfinished", [True, False])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": PixelEncoder(8)}, r"shape is \[3, 16, 16\], not \[3, 8, 8\]; fix: give these"),
        ({"shard_bytes": 5 * SAMPLE_BYTES}, "origins.train.samples_per_shard is 10, not 5"),
        ({"more": True}, "origins.train.pictures is 46, not 47"),
    ],
)
def test_other_settings_are_refused_by_name(source, folder, unfinished, options, message, tmp_path):
    leaving = stop_after(4) if unfinished else stop_after(10**6)
    preparation(source, folder, leaving=leaving).run()
    before = contents(folder)
    if options.get("more"):
        other = tmp_path / "more"
        other.mkdir()
        for wnid in source.iterdir():
            (other / wnid.name).symlink_to(wnid)
        (other / "n04").mkdir()
        (other / "n04" / "x.png").write_bytes(as_bytes(noise_picture(0)))
        source, options = other, {}
    state = "unfinished data" if unfinished else "data"
    with pytest.raises(ConfigError, match=f"holds {state} of other settings: .*{message}"):
        preparation(source, folder, **options).run()
    assert contents(folder) == before


def test_batch_size_and_workers_may_change(source, tmp_path):
    folder, alone = open_folder(tmp_path / "a"), open_folder(tmp_path / "b")
    preparation(source, alone).run()
    preparation(source, folder, leaving=stop_after(6)).run()
    preparation(source, folder, batch_size=7, num_workers=4).run()
    assert contents(folder) == contents(alone)


def test_a_further_split_joins_the_manifest(source, folder, tmp_path):
    train = preparation(source, folder).run().manifest
    assert train is not None
    val = class_folders(tmp_path / "val", {"n01": 3, "n02": 4, "n03": 5}, first_seed=100)
    joined = preparation(image_folder(val, "val"), folder).run().manifest
    assert joined is not None and joined == read_manifest(folder)
    assert (joined.num_samples("train"), joined.num_samples("val")) == (46, 12)
    assert joined.hash("train") == train.hash("train")
    assert joined.channel_mean == train.channel_mean
    assert joined.origins.keys() == {"train", "val"}
    assert not [problem for *_, problem in verify(folder, joined) if problem]
    assert preparation(image_folder(val, "val"), folder).run().shards == 0

    fewer = class_folders(tmp_path / "fewer", {"n01": 3}, first_seed=100)
    with pytest.raises(ConfigError, match="num_classes is 3, not 1"):
        preparation(image_folder(fewer, "test"), folder).run()


def test_two_splits_at_once_are_those_made_one_after_the_other(source, tmp_path):
    class_folders(tmp_path / "src" / "val", {"n01": 3, "n02": 4, "n03": 5}, first_seed=100)
    (tmp_path / "src" / "train").symlink_to(source)
    both, single = open_folder(tmp_path / "both"), open_folder(tmp_path / "single")
    preparation(tmp_path / "src", both).run()
    for split in ("train", "val"):
        preparation(image_folder(tmp_path / "src", split), single).run()
    assert contents(both) == contents(single)


def test_two_ranks_that_finish_together_agree(source, tmp_path, monkeypatch):
    """The second finds the last record, and the first has written the manifest by then."""
    folder, alone = open_folder(tmp_path / "folder"), open_folder(tmp_path / "alone")
    preparation(source, alone).run()
    second = preparation(source, folder)
    finish = second._ledger.finish

    def after_the_first(records):
        assert preparation(source, folder).run().manifest is not None
        return finish(records)

    monkeypatch.setattr(second._ledger, "finish", after_the_first)
    second.run()
    assert contents(folder) == contents(alone)


def test_a_class_whose_name_is_not_utf_8_is_escaped(tmp_path):
    root = class_folders(tmp_path / "src", {os.fsdecode(b"caf\xe9"): 2, "tea": 1})
    preparation(root, open_folder(tmp_path / "out")).run()
    assert read_manifest(open_folder(tmp_path / "out")).class_names == (r"caf\xe9", "tea")


def test_tars_and_folders_give_the_same_shards(source, tmp_path):
    tars = {
        f"{folder.name}.tar": tar_of({p.name: p.read_bytes() for p in sorted(folder.iterdir())})
        for folder in sorted(source.iterdir())
    }
    (tmp_path / "all.tar").write_bytes(tar_of(tars))
    a, b = open_folder(tmp_path / "a"), open_folder(tmp_path / "b")
    preparation(source, a).run()
    preparation(tmp_path / "all.tar", b).run()
    assert contents(a) == contents(b)


def test_what_an_earlier_version_has_prepared_is_refused(digits, tmp_path):
    """Its manifest has no origins: nothing tells whether it is the same data."""
    folder = open_folder(copied(digits, tmp_path))
    write_manifest(folder, read_manifest(folder, split=None).model_copy(update={"origins": {}}))
    before = contents(folder)
    told = r"does not say what train, val was made of, as an earlier version .* remove the folder"
    with pytest.raises(ConfigError, match=told):
        prepare_digits(folder)
    assert contents(folder) == before


def test_pictures_larger_than_a_shard_have_one_each(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "src" / f"{i}.png")
    folder = open_folder(tmp_path / "out")
    manifest = preparation(one_class(tmp_path / "src"), folder, shard_bytes=1).run().manifest
    assert manifest is not None
    assert [shard.samples for shard in manifest.shards] == [1, 1, 1]
