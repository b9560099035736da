"""Trainings that begin with what fits of the weights of another."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dtr_scale.checkpoint.inspection import find_checkpoint
from dtr_scale.checkpoint.start import Start
from dtr_scale.cli.main import main
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.start import open_start
from dtr_scale.jobs.trained import load_run
from tests.support.pictures import class_folders, small_autoencoder
from tests.support.runs import SINGLE, demo_experiment, journal, train
from tests.support.weights import ADM, released

TABLE = "y_embedder.embedding_table.weight"
OF_RELEASED = {
    "type": "dit", "hidden_size": 64, "depth": 3, "num_heads": 4, "patch_size": 2,
    "input_size": 8, "in_channels": 4, "num_classes": 2, "routing": {"type": "dtr"},
}  # fmt: skip
BATCH = ("--train.global_batch_size=8", "--train.micro_batch_size=8")
ADAPT = "--checkpoint.start_adapt=true"
BARELY = (
    "--train.lr=1e-12", "--train.ema_decay=0.9999999", "--train.max_steps=1",
    "--evaluation.every_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits_run(digits, tmp_path_factory):
    """A routed run of ten classes, and what it was exported to."""
    place = tmp_path_factory.mktemp("begun")
    settings = (*BATCH, "--train.max_steps=4", "--train.lr=1e-2", "--evaluation.every_steps=0")
    assert train(digits, place / "run", *settings, "--train.ema_decay=0.5") == 0
    for target, out in ("safetensors", "file.safetensors"), ("diffusers", "pipeline"), (
        "official", "official.safetensors",
    ):  # fmt: skip
        command = ["export", str(place / "run"), "--to", target, "--out", str(place / out)]
        assert main(command) == 0
    return place


def test_from_an_official_file_to_two_classes_of_ones_own(tmp_path, capsys):
    """Pictures in folders, an official .pt of ten classes, samples of two: the whole journey."""
    class_folders(tmp_path / "pictures/train", {"cat": 8, "dog": 8})
    vae = small_autoencoder(tmp_path / "vae")
    prepare = ["prepare", "imagefolder", str(tmp_path / "pictures"), "--size", "32"]
    assert main([*prepare, "--vae", str(vae), "--out", str(tmp_path / "data")]) == 0
    official = released()
    torch.save({"model": official, "ema": official, "opt": {}}, tmp_path / "DiT.pt")
    config = {
        "$schema": None, "name": "cats", "run_dir": str(tmp_path / "run"), "model": OF_RELEASED,
        "data": {"shards": str(tmp_path / "data"), "num_workers": 0},
        "train": {
            "max_steps": 6, "global_batch_size": 8, "micro_batch_size": 8, "log_every": 1,
            "ema_decay": 0.5, "lr": 1e-3,
        },
        "engine": {"type": "single", "precision": "fp32"},
        "checkpoint": {"start_from": str(tmp_path / "DiT.pt")},
        "tracking": {"type": "none"},
        "evaluation": {"num_sampling_steps": 4, "cfg_scale": 2.0},
    }  # fmt: skip
    file = tmp_path / "cats.json"
    file.write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["train", "--config", str(file)]) == 2
    assert "take what fits by --checkpoint.start_adapt=true" in capsys.readouterr().err
    assert main(["train", "--config", str(file), ADAPT]) == 0
    told = capsys.readouterr().err
    assert f"starting from {tmp_path / 'DiT.pt'} (dit)" in told
    assert f"taken of {TABLE}: the row of no class, 64 numbers" in told
    assert f"begun afresh: {TABLE}" in told
    assert [record["step"] for record in journal(tmp_path / "run")] == list(range(1, 7))
    grid = tmp_path / "samples.png"
    assert main(["sample", str(tmp_path / "run"), "--num-samples", "4", "--out", str(grid)]) == 0
    with Image.open(grid) as picture:
        assert np.asarray(picture).std() > 5
    # Three steps on, the same command goes on with its own checkpoint.
    assert main(["train", "--config", str(file), ADAPT, "--train.max_steps=7"]) == 0
    assert "begun afresh" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "kind"),
    [("run", "run"), ("run/checkpoints/step_00000004", "run"), ("file.safetensors", "export"),
     ("pipeline", "export"), ("official.safetensors", "dtr")],
)  # fmt: skip
def test_runs_and_their_exports_are_starts(digits, digits_run, tmp_path, capsys, place, kind):
    start = f"--checkpoint.start_from={digits_run / place}"
    assert train(digits, tmp_path / "run", *BATCH, *BARELY, start) == 0
    assert f"starting from {digits_run / place} ({kind})" in capsys.readouterr().err
    begun = load_run(digits_run / "run").network.state_dict()
    found = load_run(tmp_path / "run").network.state_dict()  # the average, as it was
    for name, value in found.items():
        torch.testing.assert_close(value, begun[name], rtol=0, atol=1e-6, msg=name)


def test_a_pipeline_of_texts_is_a_start(digits, tmp_path):
    texts = (
        "--data.type=synthetic", "--model.conditioning=text", "--model.context_length=4",
        "--model.context_dim=8", "--train.ema_decay=0.5",
    )  # fmt: skip
    few = (*BATCH, "--train.max_steps=2", "--evaluation.every_steps=0")
    assert train(digits, tmp_path / "run", *few, *texts) == 0
    pipeline = tmp_path / "pipeline"
    assert main(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(pipeline)]) == 0
    assert "pipe(prompt_embeds=TOKENS)" in (pipeline / "README.md").read_text()
    start = f"--checkpoint.start_from={pipeline}"
    assert train(digits, tmp_path / "other", *few, *texts, start) == 0


def test_a_pipeline_of_a_u_net_is_a_start(digits, tmp_path, capsys):
    section = json.dumps(ADM | {"in_channels": 1, "routing": {"type": "random"}})
    few = (*BATCH, *BARELY, "--data.type=synthetic", "--evaluation.cfg_scale=1")
    plain = (*few, f"--model={section}")
    assert train(digits, tmp_path / "run", *plain, "--train.seed=5") == 0
    pipeline = tmp_path / "pipeline"
    assert main(["export", str(tmp_path / "run"), "--to", "diffusers", "--out", str(pipeline)]) == 0
    start = f"--checkpoint.start_from={pipeline}"
    assert train(digits, tmp_path / "other", *plain, start) == 0
    begun, found = (load_run(tmp_path / name).network.state_dict() for name in ("run", "other"))
    for name, value in found.items():
        torch.testing.assert_close(value, begun[name], rtol=0, atol=1e-6, msg=name)


def test_another_size_routing_and_no_condition(digits, digits_run, tmp_path, capsys):
    other = (
        "--data.type=synthetic", "--model.input_size=16", "--model.routing.type=random",
        "--model.conditioning=none", "--evaluation.cfg_scale=1",
    )  # fmt: skip
    start = f"--checkpoint.start_from={digits_run / 'run'}"
    assert train(digits, tmp_path / "run", *BATCH, *BARELY, *other, start, ADAPT) == 0
    told = capsys.readouterr().err
    assert "100.0% of the parameters" in told
    assert "begun afresh: routing.mask_0, routing.mask_1" in told
    begun = load_run(digits_run / "run").network.state_dict()
    network = load_run(tmp_path / "run").network
    table = network.state_dict()[TABLE]
    torch.testing.assert_close(table, begun[TABLE][-1:], rtol=0, atol=1e-6)
    assert network.get_buffer("pos_embed").shape == (1, 64, 32)


def test_what_is_frozen_stays_until_it_is_thawed_by_name(digits, digits_run, tmp_path, capsys):
    run = tmp_path / "run"
    given = (
        *BATCH, f"--checkpoint.start_from={digits_run / 'run'}", "--train.max_steps=2",
        "--train.weight_decay=0.1", "--evaluation.every_steps=0",
    )  # fmt: skip
    assert train(digits, run, *given, "--train.freeze=blocks.*.attn.*,x_embedder.*") == 0
    assert "frozen: 10 of " in capsys.readouterr().err

    def moved():
        """The parameters whose masters are not those of the run that was begun with."""
        ends = [find_checkpoint(str(place)) for place in (digits_run / "run", run)]
        begun, found = (reader.read(list(reader.shapes)) for reader in ends)
        masters = [key for key in begun if key.startswith("master/")]
        return {key[7:] for key in masters if not torch.equal(begun[key], found[key])}

    trained = moved()
    assert "blocks.0.mlp.fc1.weight" in trained
    assert not [name for name in trained if ".attn." in name or name.startswith("x_embedder")]
    with pytest.raises(ConfigError, match=r"allow_changes=train\.freeze"):
        train(digits, run, *given[:2], *given[3:], "--train.max_steps=3")
    thawed = ("--train.max_steps=3", "--checkpoint.allow_changes=train.freeze")
    assert train(digits, run, *given[:2], *given[3:], *thawed) == 0
    assert "blocks.0.attn.qkv.weight" in moved()


def test_the_average_of_what_is_fresh_begins_with_it(digits, digits_run, tmp_path):
    start = (f"--checkpoint.start_from={digits_run / 'run'}", ADAPT)
    other = ("--model.num_classes=3", "--data.type=synthetic", "--evaluation.every_steps=0")
    experiment = demo_experiment(digits, tmp_path, *SINGLE, *BATCH, *other, *start)
    trainer = build_trainer(experiment, World(0, 0, 1, torch.device("cpu")))
    fresh = trainer.state.pieces()[f"master/{TABLE}"].data.clone().view(4, 32)
    trainer.start(lambda: open_start(experiment))
    pieces = trainer.state.pieces()
    master, average = (pieces[f"{kind}/{TABLE}"].data.view(4, 32) for kind in ("master", "ema"))
    assert torch.equal(master[:3], fresh[:3]) and torch.equal(average[:3], fresh[:3])
    begun = find_checkpoint(str(digits_run / "run"))
    for kind, values in ("master", master), ("ema", average):
        key = f"{kind}/{TABLE}"
        assert torch.equal(values[3], begun.read([key])[key][10])
    bias = [pieces[f"{kind}/final_layer.linear.bias"].data for kind in ("master", "ema")]
    assert not torch.equal(*bias)
    trainer.loader.close()
    with pytest.raises(ConfigError, match="is for weights, and a universal checkpoint"):
        Start({}, {}, {"exp_avg": {}}).fitted(fit=None)  # pyright: ignore[reportArgumentType]
