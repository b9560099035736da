"""References in ADM's format, and numbers that torch-fidelity finds of the same pictures, too."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import EfficientNet, Features, Inception
from dtr_scale.evaluation.metrics import frechet_distance, moments
from dtr_scale.evaluation.pictures import ArrayPictures, NpzPictures
from dtr_scale.evaluation.reference import (
    Reference,
    ReferenceFile,
    compare,
    measure,
    write_reference,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inception(inception_weights):
    return Inception(CPU, inception_weights)


@pytest.mark.slow
def test_numbers_are_torch_fidelitys_own(inception, inception_weights, pictures, tmp_path):
    """Both go through the whole graph, with the same file of weights."""
    samples, real = (ArrayPictures(each, "") for each in pictures)
    write_reference(tmp_path / "ref.npz", real, [inception], num_pictures=12, manifest={})
    found = compare(measure(samples, inception), ReferenceFile(tmp_path / "ref.npz"), inception)

    for name, images in zip(("samples", "real"), pictures, strict=True):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{i:02}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "real"),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        fid=True, isc=True, prc=True, isc_splits=1, samples_shuffle=False,
        cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert found["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert found["recall"] == pytest.approx(theirs["recall"], abs=1e-6)

    spatial = [inception.features(each).spatial for each in pictures]
    assert found["sfid"] == pytest.approx(frechet_distance(*spatial), rel=1e-6)
    # As guided-diffusion's evaluator reads it: by these names, and without a pickle.
    with np.load(tmp_path / "ref.npz") as stored:
        sizes = {name: stored[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
    assert sizes == {
        "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
        "arr_0": (12, 40, 40, 3),
    }  # fmt: skip


class Means(EfficientNet):
    """Colours' means as features: pictures by the hundred cost nothing."""

    def __init__(self, version="1"):
        self.device, self.batch_size, self.weights_sha256 = CPU, 16, version
        self.pictures_seen = 0

    def features(self, images):
        self.pictures_seen += len(images)
        return Features(images.astype(np.float32).mean(axis=(2, 3)))


@pytest.fixture
def many():
    images = np.random.default_rng(0).integers(0, 256, (101, 3, 4, 4), dtype=np.uint8)
    return ArrayPictures(images, "random")


def test_a_reference_has_the_moments_of_all_and_some_of_the_pictures(many, tmp_path):
    extractor = Means()
    path = tmp_path / "new" / "ref.npz"
    write_reference(path, many, [extractor], num_pictures=10, manifest={"of": "random"})
    images = next(many.batches(101))
    reference = ReferenceFile(path)
    kept = next(reference.pictures.batches(50))
    np.testing.assert_array_equal(kept, images[np.arange(10) * 101 // 10])
    expected = moments(extractor.features(images).pooled)
    stored, spatial = reference.moments(extractor)
    np.testing.assert_allclose(stored.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(stored.covariance, expected.covariance, rtol=1e-10)
    assert spatial is None

    metrics = compare(measure(many, extractor), reference, extractor)
    assert set(metrics) == {"fd_efficientnet", "precision_efficientnet", "recall_efficientnet"}
    assert metrics["fd_efficientnet"] == pytest.approx(0, abs=1e-9)
    assert metrics["recall_efficientnet"] == 1
    record = reference.record(extractor)
    assert json.loads(json.dumps(record)) == record
    assert (record["moments_of"], record["num_pictures"]) == ("the whole set", 10)
    assert (record["set_pictures"], record["of"]) == (101, "random")


def test_a_reference_of_pictures_alone_is_measured(many, tmp_path):
    images = next(many.batches(101))
    np.savez(tmp_path / "ref.npz", images.transpose(0, 2, 3, 1))
    reference, extractor = ReferenceFile(tmp_path / "ref.npz"), Means()
    metrics = compare(measure(many, extractor), reference, extractor)
    assert metrics["fd_efficientnet"] == pytest.approx(0, abs=1e-9)
    assert reference.record(extractor)["moments_of"] == "the 101 pictures"


def test_pictures_are_a_reference_themselves(many):
    reference, extractor = Reference(many), Means()
    metrics = compare(measure(many, extractor), reference, extractor)
    assert metrics["fd_efficientnet"] == pytest.approx(0, abs=1e-9)
    assert reference.record(extractor)["moments_of"] == "the 101 pictures"


def test_moments_of_other_weights_are_not_compared(many, tmp_path):
    write_reference(tmp_path / "ref.npz", many, [Means()], num_pictures=9, manifest={})
    with pytest.raises(EvaluationError, match=r"made with weights 1 of efficientnet, these are 2"):
        ReferenceFile(tmp_path / "ref.npz").moments(Means("2"))


def test_moments_that_do_not_belong_together_are_refused(many, tmp_path):
    arrays = {"mu_efficientnet": np.zeros(3), "sigma_efficientnet": np.eye(4)}
    np.savez(tmp_path / "ref.npz", arr_0=np.zeros((5, 4, 4, 3), np.uint8), **arrays)
    with pytest.raises(EvaluationError, match=r"mu_efficientnet \[3\].*do not belong together"):
        ReferenceFile(tmp_path / "ref.npz").moments(Means())


def test_features_are_computed_once(many, tmp_path, monkeypatch, warnings_of):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extractor = Means()
    first = measure(many, extractor)
    np.savez(tmp_path / "same.npz", next(many.batches(101)).transpose(0, 2, 3, 1))
    again = measure(ArrayPictures(next(many.batches(101)).copy(), "elsewhere"), extractor)
    assert extractor.pictures_seen == 101
    np.testing.assert_array_equal(again.pooled, first.pooled)
    np.testing.assert_array_equal(again.moments.covariance, first.moments.covariance)

    other = Means("2")
    measure(many, other)
    measure(NpzPictures(tmp_path / "same.npz"), other)  # another content: a file with a header
    assert other.pictures_seen == 2 * 101

    folder = tmp_path / "cache/dtr_scale/features"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert not warnings_of("dtr_scale.evaluation.kept")
    np.testing.assert_array_equal(measure(many, extractor).pooled, first.pooled)
    assert extractor.pictures_seen == 2 * 101
    assert "computed again" in warnings_of("dtr_scale.evaluation.kept")[0]


def test_a_full_cache_loses_its_oldest(many, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for version in "123":
        measure(many, Means(version))
    folder = tmp_path / "dtr_scale/features"
    size = next(folder.iterdir()).stat().st_size
    measure(many, Means("1"))  # used again, so the second is the oldest
    monkeypatch.setattr("dtr_scale.evaluation.kept._MAX_BYTES", 3.5 * size)
    measure(many, Means("4"))
    seen = []
    for version in "1342":
        extractor = Means(version)
        measure(many, extractor)
        seen.append(extractor.pictures_seen)
    assert seen == [0, 0, 0, 101]


@pytest.mark.parametrize("wrong", ["a file is in the way", "others can write to it"])
def test_a_cache_that_cannot_be_used_is_told_and_left_alone(
    many, tmp_path, monkeypatch, warnings_of, wrong
):
    place = tmp_path / "dtr_scale"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if wrong == "a file is in the way":
        place.write_text("in the way")
    else:
        (place / "features").mkdir(parents=True)
        (place / "features").chmod(0o777)
    extractor = Means()
    for _ in range(2):
        assert measure(many, extractor).pooled.shape == (101, 3)
    assert extractor.pictures_seen == 2 * 101
    told = warnings_of("dtr_scale.evaluation.kept")
    assert len(told) == 2 and "nothing is kept; set XDG_CACHE_HOME" in told[0]
    assert not [path for path in place.rglob("*") if path.is_file()]
