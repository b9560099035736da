"""The plan of an experiment, from the command line."""

import json
from pathlib import Path

import pytest

from dtr_scale.cli.main import main

ROOT = Path(__file__).parents[3]
LARGE = str(ROOT / "configs" / "dit_l_dtr_antuw.json")
SMALL = ("--model.variant=DiT-S/2", "--train.max_steps=1000", "--train.global_batch_size=8")


def plan(capsys, *arguments):
    assert main(["plan", "--config", LARGE, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_figures_of_the_papers_large_model(capsys):
    figures = json.loads(plan(capsys, "--json"))
    assert figures["macs"] / 1e9 == pytest.approx(80.71, rel=2e-4)
    assert figures["num_parameters"] == 457_840_672
    assert figures["training_flops_per_image"] == 6 * figures["macs"]
    assert figures["training_flops"] == 6 * figures["macs"] * 2_000_000 * 256
    blocks, one = figures["layers"]["blocks"], figures["layers"]["blocks.0"]
    assert blocks == {name: 24 * value for name, value in one.items()}


def test_the_table_follows_overrides(capsys):
    lines = plan(capsys, *SMALL).splitlines()
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[0].split() == ["layer", "parameters", "GMACs", "share"]
    assert lines[4].split() == ["blocks.0", "2,659,968", "0.504", "8.3%"]
    assert lines[5].split() == ["blocks", "(all", "12)", "31,919,616", "6.050", "99.9%"]
    assert lines[7].split() == ["total", "32,865,056", "6.056", "100.0%"]
    assert lines[9:] == [
        "network   32.87 M parameters",
        "forward   6.06 GMACs = 12.11 GFLOPs per image",
        "training  36.33 GFLOPs per image (3 forwards)",
        "run       2.91e+14 FLOPs for 8,000 images (1,000 steps of 8)",
    ]


def test_every_module_on_request(capsys):
    table = plan(capsys, *SMALL, "--per-layer")
    assert "\nblocks.11.attn.qkv " in table
    layers = json.loads(plan(capsys, *SMALL, "--per-layer", "--json"))["layers"]
    assert layers["blocks.11.attn.qkv"] == {
        "macs": 256 * 384 * 3 * 384,
        "num_parameters": 385 * 3 * 384,
    }


def test_texts_are_planned_with_the_length_of_the_experiment(capsys):
    text = ("--model.conditioning=text", "--model.context_dim=16", "--json", "--per-layer")
    macs = [
        json.loads(plan(capsys, *SMALL, *text, f"--model.context_length={length}"))["macs"]
        for length in (4, 8)
    ]
    assert macs[1] - macs[0] == 12 * 4 * (16 * 2 * 384 + 2 * 256 * 384)
