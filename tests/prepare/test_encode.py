"""Encoders against the libraries' own calls, on small networks with random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from dtr_scale.errors import ConfigError
from dtr_scale.logs import setup_logging
from dtr_scale.prepare import encode
from dtr_scale.prepare.encode import PixelEncoder, PosteriorEncoder, TextEncoder, weights_sha256
from tests.support.pictures import small_autoencoder, small_clip

CPU = torch.device("cpu")
CAPTIONS = ["A cat, on a mat!!", "", "two dogs and a very long caption " * 20]


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return small_autoencoder(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def text_encoder(clip_path):
    return TextEncoder(str(clip_path), "unused", CPU)


def pictures(count=3, size=32):
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), np.uint8)


def test_both_views_have_their_posterior(vae_path):
    encoder = PosteriorEncoder(str(vae_path), 32, CPU)
    stored = encoder.encode(pictures())
    assert (stored.dtype, stored.shape) == (np.float16, (3, 2, 2, 4, 8, 8))
    assert encoder.shape == (4, 8, 8)
    assert (encoder.scale_factor, encoder.shift) == (0.18215, 0.0)

    vae: AutoencoderKL = AutoencoderKL.from_pretrained(vae_path, low_cpu_mem_usage=False)
    for picture, views in zip(pictures(), stored, strict=True):
        for view, x in zip(views, (picture, picture[..., ::-1]), strict=True):
            x = torch.from_numpy(x.copy())[None].float() / 127.5 - 1
            with torch.no_grad():
                moments = vae.quant_conv(vae.encoder(x))  # pyright: ignore[reportOptionalCall]
            mean, log_var = moments.chunk(2, dim=1)
            np.testing.assert_allclose(view[0], mean[0], rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(view[1], (log_var / 2).exp()[0], rtol=2e-3)
    np.testing.assert_array_equal(encoder.means(stored), stored[:, 0, 0])


def test_what_is_decoded_has_the_pictures_shape(vae_path):
    encoder = PosteriorEncoder(str(vae_path), 32, CPU)
    x_start = torch.from_numpy(encoder.means(encoder.encode(pictures(9)))).float()
    images = encoder.decode(x_start * encoder.scale_factor + encoder.shift)
    assert images.shape == (9, 3, 32, 32)
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(vae_path, low_cpu_mem_usage=False)
    with torch.no_grad():
        expected = vae.decode(x_start[:2], return_dict=False)[0]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(images[:2], expected, rtol=1e-4, atol=1e-4)


def test_shift_and_scale_are_the_autoencoders(vae_path, tmp_path):
    config = json.loads((vae_path / "config.json").read_text())
    config |= {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / weights).symlink_to(vae_path / weights)
    encoder = PosteriorEncoder(str(tmp_path), 32, CPU)
    assert encoder.shift == pytest.approx(-0.1159 * 0.3611)
    before = PosteriorEncoder(str(vae_path), 32, CPU).record
    assert encoder.record is not None and before is not None
    assert (encoder.record.name, encoder.record.sha256) == (str(tmp_path), before.sha256)


def test_pixels_are_stored_as_they_are():
    encoder = PixelEncoder(32)
    np.testing.assert_array_equal(encoder.encode(pictures()), pictures())
    assert (encoder.shape, encoder.dtype, encoder.record) == ((3, 32, 32), "uint8", None)
    x_start = np.array([0, 255]) * encoder.scale_factor + encoder.shift
    np.testing.assert_allclose(x_start, [-1, 1])


def test_captions_become_the_last_hidden_states(text_encoder, clip_path):
    """The state at the end token, projected, is what open_clip calls the text's features."""
    tokens = text_encoder.encode(CAPTIONS)
    assert (tokens.dtype, tokens.shape) == (np.float16, (3, 77, 32))
    assert text_encoder.context_shape == (77, 32)
    model: Any = open_clip.create_model(f"local-dir:{clip_path}")
    ids = open_clip.get_tokenizer("ViT-L-14")(CAPTIONS)
    with torch.no_grad():
        expected = model.encode_text(ids)
    ends = ids.argmax(dim=-1)
    states = torch.from_numpy(tokens).float()[torch.arange(3), ends]
    torch.testing.assert_close(states @ model.text_projection, expected, rtol=1e-2, atol=2e-3)


