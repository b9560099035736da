"""The benchmark of data runs, prints its table and leaves nothing behind; targets are met."""

import re

import numpy as np
import pytest

from dtr_scale.cli.main import main
from dtr_scale.prepare.writer import StoredSample
from dtr_scale.storage.folder import open_folder
from tests.support.runs import DEMO
from tests.support.shards import write_data

RATE = r" +(\d+) samples/s +[\d.]+ MB/s"
ROWS = {
    "first batch in mid-epoch, cold": r" +[\d.]+ s",
    "cold, one worker": RATE,
    "first batch in mid-epoch, warm": r" +([\d.]+) s",
    "warm, one worker, without draws": RATE,
    "warm, one worker": RATE,
    "warm, 2 workers": RATE + r" +\d+ per worker",
    "webdataset.WebDataset, one worker": RATE,
    "tarfile, in this process": RATE,
}


def _measured(text):
    """Return the figure of each row of a table."""
    title, *rows = text.splitlines()
    assert "samples of" in title
    matches = [
        re.fullmatch(re.escape(name) + figure, row)
        for (name, figure), row in zip(ROWS.items(), rows, strict=True)
    ]
    assert all(matches), text
    return {name: m[1] for name, m in zip(ROWS, matches, strict=True) if m and m.groups()}


@pytest.mark.slow
def test_the_digits_are_measured_from_object_storage(s3_url, tmp_path, digits, capsys):
    folder = open_folder(s3_url)
    for path in digits.iterdir():
        folder.write_bytes(path.name, path.read_bytes())
    places = [f"--data.shards={s3_url}", f"--data.cache_dir={tmp_path}/cache"]
    assert main(["bench", "data", "--config", str(DEMO), "--seconds", "1", *places]) == 0
    assert len(_measured(capsys.readouterr().out)) == 7
    assert list((tmp_path / "cache").iterdir()) == []


def test_made_up_samples_are_not_measured(capsys):
    assert main(["bench", "data", "--config", str(DEMO), "--data.type=synthetic"]) == 2
    assert "has no shards to measure" in capsys.readouterr().err


@pytest.mark.slow
def test_reading_is_three_times_as_fast_as_webdataset(tmp_path, capsys):
    """On latents of 32 KB; both in one run, because the machine may be busy."""

    def latents():
        generator = np.random.default_rng(0)
        for _ in range(6000):
            yield StoredSample(generator.standard_normal((2, 2, 4, 32, 32)).astype(np.float16))

    told = {"encoding": "posterior", "shape": (4, 32, 32), "dtype": "float16"}
    write_data(open_folder(tmp_path / "latents"), latents(), 1500, **told, scale_factor=0.18215)
    overrides = [f"--data.shards={tmp_path}/latents", f"--data.cache_dir={tmp_path}/cache"]
    model = '--model={"type": "dit", "variant": "DiT-S/2", "num_classes": 1}'
    command = ["bench", "data", "--seconds", "2", "--config", str(DEMO), model, *overrides]
    assert main([*command, "--train.global_batch_size=256", "--train.micro_batch_size=64"]) == 0
    rates = _measured(capsys.readouterr().out)
    reading, webdataset = (
        float(rates[name])
        for name in ("warm, one worker, without draws", "webdataset.WebDataset, one worker")
    )
    assert reading > 3 * webdataset
