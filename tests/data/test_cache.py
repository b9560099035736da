"""The cache gives verified files, fetches a shard once, stays bounded and names what is wrong."""

import io
import os
import tarfile
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from dtr_scale.data.cache import choose_shards
from dtr_scale.data.reader import SampleReader
from dtr_scale.data.seals import Seal
from dtr_scale.data.split import Split
from dtr_scale.errors import DataError
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.storage.folder import open_folder
from tests.support.disks import small_disk


@pytest.fixture
def prepared(folder):
    """The digits, on disk and on S3."""
    return folder, prepare_digits(folder)


def _cache(prepared, tmp_path, max_bytes=2**30, shards=None):
    """The split's shards, or some of them, by the way that suits folder and cache."""
    folder, manifest = prepared
    if shards is not None:
        manifest = manifest.model_copy(update={"shards": shards})
    return choose_shards(Split(folder, manifest), tmp_path / "cache", max_bytes)


def _kept(manifest, tmp_path):
    """Return the numbers of the shards that the cache folder has."""
    hashes = [shard.sha256 for shard in manifest.split("train")]
    return {hashes.index(path.stem) for path in (tmp_path / "cache").glob("*.tar")}


def _content(shard, num_bytes):
    """Return the first bytes of an open shard."""
    content = np.empty(num_bytes, np.uint8)
    shard.read([0], [content])()
    return content.tobytes()


@pytest.mark.parametrize("max_bytes", [2**30, 0])
def test_a_shard_opens_whole(prepared, tmp_path, max_bytes):
    folder, manifest = prepared
    cache = _cache(prepared, tmp_path, max_bytes)
    content = folder.read_bytes("train-000001.tar")
    if not folder.is_local:
        ranged = cache.ranged(1)
        assert _content(ranged, 1000) == content[:1000]
    shard = cache.open(1)
    assert (cache.ranged(1) is None) == bool(folder.is_local or max_bytes)
    assert _content(shard, len(content)) == content
    shard.close()
    index = np.load(io.BytesIO(folder.read_bytes("train-000001.index.npy")))
    np.testing.assert_array_equal(shard.rows, index)
    assert _kept(manifest, tmp_path) == (set() if folder.is_local or not max_bytes else {1})
    assert (tmp_path / "cache").exists() == bool(max_bytes)


