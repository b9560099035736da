"""The prefetcher hands an error of the background to whoever gets the shard."""

import pytest

from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.prefetch import Prefetcher
from dtr_scale.data.seals import ProcessSeals
from dtr_scale.data.shards import LocalShards
from dtr_scale.data.split import Split
from dtr_scale.storage.folder import open_folder


class OnceBroken(LocalShards):
    """Raises, at the first opening of shard 0, what nobody foresaw."""

    num_openings = 0

    def open(self, i, wait=True):
        self.num_openings += i == 0
        if self.num_openings == 1:
            raise RuntimeError("what nobody foresaw")
        return super().open(i, wait)


def test_what_a_thread_meets_is_met_again_by_who_gets_the_shard(digits):
    folder = open_folder(digits)
    shards = OnceBroken(Split(folder, read_manifest(folder)), ProcessSeals())
    prefetcher = Prefetcher(shards, max_open=3)
    prefetcher.plan([0])
    for thread in prefetcher._threads:
        thread.join()
    assert len(prefetcher.get(0).rows) == 500
    assert shards.num_openings == 2
    prefetcher.close()
    with pytest.raises(RuntimeError, match="nobody foresaw"):
        broken = OnceBroken(shards.split, ProcessSeals())
        Prefetcher(broken, max_open=3).get(0)
