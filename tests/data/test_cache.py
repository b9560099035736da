"""The cache gives verified files, fetches a shard once, stays bounded and names what is wrong."""

import io
import tarfile
import threading
import time

import pytest

from dtr_scale.data.cache import ShardCache
from dtr_scale.data.reader import SampleReader
from dtr_scale.data.sources import prepare_digits
from dtr_scale.errors import DataError
from dtr_scale.storage import Folder


@pytest.fixture
def prepared(folder):
    """The digits, on disk and on S3."""
    return folder, prepare_digits(folder)


def _cache(prepared, tmp_path, **options):
    folder, manifest = prepared
    return ShardCache(folder, manifest.split("train"), tmp_path / "cache", **options)


def test_a_shard_opens_as_a_local_file(prepared, tmp_path):
    folder, _ = prepared
    cache = _cache(prepared, tmp_path)
    with cache.open(1) as file:
        assert file.read() == folder.read_bytes("train-000001.tar")
    assert (tmp_path / "cache").exists() == (not folder.is_local)  # local files are not copied


def _truncate_at_a_record(content):
    """Cut a tar after its 400th sample, well-formed: what a plain reader would not notice."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    return content[: members[800].offset] + bytes(1024)


def _alter_one_byte(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "shard train-000001.tar .500 samples, 1034240 bytes in the manifest. is missing"),
        (_truncate_at_a_record, "train-000001.tar .* manifest says bytes 1034240, found 820224"),
        (_alter_one_byte, "train-000001.tar .* manifest says sha256 [0-9a-f]{64}, found [0-9a-f]"),
    ],
)
def test_a_damaged_shard_is_named(prepared, tmp_path, damage, message):
    folder, _ = prepared
    if damage is None:
        folder.remove("train-000001.tar")
    else:
        folder.write_bytes("train-000001.tar", damage(folder.read_bytes("train-000001.tar")))
    cache = _cache(prepared, tmp_path)
    cache.open(0).close()
    for _ in range(2):
        with pytest.raises(DataError, match=message) as caught:
            cache.open(1)
        assert "\n" not in str(caught.value)
        assert "fix: " in str(caught.value)


@pytest.fixture
def on_s3(s3_url):
    folder = Folder(s3_url)
    return folder, prepare_digits(folder)


def test_a_shard_is_fetched_once_per_node(on_s3, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(type(on_s3[0]), "get", _counting(type(on_s3[0]).get, fetched))
    caches = [_cache(on_s3, tmp_path) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: c.open(0).close()) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["train-000000.tar"]


def _counting(get, fetched):
    def counted(self, name, local_path):
        fetched.append(name)
        time.sleep(0.05)  # time enough for the others to come
        get(self, name, local_path)

    return counted


def test_the_cache_is_bounded_and_drops_the_oldest(on_s3, tmp_path):
    _, manifest = on_s3
    shards = manifest.split("train")
    cache = _cache(on_s3, tmp_path, max_bytes=2 * shards[0].bytes)
    with cache.open(0) as first:
        cache.open(1).close()
        cache.open(0).close()
        cache.open(2).close()
        kept = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
        assert kept == {shards[0].sha256, shards[2].sha256}
        cache.open(1).close()
        assert not (tmp_path / "cache" / f"{shards[0].sha256}.tar").exists()
        assert len(first.read()) == shards[0].bytes  # an open file outlives its eviction


def test_a_copy_that_rotted_is_fetched_again(on_s3, tmp_path):
    _, manifest = on_s3
    with _cache(on_s3, tmp_path).open(0) as file:
        content = file.read()
    copy = tmp_path / "cache" / f"{manifest.split('train')[0].sha256}.tar"
    copy.write_bytes(_alter_one_byte(content))
    with _cache(on_s3, tmp_path).open(0) as file:
        assert file.read() == content


def test_prefetch_brings_shards_in_the_background(on_s3, tmp_path):
    folder, _ = on_s3
    folder.remove("train-000001.tar")  # its error waits for whoever opens it
    cache = _cache(on_s3, tmp_path)
    cache.prefetch([1, 0, 2])
    deadline = time.monotonic() + 10
    while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    folder.remove("train-000002.tar")
    cache.open(2).close()
    with pytest.raises(DataError, match="missing"):
        cache.open(1)


def test_a_cache_that_cannot_hold_a_shard_or_be_written_says_so(on_s3, tmp_path):
    with pytest.raises(DataError, match=r"may hold 1000; fix: raise data\.cache_gb"):
        _cache(on_s3, tmp_path, max_bytes=1000)
    (tmp_path / "cache").write_bytes(b"a file, not a folder")
    with pytest.raises(DataError, match=r"cannot keep shard train-000000\.tar .*data\.cache_dir"):
        _cache(on_s3, tmp_path).open(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, "manifest says 3 classes, found class 3 in 000000003.cls; fix"),
        ({"shape": (1, 16, 4)}, r"arrays uint8 \(1, 16, 4\), found uint8 \(1, 8, 8\); fix"),
        ({"dtype": "float16"}, r"arrays float16 \(1, 8, 8\), found uint8 \(1, 8, 8\); fix"),
        ("samples", "manifest says 499 samples, found 500 arrays and 500 labels; fix"),
    ],
)
def test_a_manifest_of_other_samples_is_refused(tmp_path, change, message):
    folder = Folder(tmp_path)
    manifest = prepare_digits(folder)
    if change == "samples":
        shards = [s.model_copy(update={"samples": s.samples - 1}) for s in manifest.shards]
        change = {"shards": tuple(shards)}
    reader = SampleReader(folder, manifest.model_copy(update=change))
    with pytest.raises(DataError, match=message):
        reader.read(0, 0)