def _truncate_at_a_record(content):
    """Cut a tar after its 400th sample, well-formed: what a plain reader would not notice."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    return content[: members[800].offset] + bytes(1024)


def _alter_one_byte(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize("max_bytes", [2**30, 0])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "shard train-000001.tar .500 samples, 1034240 bytes in the manifest. is missing"),
        (_truncate_at_a_record, "train-000001.tar .* manifest says bytes 1034240, found 820224"),
        (_alter_one_byte, "train-000001.tar .* manifest says sha256 [0-9a-f]{64}, found [0-9a-f]"),
    ],
)
def test_a_damaged_shard_is_named(prepared, tmp_path, damage, message, max_bytes):
    folder, manifest = prepared
    if damage is None:
        folder.remove("train-000001.tar")
    else:
        folder.write_bytes("train-000001.tar", damage(folder.read_bytes("train-000001.tar")))
    cache = _cache(prepared, tmp_path, max_bytes)
    cache.open(0).close()
    for _ in range(2):
        with pytest.raises(DataError, match=message) as caught:
            cache.open(1)
        assert "\n" not in str(caught.value)
        assert "fix: " in str(caught.value)
    assert _kept(manifest, tmp_path) <= {0}


def test_an_altered_index_is_named(prepared, tmp_path):
    folder, _ = prepared
    content = folder.read_bytes("train-000001.index.npy")
    folder.write_bytes("train-000001.index.npy", content[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"000001\.index\.npy .* manifest says sha256 [0-9a-f]{64}"):
        _cache(prepared, tmp_path).open(1)


@pytest.fixture
def on_s3(s3_url):
    folder = open_folder(s3_url)
    return folder, prepare_digits(folder)


def test_a_shard_is_fetched_once_per_node(on_s3, tmp_path, s3_proxy):
    folder, manifest = on_s3
    proxied = open_folder(folder.url, {"endpoint_url": s3_proxy.endpoint_url})
    s3_proxy.delay_seconds = 0.1  # time enough for the others to come
    caches = [_cache((proxied, manifest), tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: c.open(0).close()) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = f"/{folder.url.removeprefix('s3://')}/train-000000.tar"
    assert s3_proxy.requests["GET", path] == 1
    assert s3_proxy.transferred_bytes["GET", path] == manifest.split("train")[0].bytes


@pytest.fixture
def fetched(on_s3, monkeypatch):
    """The names of the shards that are fetched whole."""
    names = []
    get = type(on_s3[0]).get

    def counted(self, name, local_path):
        names.append(name)
        time.sleep(0.05)  # time enough for others to come
        get(self, name, local_path)

    monkeypatch.setattr(type(on_s3[0]), "get", counted)
    return names


def test_whoever_does_not_wait_is_told_that_another_has_it_in_hand(on_s3, tmp_path, fetched):
    first, second = _cache(on_s3, tmp_path), _cache(on_s3, tmp_path)
    thread = threading.Thread(target=lambda: first.open(0).close())
    thread.start()
    while not fetched:
        time.sleep(0.001)
    with pytest.raises(BlockingIOError):
        second.open(0, wait=False)
    thread.join()
    second.open(0, wait=False).close()


def test_the_cache_is_bounded_and_drops_what_is_needed_last(on_s3, tmp_path):
    _, manifest = on_s3
    num_bytes = manifest.split("train")[0].bytes
    cache = _cache(on_s3, tmp_path, 2 * num_bytes)
    cache.open(0).close()
    cache.open(1).close()
    cache.expect(lambda: (2, 0, 1))
    cache.open(2).close()
    assert _kept(manifest, tmp_path) == {0, 2}  # 0 was used before 1, and will be again
    cache.expect(lambda: (1, 2, 0))
    with closing(cache.open(0)) as held:
        cache.open(1).close()
        assert _kept(manifest, tmp_path) == {0, 1}  # 0 is needed last, but now too
        with closing(cache.open(1)):
            cache.open(2).close()
            assert len(_kept(manifest, tmp_path)) == 2
        assert len(_content(held, num_bytes)) == num_bytes  # an open file outlives its eviction
    assert len(list((tmp_path / "cache").glob("*.index.npy"))) <= 2


@pytest.mark.parametrize(("times", "message"), [(2, None), (99, "evicted 10 times as soon as")])
def test_a_copy_that_others_evict_as_it_comes_is_fetched_again(
    on_s3, tmp_path, monkeypatch, times, message
):
    cache, fetched = _cache(on_s3, tmp_path), []
    get = type(on_s3[0]).get

    def get_in_vain(self, name, local_path):
        get(self, name, local_path)
        fetched.append(name)
        if len(fetched) <= times:
            local_path.unlink()

    monkeypatch.setattr(type(on_s3[0]), "get", get_in_vain)
    if message is None:
        cache.open(0).close()
        assert len(fetched) == times + 1
    else:
        with pytest.raises(DataError, match=message):
            cache.open(0)


def test_another_jobs_shards_go_first_when_idle_and_last_otherwise(on_s3, tmp_path):
    _, manifest = on_s3
    shards = manifest.split("train")
    mine, other = (
        _cache(on_s3, tmp_path, 2 * shards[0].bytes, part) for part in (shards[:2], shards[2:])
    )
    mine.expect(lambda: (0, 1))
    other.open(0).close()
    mine.open(0).close()
    mine.open(1).close()
    assert _kept(manifest, tmp_path) == {1, 2}  # two jobs on one cache: each drops its own
    copy = tmp_path / "cache" / f"{shards[2].sha256}.tar"
    os.utime(copy, (0, copy.stat().st_mtime))
    mine.open(0).close()
    assert _kept(manifest, tmp_path) == {0, 1}


def test_a_copy_is_hashed_once_and_again_when_it_changed(on_s3, tmp_path, fetched, monkeypatch):
    hashed, put = [], Seal.set
    monkeypatch.setattr(Seal, "set", lambda *args: (hashed.append(args), put(*args)))
    for _ in range(2):
        _cache(on_s3, tmp_path).open(0).close()
    content = on_s3[0].read_bytes("train-000000.tar")
    assert fetched == ["train-000000.tar"]
    assert len(hashed) == 1
    copy = tmp_path / "cache" / f"{on_s3[1].split('train')[0].sha256}.tar"
    copy.write_bytes(_alter_one_byte(content))
    with closing(_cache(on_s3, tmp_path).open(0)) as shard:
        assert _content(shard, len(content)) == content
    assert fetched == 2 * ["train-000000.tar"]


def test_what_a_killed_process_left_is_removed(on_s3, tmp_path):
    cache = _cache(on_s3, tmp_path)
    (tmp_path / "cache").mkdir()
    left_over = tmp_path / "cache" / f".{cache.split.shards[0].sha256}.tar.123-456.part"
    left_over.write_bytes(b"half a shard")
    cache.open(0).close()
    assert not left_over.exists()


def test_on_a_full_disk_others_go_or_an_error_says_so(on_s3, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, 2500 * 1024):  # two shards, not three
        cache = _cache(on_s3, disk)
        for shard in (0, 1, 2, 0):
            cache.open(shard).close()
        assert _kept(on_s3[1], disk) == {0, 2}
        with (
            closing(cache.open(0)),
            closing(cache.open(2)),
            pytest.raises(
                DataError, match=r"cannot keep shard train-000001\.tar .* No space"
            ) as caught,
        ):
            cache.open(1)
        assert "fix: set data.cache_dir" in str(caught.value)
        cache.open(1).close()


def test_a_cache_that_cannot_hold_a_shard_or_be_written_says_so(on_s3, tmp_path):
    with pytest.raises(DataError, match=r"may hold 1000; fix: raise data\.cache_gb"):
        _cache(on_s3, tmp_path, 1000)
    (tmp_path / "cache").write_bytes(b"a file, not a folder")
    with pytest.raises(DataError, match=r"the cache .* cannot be used .*; fix: set data\.cache_d"):
        _cache(on_s3, tmp_path).open(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "manifest says 3 classes, found class 9; fix"),
        ({"shape": (1, 16, 4)}, r"arrays uint8 \(1, 16, 4\), found uint8 \(1, 8, 8\); fix"),
        ({"dtype": "float16"}, r"arrays float16 \(1, 8, 8\), found uint8 \(1, 8, 8\); fix"),
        ({"context_shape": (3, 4)}, "says captions, found sample 0 without one; fix"),
        ("samples", "manifest says 499 samples, found 500; fix"),
    ],
)
def test_a_manifest_of_other_samples_is_refused(tmp_path, change, message):
    folder = open_folder(tmp_path)
    manifest = prepare_digits(folder)
    if change == "samples":
        shards = [replace(s, samples=s.samples - 1) for s in manifest.shards]
        change = {"shards": tuple(shards)}
    reader = SampleReader(folder, manifest.model_copy(update=change))
    with pytest.raises(DataError, match=message):
        reader.read(0, 0)


def test_sizes_are_checked_before_training(prepared):
    folder, manifest = prepared
    SampleReader(folder, manifest).check_sizes()
    content = folder.read_bytes("train-000002.tar")
    folder.write_bytes("train-000002.tar", content[:-512])
    with pytest.raises(DataError, match=r"train-000002\.tar .* says bytes 1034240, found 1033728"):
        SampleReader(folder, manifest).check_sizes()
    folder.write_bytes("train-000002.tar", content)
    folder.remove("train-000000.index.npy")
    with pytest.raises(DataError, match=r"shard train-000000\.index\.npy is missing"):
        SampleReader(folder, manifest).check_sizes()
