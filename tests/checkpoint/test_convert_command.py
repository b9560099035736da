"""The convert command: official files in, files and folders out."""

import json

import torch
from safetensors.torch import load_file

from dtr_scale.checkpoint.convert import from_official
from dtr_scale.checkpoint.weights import read_weights
from dtr_scale.cli.main import main
from dtr_scale.jobs.network import build_model
from tests.support.weights import (
    ADM,
    assert_same,
    checkpoint,
    dtr_masks,
    mask_name,
    released,
)


def refused(capsys, *arguments):
    assert main(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("error: ")
    return line


def test_masks_that_share_memory_are_written(tmp_path):
    mask = dtr_masks().float()
    weights = released() | {mask_name(i): mask for i in range(3)}
    torch.save(weights, tmp_path / "weights.pt")
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(tmp_path / "weights.pt"), "--from", "dtr", "--to", "safetensors",
                 "--out", str(out)]) == 0  # fmt: skip
    assert_same(load_file(out), {name: value.float() for name, value in weights.items()})


def test_the_command_converts_official_files(tmp_path, saved, capsys):
    path = saved(checkpoint() | {"ema": {f"module.{k}": v for k, v in released().items()}})
    to_file = ["--from", "dit", "--to", "safetensors", "--out", f"{tmp_path}/a.safetensors"]
    assert main(["convert", str(path), *to_file]) == 0
    assert capsys.readouterr() == (f"{tmp_path}/a.safetensors\n", "")
    official = {name: value.float() for name, value in released().items()}
    assert_same(load_file(tmp_path / "a.safetensors"), official)

    to_folder = ["--from", "dit", "--to", "diffusers", "--out", f"{tmp_path}/b"]
    assert "give it by --num-heads" in refused(capsys, tmp_path / "a.safetensors", *to_folder)
    arguments = [f"{tmp_path}/a.safetensors", *to_folder, "--num-heads", "4"]
    assert main(["convert", *arguments]) == 0
    transformer = json.loads((tmp_path / "b" / "transformer" / "config.json").read_text())
    assert (transformer["num_heads"], transformer["num_masks"]) == (4, 0)
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    assert (index["vae_name"], index["guidance_channels"]) == ("stabilityai/sd-vae-ft-ema", 3)


def test_the_command_keeps_the_masks_of_dtr(tmp_path, saved):
    official = released(dtr_masks())
    arguments = ["--from", "dtr", "--to", "safetensors", "--out", f"{tmp_path}/a.safetensors"]
    assert main(["convert", str(saved(official)), *arguments]) == 0
    written = read_weights(tmp_path / "a.safetensors")
    assert_same(from_official(written, "dtr"), from_official(official, "dtr"))
    assert torch.equal(written[mask_name(2)], dtr_masks().float())


def test_the_command_refuses_in_one_line(tmp_path, saved, capsys):
    path, out = saved(released(dtr_masks())), tmp_path / "out"
    file = ["--to", "safetensors", "--out", f"{out}.safetensors"]
    folder = ["--to", "diffusers", "--out", out]
    assert "kind 'dit' does not fit" in refused(capsys, path, "--from", "dit", *file)
    adm = saved(build_model(ADM).state_dict())
    assert "'adm' has no pipeline" in refused(capsys, adm, "--from", "adm", *folder)
    assert "No such file" in refused(capsys, tmp_path / "no.pt", "--from", "dit", *file)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    pickle = ["--from", "dtr", "--to", "safetensors", "--out", "x.pt"]
    assert "give a file that ends in .safetensors" in refused(capsys, path, *pickle)
