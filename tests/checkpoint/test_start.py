"""Trainings that start from the weights of others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtr_scale.checkpoint.start import Start, read_start
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.trained import load_run
from tests.support.ranks import run_on_ranks
from tests.support.runs import SINGLE, demo_experiment, journal, run_trainer, train

ALONE = World(0, 0, 1, torch.device("cpu"))
RELEASED = np.load(Path(__file__).parents[1] / "golden" / "dtr_dit_forward.npz")
DIT = {
    "type": "dit", "hidden_size": 64, "depth": 3, "num_heads": 4, "input_size": 8,
    "patch_size": 2, "in_channels": 4, "num_classes": 10, "routing": {"type": "dtr"},
}  # fmt: skip
OF_RELEASED = (f"--model={json.dumps(DIT)}", "--data.type=synthetic", "--evaluation.every_steps=0")
BATCH = ("--train.global_batch_size=16", "--train.micro_batch_size=8")


def released():
    names = [name for name in RELEASED.files if name.startswith("w.")]
    return {name[2:]: torch.tensor(RELEASED[name]).float() for name in names}


def weights(trainer, kind="master"):
    pieces = trainer.state.pieces()
    return {
        key.partition("/")[2]: piece.data.clone()
        for key, piece in pieces.items()
        if key.startswith(f"{kind}/")
    }


def test_a_run_starts_from_official_weights_and_their_average(digits, tmp_path):
    model = released()
    averaged = model | {name: model[name] / 2 for name in model if name != "pos_embed"}
    torch.save({"model": model, "ema": averaged, "opt": {}}, tmp_path / "released.pt")
    start = (f"--checkpoint.start_from={tmp_path / 'released.pt'}", "--checkpoint.start_kind=dtr")
    run_dir = tmp_path / "run"
    assert train(digits, run_dir, *OF_RELEASED, *BATCH, *start, "--train.max_steps=1") == 0
    experiment = demo_experiment(digits, tmp_path / "other", *SINGLE, *OF_RELEASED, *BATCH)
    trainer = build_trainer(experiment, ALONE)
    trainer.start(lambda: read_start(tmp_path / "released.pt", "dtr"))
    for name, value in weights(trainer).items():
        assert torch.equal(value, model[name].view(-1)), name
    for name, value in weights(trainer, "ema").items():
        assert torch.equal(value, averaged[name].view(-1)), name
    assert trainer.engine.optimizer_step == 0
    # One step at lr 1e-3 later the run is still near them.
    name = "blocks.0.attn.qkv.weight"
    drawn = load_run(run_dir).network.state_dict()[name]
    assert (drawn - averaged[name]).abs().max() < 0.01
    # Its own checkpoints come first when it goes on.
    assert train(digits, run_dir, *OF_RELEASED, *BATCH, *start, "--train.max_steps=2") == 0
    assert [record["step"] for record in journal(run_dir)] == [1, 2]


def test_averages_alone_are_the_weights_too(tmp_path):
    torch.save({"ema": released()}, tmp_path / "released.pt")
    start = read_start(tmp_path / "released.pt", "dit")
    assert start.weights is start.ema


def test_a_start_that_does_not_fit_is_refused(digits, tmp_path):
    torch.save(released(), tmp_path / "released.pt")
    start = f"--checkpoint.start_from={tmp_path / 'released.pt'}"
    with pytest.raises(ConfigError, match=r"start_from does not fit the network, which has no .*"):
        train(digits, tmp_path / "run", start, *BATCH)  # of two blocks, not three
    with pytest.raises(ConfigError, match=r"start_from does not fit the network: .* is of shape"):
        train(digits, tmp_path / "run", start, *BATCH, "--model.depth=3")
    with pytest.raises(CheckpointError, match="is no universal checkpoint: it has no zero/"):
        read_start(tmp_path, "universal")


def start_with_another_head(digits: Path, place: Path) -> str:
    """Runs on each rank: the last layer alone does not fit, and it is on one of them."""
    world = join_world(needs_process_group=True)
    settings = (f"--data.shards={digits}", *BATCH, "--tracking.type=none", "--data.num_workers=0")
    trainer = build_trainer(demo_experiment(digits, place, *settings), world)
    shapes = {name: tuple(p.shape) for name, p in trainer.engine.network.named_parameters()}
    other = {name: torch.zeros(shape) for name, shape in shapes.items()}
    other["final_layer.linear.weight"] = torch.zeros(3, 3)
    try:
        trainer.start(lambda: Start(other, other))
    except ConfigError as error:
        return str(error)
    finally:
        world.leave()
    return "started"


def test_all_ranks_refuse_a_start_that_does_not_fit_one_of_them(digits, tmp_path):
    for told in run_on_ranks(2, start_with_another_head, digits, tmp_path, timeout_seconds=120):
        assert "final_layer.linear.weight is of shape (3, 3)" in told


def save_with_deepspeed(digits: Path, place: Path) -> list[dict[str, dict[str, np.ndarray]]]:
    """Runs on each rank: train with ZeRO-1 and ZeRO-3 and save as DeepSpeed does."""
    world = join_world(needs_process_group=True)
    held = []
    for stage in (1, 3):
        overrides = (f"--engine.zero_stage={stage}", "--engine.precision=fp32", *BATCH)
        experiment = demo_experiment(digits, place / str(stage), *overrides, "--train.max_steps=3")
        trainer = build_trainer(experiment, world)
        run_trainer(trainer)
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        engine: Any = trainer.engine
        engine._engine.save_checkpoint(str(place / str(stage)), client_state=info)
        held.append(
            {
                kind: {name: part.numpy() for name, part in weights(trainer, kind).items()}
                for kind in ("master", "exp_avg")
            }
        )
    world.leave()
    return held


@pytest.fixture(scope="module")
def universal(digits, tmp_path_factory):
    """Universal checkpoints of ZeRO-1 and ZeRO-3, and what each of two ranks held."""
    place = tmp_path_factory.mktemp("deepspeed")
    held = run_on_ranks(2, save_with_deepspeed, digits, place)
    for stage in (1, 3):
        saved = str(place / str(stage) / "global_step3")
        arguments = ["--input_folder", saved, "--output_folder", str(place / f"universal_{stage}")]
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments]
        subprocess.run(command, check=True, capture_output=True)
    return place, held


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_starts_from_a_universal_checkpoint(digits, tmp_path, universal, stage):
    place, held = universal
    trainer = build_trainer(demo_experiment(digits, tmp_path, *SINGLE, *BATCH), ALONE)
    trainer.start(lambda: read_start(place / f"universal_{stage}", "universal"))
    assert trainer.engine.optimizer_step == 3
    for kind in ("master", "exp_avg"):
        for name, value in weights(trainer, kind).items():
            parts = [rank[stage // 2][kind].get(name, np.empty(0)) for rank in held]
            assert np.array_equal(value, np.concatenate(parts)), (kind, name)
    for name, value in weights(trainer, "ema").items():
        assert torch.equal(value, weights(trainer)[name])
