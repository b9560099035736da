"""Runs that leave as pipelines: drawn by diffusers in a process without this package."""

import json

import pytest
import torch

from dtr_scale.checkpoint.hub import push_folder
from dtr_scale.cli.main import main
from dtr_scale.errors import CheckpointError
from dtr_scale.evaluation.sampling import KeyedNoise, Sampler
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import load_run
from dtr_scale.prepare.encode import PosteriorEncoder
from tests.support.hub import Hub
from tests.support.pictures import class_folders, small_autoencoder
from tests.support.pipelines import draw_elsewhere
from tests.support.runs import train

CPU = torch.device("cpu")
SMALL = (
    "--train.global_batch_size=16", "--train.micro_batch_size=16", "--train.max_steps=12",
    "--train.lr=1e-2", "--train.ema_decay=0.5", "--evaluation.num_sampling_steps=6",
)  # fmt: skip
LATENTS = (
    "--model.in_channels=4", "--model.num_classes=2", "--evaluation.clip_denoised=false",
    "--evaluation.cfg_channels=3", "--evaluation.sampler=ddim",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(digits, tmp_path_factory):
    """A routed run of pixels that was evaluated."""
    path = tmp_path_factory.mktemp("pixels") / "run"
    measured = ("--evaluation.every_steps=12", "--evaluation.num_samples=20")
    assert train(digits, path, *SMALL, *measured) == 0
    return path


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A routed run of latents, and the autoencoder that made them."""
    place = tmp_path_factory.mktemp("latents")
    class_folders(place / "pictures/train", {"a": 8, "b, too": 8})
    vae = small_autoencoder(place / "vae")
    prepare = ["prepare", "imagefolder", str(place / "pictures"), "--size", "32"]
    assert main([*prepare, "--vae", str(vae), "--out", str(place / "data")]) == 0
    assert train(place / "data", place / "run", *SMALL, *LATENTS, "--evaluation.every_steps=0") == 0
    return place / "run", vae


def export(capsys, run, out, *arguments, code=0):
    capsys.readouterr()
    command = ["export", run, "--to", "diffusers", "--out", out, *arguments]
    assert main([*map(str, command)]) == code
    told = capsys.readouterr()
    return told.out if code == 0 else told.err.splitlines()[-1]


def ours(run_dir, *overrides):
    """Our samples 0 to 3 of a run, and the noise they begin with and that of its steps."""
    run = load_run(run_dir, overrides)
    settings = sampling_settings(run.experiment)
    sampler = Sampler(run.network, settings, step=run.mask_step)
    network = run.network
    shape = (network.in_channels, network.input_size, network.input_size)
    noise = KeyedNoise(settings.seed, range(4), shape, CPU)
    steps = torch.stack([noise[i] for i in range(sampler.num_steps - 1)])
    return sampler.draw(range(4)), {"latents": noise.start, "step_noise": steps}


def test_a_routed_run_of_pixels_is_drawn_elsewhere(run_dir, tmp_path, capsys):
    out = tmp_path / "pipeline"
    told = export(capsys, run_dir, out)
    assert "decoder: none, samples are pixels" in told
    assert f'from_pretrained("{out}", trust_remote_code=True)' in told
    samples, noise = ours(run_dir)
    given = json.dumps({"class_labels": [0, 1, 2, 3], "output_type": "latent"})
    drawn = draw_elsewhere(out, tmp_path, given, **noise)
    assert samples.abs().max() <= 1  # clipped, as the run's evaluation does
    torch.testing.assert_close(drawn, samples, rtol=0, atol=1e-5)


def test_a_routed_run_of_latents_is_decoded_elsewhere(latents, tmp_path, capsys):
    run, vae = latents
    out = tmp_path / "pipeline"
    assert f"decoder: a copy of {vae}" in export(capsys, run, out)
    samples, noise = ours(run)
    pictures = (PosteriorEncoder(str(vae), None, CPU).decode(samples) / 2 + 0.5).clamp(0, 1)
    given = json.dumps({"class_labels": ["a", "b, too", "a", 1], "output_type": "pt"})
    drawn = draw_elsewhere(out, tmp_path, given, latents=noise["latents"])
    torch.testing.assert_close(drawn, pictures, rtol=0, atol=1e-5)
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_the_card_tells_what_the_network_is(run_dir, tmp_path, capsys):
    export(capsys, run_dir, tmp_path / "pipeline")
    text = (tmp_path / "pipeline" / "README.md").read_text()
    for part in (
        "library_name: diffusers", "| routing | dtr, alpha 4.0, beta 0.8 |", "12 of 12",
        "decay 0.5", "training samples [1, 8, 8]", "| pixel_frechet_distance |", '"cfg_scale"',
        "park2024dtr",
    ):  # fmt: skip
        assert part in text, part
    assert '"step_00000012"' in text and str(run_dir) not in text  # a card is for others
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert (index["guidance_scale"], index["num_inference_steps"]) == (3.0, 6)


def test_what_decodes_is_known_or_asked_for(latents, run_dir, tmp_path, capsys):
    run, vae = latents
    weights = vae / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    try:
        other = small_autoencoder(tmp_path / "other")
        changed = bytearray(kept)
        changed[-1] ^= 1
        weights.write_bytes(changed)
        told = export(capsys, run, tmp_path / "out", code=2)
        assert f"error: {vae} has weights " in told and "give those by --vae" in told
        export(capsys, run, tmp_path / "given", "--vae", other)
    finally:
        weights.write_bytes(kept)
    told = export(capsys, run_dir, tmp_path / "out", "--vae", vae, code=2)
    assert "decodes latents, these are pixels" in told
    told = export(capsys, run, tmp_path / "given", code=2)
    assert "is there and not empty; give a new folder" in told
    assert not (tmp_path / "out").exists()


def test_without_a_token_the_folder_is_told(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    told = export(capsys, run_dir, tmp_path / "a", "--push", "me/digits")
    assert "not pushed: there is no token of the hub" in told
    assert f"hf upload me/digits {tmp_path / 'a'}" in told
    assert (tmp_path / "a" / "model_index.json").exists()
    told = export(capsys, run_dir, tmp_path / "b", "--push", "a/b/c", code=2)
    assert "--push=a/b/c is no name of the hub" in told
    assert not (tmp_path / "b").exists()


def test_a_folder_is_pushed_with_a_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer" / "config.json").write_text('{"a": 1}')
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        assert push_folder(tmp_path, "me/digits") == f"{hub.address}/me/digits/commit/1234"
        assert hub.files == {"model_index.json": b"{}", "transformer/config.json": b'{"a": 1}'}
        assert hub.tokens == {"Bearer hf_of_this_test"} and hub.made == [
            ("me", "digits", "private")
        ]
        hub.refuses = True
        with pytest.raises(CheckpointError, match="is written, but the hub did not take it"):
            push_folder(tmp_path, "me/digits")
