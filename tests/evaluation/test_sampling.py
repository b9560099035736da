"""Samples are a function of (seed, index), and a picture shows them all."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dtr_scale.config.schema import EvaluationConfig
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.sampling import (
    KeyedNoise,
    SamplingSettings,
    class_labels,
    draw_samples,
)
from dtr_scale.jobs.network import build_model
from dtr_scale.models.dit import DiT
from dtr_scale.models.routing import RoutingSpec

SETTINGS = SamplingSettings(
    noise_schedule="cosine",
    num_timesteps=1000,
    sampler="ddpm",
    num_sampling_steps=4,
    cfg_scale=2.0,
    cfg_channels=None,
    clip_denoised=True,
    seed=3,
)


def network(**changed: Any):
    """A small network whose output depends on all that it is given."""
    settings: dict[str, Any] = {"num_classes": 3, "routing": RoutingSpec("dtr")} | changed
    model = DiT(
        hidden_size=32, depth=2, num_heads=2, patch_size=2, input_size=8, in_channels=1, **settings
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15, generator=generator)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "dpm_solver"}],
    ids=lambda changed: changed["sampler"],
)
def drawn(request):
    """Settings, and samples 0 to 9 drawn with them in one batch."""
    settings = replace(SETTINGS, **request.param)
    return settings, draw_samples(network(), settings, range(9), batch_size=9)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_samples_do_not_depend_on_the_batch_size(drawn, batch_size):
    settings, samples = drawn
    assert (samples.shape, samples.dtype) == ((9, 1, 8, 8), torch.float32)
    again = draw_samples(network(), settings, range(9), batch_size=batch_size)
    torch.testing.assert_close(again, samples, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [(0, 5, 9), (0, 1, 2, 9), (0, 9, 9)])
def test_samples_do_not_depend_on_who_draws_them(drawn, split):
    settings, samples = drawn
    parts = [
        draw_samples(network(), settings, range(first, stop), batch_size=4)
        for first, stop in pairwise(split)
    ]
    torch.testing.assert_close(torch.cat(parts), samples, rtol=1e-5, atol=1e-5)
    every_other = draw_samples(network(), settings, range(1, 9, 2), batch_size=3)
    torch.testing.assert_close(every_other, samples[1::2], rtol=1e-5, atol=1e-5)


def test_samples_differ_by_index_class_seed_and_guidance(drawn):
    settings, samples = drawn
    assert len({sample.numpy().tobytes() for sample in samples}) == 9
    for changed in (replace(settings, seed=4), replace(settings, cfg_scale=1.0)):
        other = draw_samples(network(), changed, range(9), batch_size=9)
        assert (other - samples).flatten(1).abs().amax(dim=1).min() > 1e-3
    assert class_labels(range(2, 8), 3).tolist() == [2, 0, 1, 2, 0, 1]


def test_every_setting_matters():
    plain = draw_samples(network(), SETTINGS, range(6), batch_size=6)
    ddim = replace(SETTINGS, sampler="ddim")
    for settings in (
        ddim,
        replace(ddim, eta=0.5),
        replace(ddim, eta=1.0),
        replace(SETTINGS, sampler="dpm_solver"),
        replace(SETTINGS, cfg_interval=(200, 700)),
    ):
        samples = draw_samples(network(), settings, range(6), batch_size=6)
        assert samples.isfinite().all()
        assert (samples - plain).flatten(1).abs().amax(dim=1).min() > 1e-3
    everywhere = replace(SETTINGS, cfg_interval=(0, 1000))
    assert torch.equal(draw_samples(network(), everywhere, range(6), batch_size=6), plain)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(
        ConfigError, match=r"evaluation\.sampler: 'euler' is unknown; accepted: ddpm"
    ):
        draw_samples(network(), replace(SETTINGS, sampler="euler"), range(1), batch_size=1)


def test_the_caller_may_give_the_conditions():
    def reversed_labels(indices):
        return 2 - class_labels(indices, 3)

    by_default = draw_samples(network(), SETTINGS, range(6), batch_size=4)
    given = draw_samples(network(), SETTINGS, range(6), batch_size=4, conditions=reversed_labels)
    same = torch.tensor([False, True, False, False, True, False])  # label 1 stays
    assert torch.equal((given == by_default).flatten(1).all(1), same)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_texts_are_conditions_too(cfg_scale):
    model = network(conditioning="text", context_length=5, context_dim=16)
    settings = replace(SETTINGS, cfg_scale=cfg_scale)
    tokens = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))

    def texts(indices):
        return tokens[list(indices)]

    samples = draw_samples(model, settings, range(6), batch_size=6, conditions=texts)
    again = draw_samples(model, settings, range(6), batch_size=4, conditions=texts)
    torch.testing.assert_close(again, samples, rtol=1e-5, atol=1e-5)
    other = draw_samples(
        model, settings, range(6), batch_size=6, conditions=lambda i: texts(i).flip(0)
    )
    assert (other - samples).flatten(1).abs().amax(dim=1).min() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        {
            "type": "adm", "image_size": 8, "model_channels": 32, "num_res_blocks": 1,
            "attention_resolutions": [2], "channel_mult": [1, 2], "class_dropout_prob": 0.1,
        },
        {
            "type": "dit", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 2,
            "input_size": 8, "in_channels": 3, "learn_sigma": False, "num_experts": 2,
        },
    ],
    ids=["adm", "experts"],
)  # fmt: skip
def test_any_network_can_be_sampled(config):
    torch.manual_seed(0)
    model = build_model(config | {"num_classes": 3}).eval()
    for settings in (SETTINGS, replace(SETTINGS, sampler="dpm_solver", cfg_interval=(100, 800))):
        samples = draw_samples(model, settings, range(4), batch_size=3)
        assert samples.shape == (4, 3, 8, 8)
        assert samples.isfinite().all()


def test_masks_that_change_with_training_are_those_of_the_step():
    roaming = network(routing=RoutingSpec("max_roaming", update_every_steps=1))
    samples = [draw_samples(roaming, SETTINGS, range(2), batch_size=2, step=s) for s in (0, 0, 3)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.allclose(samples[0], samples[2])
    with pytest.raises(ConfigError, match="call the network with step="):
        draw_samples(roaming, SETTINGS, range(2), batch_size=2)


def test_clipping_keeps_samples_in_range():
    wild = draw_samples(network(), replace(SETTINGS, clip_denoised=False), range(6), batch_size=6)
    clipped = draw_samples(network(), SETTINGS, range(6), batch_size=6)
    assert wild.abs().max() > 1.5 > 1.1 > clipped.abs().max()


def test_guidance_needs_a_null_label_and_scale_1_does_not():
    unguided = replace(SETTINGS, cfg_scale=1.0)
    samples = draw_samples(network(class_dropout_prob=0), unguided, range(3), batch_size=3)
    assert samples.isfinite().all()
    with pytest.raises(ConfigError, match="needs a model trained with a null label"):
        draw_samples(network(class_dropout_prob=0), SETTINGS, range(3), batch_size=3)


def test_noise_is_standard_normal_and_keyed_by_sample_and_step():
    noise = KeyedNoise(0, range(2000), (1, 2, 2), torch.device("cpu"))
    draws = torch.stack([noise.start, noise[0], noise[1]])
    assert draws.shape == (3, 2000, 1, 2, 2)
    moments = torch.corrcoef(draws.flatten(1))
    torch.testing.assert_close(moments, torch.eye(3), rtol=0, atol=0.05)
    assert draws.mean().abs() < 0.02
    assert (draws.std() - 1).abs() < 0.02
    tail = KeyedNoise(0, range(1990, 2000), (1, 2, 2), torch.device("cpu"))
    assert torch.equal(tail[1], noise[1][1990:])


def test_progress_sees_the_steps_of_every_batch():
    seen = []

    def progress(steps):
        seen.append(list(steps))
        return seen[-1]

    draw_samples(network(), SETTINGS, range(5), batch_size=3, progress=progress)
    assert seen == [[0, 1, 2, 3]] * 2


def test_the_manifest_holds_every_setting():
    assert SETTINGS.manifest() == {
        "noise_schedule": "cosine", "num_timesteps": 1000, "sampler": "ddpm",
        "num_sampling_steps": 4, "cfg_scale": 2.0, "cfg_channels": None,
        "clip_denoised": True, "seed": 3, "eta": 0.0, "cfg_interval": None, "labels": "balanced",
    }  # fmt: skip


def test_the_experiment_names_the_settings():
    settings = EvaluationConfig.model_validate(
        {"sampler": "dpm_solver", "eta": 1, "cfg_interval": [200, 700], "cfg_channels": None}
    )
    assert (settings.sampler, settings.eta, settings.cfg_channels) == ("dpm_solver", 1.0, None)
    assert settings.cfg_interval == (200, 700)
    for wrong in ({"eta": 1.5}, {"sampler": "euler"}, {"cfg_interval": [-1, 5]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EvaluationConfig.model_validate(wrong)
    with pytest.raises(ValueError, match=r"evaluation\.cfg_interval = \[7, 7\] is empty; give"):
        EvaluationConfig.model_validate({"cfg_interval": [7, 7]})