def test_captions_are_filled_up_with_the_end_token(text_encoder):
    ids = text_encoder.tokenize(CAPTIONS)
    plain = open_clip.get_tokenizer("ViT-L-14")(CAPTIONS)
    for row, expected in zip(ids.tolist(), plain.tolist(), strict=True):
        end = expected.index(49407)
        assert row == expected[: end + 1] + [49407] * (76 - end)
    assert ids[1].tolist() == [49406] + [49407] * 76


def test_a_batch_does_not_change_its_captions(text_encoder):
    together = text_encoder.encode(CAPTIONS)
    alone = np.concatenate([text_encoder.encode([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(together, alone, rtol=1e-2, atol=1e-2)


def test_weights_are_known_by_their_numbers(vae_path, tmp_path):
    weights = load_file(vae_path / "diffusion_pytorch_model.safetensors")
    save_file(weights, tmp_path / "again.safetensors", metadata={"note": "another file"})
    again = load_file(tmp_path / "again.safetensors")
    assert weights_sha256(again) == weights_sha256(weights)
    name = next(iter(again))
    again[name].view(-1)[0] += 1e-6
    assert weights_sha256(again) != weights_sha256(weights)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: PosteriorEncoder(f"{path}/none", 32, CPU), "autoencoder '.*none' cannot be"),
        (lambda path: PosteriorEncoder(f"{path}/none", 32, CPU), "loaded: there is no such folder"),
        (lambda path: PosteriorEncoder("a/b", 32, CPU, local_only=True), "accepted: a name of the"),
        (
            lambda path: PosteriorEncoder("a/b", 32, CPU),
            "it is not in the cache, and the hub is ou",
        ),
        (lambda path: PosteriorEncoder(str(path), 30, CPU), "--size=30 is not accepted by .* of 4"),
        (lambda path: TextEncoder("ViT-L-14", "mine", CPU), "mine is no file, .* are: openai, lai"),
        (lambda path: TextEncoder("ViT-Q", "openai", CPU), "the known weights are: none"),
        (lambda path: TextEncoder(str(path), "x", CPU), "config file missing"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(vae_path, make, message, capfd):
    with pytest.raises(ConfigError, match=message) as caught:
        make(vae_path)
    assert "\n" not in str(caught.value)
    out, err = capfd.readouterr()
    # On a busy machine it may have taken long enough to be told.
    assert out == "" and all("loading the" in line for line in err.splitlines())


def test_what_takes_long_to_load_is_told(vae_path, capsys, monkeypatch):
    monkeypatch.setattr(encode, "_QUIET_SECONDS", 0.001)
    setup_logging(0)
    PosteriorEncoder(str(vae_path), 32, CPU)
    assert f"loading the autoencoder '{vae_path}' ..." in capsys.readouterr().err


def test_a_clip_without_weights_is_refused(clip_path, tmp_path):
    (tmp_path / "open_clip_config.json").symlink_to(clip_path / "open_clip_config.json")
    with pytest.raises(ConfigError, match=r"text encoder .* cannot be loaded .*weights"):
        TextEncoder(str(tmp_path), "openai", CPU)


@pytest.mark.parametrize("package", ["diffusers", "open_clip"])
def test_a_missing_package_is_named(package, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}.*pip install dtr-scale\[prepare\]"):
        if package == "diffusers":
            PosteriorEncoder("any", 32, CPU)
        else:
            TextEncoder("any", "any", CPU)


@pytest.mark.slow
def test_openais_weights_get_the_activation_they_were_trained_with(tmp_path):
    """open_clip builds ViT-B-32 with GELU and only warns that OpenAI's weights want QuickGELU.

    The weights are random, in the place where the hub's library keeps what it has fetched.
    """
    model = open_clip.create_model("ViT-B-32")
    folder = tmp_path / "hub" / "models--timm--vit_base_patch32_clip_224.openai"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "open_clip_model.safetensors")
    program = (
        "import torch; from dtr_scale.prepare.encode import TextEncoder\n"
        "encoder = TextEncoder('ViT-B-32', 'openai', torch.device('cpu'))\n"
        "print({type(m).__name__ for m in encoder._model.modules() if 'GELU' in type(m).__name__})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == "{'QuickGELU'}", ended.stderr
