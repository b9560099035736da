"""Extractors are the published networks, whatever the batch and the process's precision."""

import urllib.error
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch_fidelity import FeatureExtractorInceptionV3

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import EXTRACTORS, Dinov2, Inception, build_extractor
from dtr_scale.evaluation.metrics import frechet_distance
from dtr_scale.evaluation.pictures import file_sha256
from dtr_scale.prepare.digits import digits

CPU = torch.device("cpu")
FEW = 4


@pytest.fixture(scope="module")
def inception(inception_weights):
    return Inception(CPU, inception_weights)


@pytest.fixture(scope="module")
def whole(inception, pictures):
    """Inception's features of a few pictures in one batch."""
    return inception.features(pictures[0][:FEW])


def test_inception_is_torch_fidelitys(inception_weights, pictures, whole):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(inception_weights),
    )
    blocks = []
    theirs.get_submodule("Mixed_6d").register_forward_hook(lambda *given: blocks.append(given[2]))
    pooled, logits = theirs(torch.from_numpy(pictures[0][:FEW]))
    np.testing.assert_array_equal(whole.pooled, pooled)
    np.testing.assert_allclose(whole.probabilities, logits.softmax(dim=1), atol=1e-6)
    assert whole.pooled.std(axis=0).mean() > 0.01  # no pictures look alike to these weights

    # The branch comes first in its block: 17 x 17 places of 7 channels, as TensorFlow lays them.
    expected = blocks[0][:, :7].permute(0, 2, 3, 1)
    assert expected.shape == (FEW, 17, 17, 7) and expected.min() == 0
    np.testing.assert_array_equal(whole.spatial, expected.flatten(1))
    assert whole.spatial.shape == (FEW, 2023)


def test_the_batch_does_not_matter(inception, pictures, whole):
    single = [inception.features(picture[None]) for picture in pictures[0][:FEW]]
    for of_all, of_each in zip(whole, zip(*single, strict=True), strict=True):
        np.testing.assert_allclose(of_all, np.concatenate(of_each), rtol=1e-4, atol=1e-5)


def test_the_precision_of_the_process_does_not_matter(inception, pictures, whole):
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            allowed = inception.features(pictures[0][:FEW])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for expected, found in zip(whole, allowed, strict=True):
        np.testing.assert_array_equal(expected, found)


def test_weights_that_were_not_published_are_told(inception_weights, warnings_of):
    record = Inception(CPU, inception_weights).record()
    assert record["weights_sha256"] == file_sha256(inception_weights)
    assert record["version"].startswith("torch-fidelity 0.4")
    (warning,) = warnings_of("dtr_scale.evaluation.features")
    assert f"begins with {record['weights_sha256'][:8]}, not 6726825d" in warning


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(EvaluationError, match=r"cannot be fetched.*put it at .*-weights"):
        Inception(CPU)
    (tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half")
    with pytest.raises(EvaluationError, match="is damaged; remove it"):
        Inception(CPU)


def test_a_file_of_other_weights_is_refused(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("inception", "dinov2"):
        with pytest.raises(EvaluationError, match=r"other.pth cannot be loaded .*; accepted: "):
            build_extractor(name, CPU, tmp_path / "other.pth")
        with pytest.raises(EvaluationError, match="FileNotFoundError"):
            build_extractor(name, CPU, tmp_path / "missing.pth")
    torch.save({"code": print}, tmp_path / "code.pth")
    with pytest.raises(EvaluationError, match="UnpicklingError"):
        Inception(CPU, tmp_path / "code.pth")


def test_extractors_by_name():
    assert list(EXTRACTORS) == ["efficientnet", "inception", "dinov2"]
    with pytest.raises(EvaluationError, match="accepted: efficientnet, inception, dinov2"):
        build_extractor("vgg", CPU)
    with pytest.raises(EvaluationError, match="give it with --dinov2-weights"):
        build_extractor("dinov2", CPU)


def test_dinov2_is_timms_class_token(tmp_path, pictures):
    create: Any = timm.create_model  # whose type is that of no network in particular
    network = create("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True)
    # As published: with a mask token, and position embeddings of 37 x 37 patches.
    torch.save({**network.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "s.pth")
    ours = Dinov2(CPU, tmp_path / "s.pth").features(pictures[0][:FEW]).pooled
    assert ours.shape == (FEW, 384)

    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(pictures[0][:FEW]).float(), (224, 224), mode="bicubic", antialias=True
    )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.inference_mode():
        tokens = network.eval().forward_features((scaled.clamp(0, 255) / 255 - mean) / std)
    np.testing.assert_allclose(ours, tokens[:, 0], atol=1e-4)


def test_efficientnets_distance_grows_with_the_damage():
    """Of grey digits: others of the same kind are nearest."""
    rows = list(digits().splits["train"])[:40]
    real, others = np.split(np.array([row.array for row in rows], np.uint8) * 15, 2)
    noise = np.random.default_rng(0).normal(0, 1, others.shape)
    damaged = [np.clip(others + noise * level, 0, 255).astype(np.uint8) for level in (15, 60)]
    extractor = build_extractor("efficientnet", CPU)
    features = [extractor.features(each).pooled for each in (real, others, *damaged)]
    distances = [frechet_distance(features[0], each) for each in features[1:]]
    assert distances == sorted(distances)
    assert distances[2] > 1.5 * distances[0]


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8)])
def test_latents_and_single_pictures_have_no_features(shape):
    extractor = build_extractor("efficientnet", CPU)
    with pytest.raises(EvaluationError, match=r"give pictures uint8 \[n, 1 or 3, H, W\]"):
        extractor.features(np.zeros(shape, np.uint8))
