"""Figures of a set of samples, against real pictures."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.reader import SampleReader
from dtr_scale.data.synthetic import SyntheticSource
from dtr_scale.evaluation.report import (
    has_pixel_metrics,
    pixel_frechet_distance,
    pixel_report,
    read_all,
    write_report,
)
from dtr_scale.prepare.digits import digits as digits_source
from dtr_scale.storage.folder import open_folder


@pytest.fixture(scope="module")
def splits(digits):
    folder = open_folder(digits)
    return {
        split: SampleReader(folder, read_manifest(folder, split), split)
        for split in ("train", "val")
    }


def test_a_split_is_read_in_order_and_decoded(splits):
    images, labels = read_all(splits["train"])
    assert (images.shape, images.dtype, labels.shape) == ((1500, 1, 8, 8), np.float32, (1500,))
    expected = list(digits_source().splits["train"])
    np.testing.assert_array_equal(images, np.array([row.array for row in expected]) / 8 - 1)
    np.testing.assert_array_equal(labels, [row.label for row in expected])


def test_real_pictures_report_what_a_perfect_generator_would(splits):
    images, labels = (torch.from_numpy(array) for array in read_all(splits["val"]))
    report = pixel_report(images, labels, train=splits["train"], held_out=splits["val"])
    assert report["pixel_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert report["pixel_frechet_distance_real"] > 0.1
    assert report["legibility"] > 0.9

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    worse = pixel_report(noise, labels, train=splits["train"], held_out=splits["val"])
    assert worse["pixel_frechet_distance"] > 10 * report["pixel_frechet_distance_real"]
    assert worse["pixel_frechet_distance_real"] == report["pixel_frechet_distance_real"]
    assert worse["legibility"] < 0.3


def test_samples_are_measured_as_they_are_shown(splits):
    images, labels = (torch.from_numpy(array) for array in read_all(splits["val"]))
    sharp = (images * 3).clamp(-1, 1)
    of = {"train": splits["train"], "held_out": splits["val"]}
    assert pixel_report(images * 3, labels, **of) == pixel_report(sharp, labels, **of)
    reference = images.numpy()
    assert pixel_frechet_distance(images * 3, reference) > 0.1


@pytest.mark.parametrize(
    ("shape", "expected"), [((1, 8, 8), True), ((1, 64, 64), True), ((4, 64, 64), False)]
)
def test_only_small_pixel_data_is_compared_pixel_by_pixel(shape, expected):
    assert has_pixel_metrics(SyntheticSource(shape, 10, 5)) is expected
    source = SyntheticSource(shape, 10, 5)
    source.manifest = source.manifest.model_copy(update={"encoding": "posterior"})
    assert not has_pixel_metrics(source)


def test_a_report_is_stored_with_its_manifest(tmp_path):
    path = write_report(tmp_path, {"pixel_frechet_distance": 1.25}, {"seed": 0, "decoder": None})
    assert path == tmp_path / "evaluation.json"
    assert json.loads(path.read_text()) == {
        "metrics": {"pixel_frechet_distance": 1.25},
        "manifest": {"seed": 0, "decoder": None},
    }


def test_no_earlier_report_is_lost(tmp_path):
    for seed in range(3):
        write_report(tmp_path, {"fid": float(seed)}, {"seed": seed})
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    reports = [json.loads(line) for line in lines]
    assert [report["metrics"]["fid"] for report in reports] == [0, 1, 2]
    assert datetime.fromisoformat(reports[0].pop("time")) <= datetime.now(UTC)
    assert reports[0] == {"metrics": {"fid": 0.0}, "manifest": {"seed": 0}}
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == {"fid": 2.0}
