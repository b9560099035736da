"""What a run stores, of data that is prepared and on this machine."""

from pathlib import Path

import pytest

from dtr_scale.config.load import load_experiment
from dtr_scale.data.manifest import Manifest, Shard, write_manifest
from dtr_scale.jobs.plan.storage import storage_of
from dtr_scale.storage.folder import open_folder

LARGE = Path(__file__).parents[3] / "configs" / "dit_l_dtr_antuw.json"


@pytest.mark.parametrize("name", ["shards", "latents"])
def test_prepared_data_is_counted_where_it_is_on_this_machine(tmp_path, name):
    """Also of an experiment that calls it as it was once called."""
    sha = "0" * 64
    shards = tuple(
        Shard(f"train-{i:06d}.tar", "train", 100, num_bytes, sha, sha)
        for i, num_bytes in enumerate((3_000, 5_000))
    )
    described = {"encoding": "posterior", "dtype": "float16", "num_classes": 1000}
    write_manifest(open_folder(tmp_path), Manifest(shape=(4, 32, 32), shards=shards, **described))
    experiment = load_experiment(LARGE, [f"--data.type={name}", f"--data.shards={tmp_path}"])
    found = storage_of(experiment, 10**9, ranks=8, micro_batch_size=32)
    assert (found.num_samples, found.sample, found.shards) == (200, 40, 8_000)
    read_at_once = 2 * experiment.data.window_shards * min(experiment.data.num_lanes, 8)
    assert found.windows == read_at_once * 5_000


def test_of_other_data_a_sample_is_counted_from_its_shape(tmp_path):
    overrides = ["--data.type=shards", f"--data.shards={tmp_path / 'none'}"]
    experiment = load_experiment(LARGE, overrides)
    found = storage_of(experiment, 10**9, ranks=8, micro_batch_size=32)
    assert (found.num_samples, found.shards) == (None, None)
    assert found.sample == 2 * 2 * 2 * 4 * 32 * 32
