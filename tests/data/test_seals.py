"""A cache is its user's alone: another user's folder, or a link in it, is refused by name."""

import os
import subprocess

import pytest

from dtr_scale.data.cache import choose_shards, default_cache_dir
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.split import Split
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import open_folder

ANOTHER_USER = 54321


@pytest.fixture
def split(digits):
    folder = open_folder(digits)
    return Split(folder, read_manifest(folder))


def _open(split, cache_dir):
    choose_shards(split, cache_dir, 2**30).open(0).close()


def _as_another_user(*command):
    if os.geteuid():
        pytest.skip("needs root, to act as another user")
    subprocess.run(command, check=True, user=ANOTHER_USER)


@pytest.fixture
def open_to_all(tmp_path):
    """A folder like /tmp, where every user may make files."""
    path = tmp_path / "open"
    path.mkdir()
    for folder in (path, *path.parents[:4]):  # pytest's own are for one user
        if folder.owner() == path.owner() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o011)
    path.chmod(0o1777)
    return path


def test_the_default_is_a_folder_of_the_users_own(split, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/dtr_scale/shards"
    _open(split, None)
    assert default_cache_dir().stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home/.cache/dtr_scale/shards"


def test_another_users_folder_is_refused(split, open_to_all):
    cache = open_to_all / "cache"
    _as_another_user("mkdir", "-m", "700", cache)
    with pytest.raises(DataError, match=rf"{cache} belongs to user 54321, .*fix: set data\.cache_"):
        _open(split, cache)
    assert list(cache.iterdir()) == []


def test_a_lock_that_another_user_made_a_link_overwrites_nothing(split, open_to_all):
    precious = open_to_all.parent / "precious"
    precious.write_text("precious")
    lock = open_to_all / f"{split.shards[0].sha256}.lock"
    _as_another_user("ln", "-s", precious, lock)
    open_to_all.chmod(0o700)
    with pytest.raises(DataError, match=rf"{lock} is a link, .*fix: remove it"):
        _open(split, open_to_all)
    assert precious.read_text() == "precious"
    lock.unlink()
    _open(split, open_to_all)


def test_in_a_folder_that_users_share_one_of_the_own_is_made(split, open_to_all):
    _open(split, open_to_all)
    (own,) = open_to_all.iterdir()
    assert own.name == f"dtr_scale-{os.geteuid()}"
    assert own.stat().st_mode & 0o777 == 0o700


def test_another_user_cannot_make_it_first(split, open_to_all):
    own = open_to_all / f"dtr_scale-{os.geteuid()}"
    _as_another_user("mkdir", "-m", "777", own)
    with pytest.raises(DataError, match=r"belongs to user 54321"):
        _open(split, open_to_all)


def test_local_shards_need_no_cache(split, monkeypatch, tmp_path):
    (tmp_path / "home").write_bytes(b"")  # a home that cannot be written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    _open(split, None)


def test_a_link_to_a_folder_is_refused(split, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"link is a link; fix: set data\.cache_dir to"):
        _open(split, tmp_path / "link")


def test_a_cache_that_cannot_be_made_says_what_to_do(split, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be used .*fix: set data\.cache_dir .*cache_gb=0"):
        _open(split, tmp_path / "file" / "cache")
