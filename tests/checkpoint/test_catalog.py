"""Commit checkpoints in an order that a power cut cannot undo."""

import os
from pathlib import Path

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.layout import COMPLETE, INDEX
from dtr_scale.storage.folder import open_folder

PART = "rank_00000.safetensors"
ENTRY = {"file": PART, "bytes": 4, "blocks": [], "pieces": {}}


def save(catalog, step):
    catalog.begin(step)
    catalog.target(step).write_bytes(PART, b"data")
    catalog.commit(step, [ENTRY], {"step": step})


def test_the_mark_is_written_after_all_that_it_stands_for(folder, monkeypatch):
    written, write_bytes = [], type(folder).write_bytes

    def spy(self, name, data):
        written.append(name.rpartition("/")[2])
        write_bytes(self, name, data)

    monkeypatch.setattr(type(folder), "write_bytes", spy)
    save(Catalog(folder), 1)
    assert written[-3:] == [PART, INDEX, COMPLETE]


def test_every_file_and_folder_is_synced_before_it_counts(tmp_path, monkeypatch):
    """Files before they are renamed, their folder before it is renamed, and where it is after."""
    done = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def spy_fsync(descriptor):
        done.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def spy_rename(of):
        def renamed(old, new, **kwargs):
            done.append(("rename", Path(old).name, Path(new).name))
            of(old, new, **kwargs)

        return renamed

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_rename(replace))
    monkeypatch.setattr(os, "rename", spy_rename(rename))
    save(Catalog(open_folder(tmp_path / "checkpoints")), 1)

    renames = [event for event in done if event[0] == "rename"]
    assert [new for _, _, new in renames] == [PART, INDEX, COMPLETE, "step_00000001"]
    for rename_of_file in renames[:3]:
        assert done.index(("fsync", rename_of_file[1])) < done.index(rename_of_file)
    published = done.index(renames[3])
    assert done.index(renames[2]) < done.index(("fsync", ".step_00000001.tmp")) < published
    assert ("fsync", "checkpoints") in done[published:]
