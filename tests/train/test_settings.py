"""Every network, mask and weighting trains, resumes, samples, and splits over ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.sample import sample_run
from dtr_scale.jobs.train import train_experiment
from dtr_scale.jobs.trained import load_run
from dtr_scale.models.experts import MultiExperts
from tests.support.ranks import run_on_ranks
from tests.support.runs import DEMO, ROOT, journal, train_on

ADM = {
    "type": "adm", "image_size": 8, "in_channels": 1, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 16,
    "resblock_updown": True, "use_scale_shift_norm": True, "num_classes": 10,
    "routing": {"type": "dtr"},
}  # fmt: skip
DIT = {
    "type": "dit", "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 2,
    "input_size": 8, "in_channels": 1, "num_classes": 10, "routing": {"type": "dtr"},
}  # fmt: skip
TEXT = DIT | {"conditioning": "text", "context_length": 5, "context_dim": 12}

SETTINGS = {
    "eq4": ["--model.routing.type=dtr_eq4"],
    "cdtr": ["--model.routing.type=cdtr"],
    "ercddt": ["--model.routing.type=ercddt"],
    "random": ["--model.routing.type=random"],
    "max_roaming": ["--model.routing.type=max_roaming", "--model.routing.update_every_steps=1"],
    "min_snr": ["--objective.type=min_snr"],
    "p2": ["--objective.type=p2"],
    "log_snr": ["--objective.clusters=log_snr", "--objective.num_clusters=3"],
    "seven_strata": ["--objective.type=vanilla", "--objective.num_clusters=7"],
    "gradient": [
        "--objective.clusters=gradient",
        "--objective.num_clusters=2",
        "--objective.boundaries=[0, 100, 1000]",
    ],
    "experts": ["--model.num_experts=5"],
    "adm": [f"--model={json.dumps(ADM)}"],
    "text": [f"--model={json.dumps(TEXT)}", "--data.type=synthetic"],
}
SPLIT = ("experts", "adm", "text", "min_snr", "max_roaming", "seven_strata")


def experiment(digits: Path, run_dir: Path, *overrides: str) -> Experiment:
    settings = [
        f"--model={json.dumps(DIT)}", f"--data.shards={digits}", f"--run_dir={run_dir}",
        "--engine.type=single", "--engine.precision=fp32", "--data.num_workers=0",
        "--tracking.type=none", "--train.log_every=1", "--train.max_steps=4",
        "--train.global_batch_size=16", "--train.micro_batch_size=4",
        "--checkpoint.every_steps=100", "--evaluation.every_steps=0",
        "--evaluation.num_sampling_steps=5", "--evaluation.cfg_scale=1",
    ]  # fmt: skip
    return load_experiment(DEMO, [*settings, *overrides])


@pytest.mark.parametrize("overrides", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_run_resumes_to_the_last_bit_and_samples(digits, tmp_path, overrides):
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    assert train_experiment(experiment(digits, through, *overrides)) == 0
    assert train_experiment(experiment(digits, resumed, *overrides, "--train.max_steps=2")) == 0
    assert train_experiment(experiment(digits, resumed, *overrides)) == 0
    assert journal(resumed) == journal(through)
    assert [record["step"] for record in journal(through)] == [1, 2, 3, 4]
    pictures = [sample_run(run_dir, num_samples=2).read_bytes() for run_dir in (through, resumed)]
    assert pictures[0] == pictures[1]


def losses(digits: Path, place: Path) -> dict[str, list[float]]:
    """Return each setting's losses under ZeRO-1 on this rank."""
    world = join_world(needs_process_group=True)
    zero = ("--engine.type=deepspeed", "--engine.zero_stage=1")
    return {
        name: _losses(world, experiment(digits, place / name, *SETTINGS[name], *zero))
        for name in SPLIT
    }


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_ranks(digits, tmp_path):
    first, second = run_on_ranks(2, losses, digits, tmp_path)
    assert first == second
    alone = World(0, 0, 1, torch.device("cpu"))
    for name in SPLIT:
        expected = _losses(alone, experiment(digits, tmp_path / "one" / name, *SETTINGS[name]))
        assert first[name] == pytest.approx(expected, rel=1e-5), name


def _losses(world, settings):
    return [record["loss"] for record in train_on(world, settings)]


def test_experts_trained_one_by_one_sample_as_one(digits, tmp_path):
    for k in range(2):
        with pytest.raises(ConfigError, match=r"no run directory|holds experts \[0\] of 2"):
            load_run(tmp_path)
        one = [f"--model.expert={k}", "--model.num_experts=2", "--train.max_steps=2"]
        assert train_experiment(experiment(digits, tmp_path / f"expert_{k}", *one)) == 0
    with pytest.raises(ConfigError, match="expert 1 of 2, which cannot sample alone; give"):
        load_run(tmp_path / "expert_1")
    run = load_run(tmp_path)
    assert isinstance(run.network, MultiExperts)
    assert len(run.checkpoints) == 2
    assert sample_run(tmp_path, num_samples=2).parent == tmp_path / "samples"


def test_an_expert_sees_its_timesteps_alone(digits, tmp_path):
    seen = []

    def spy(network, arguments):
        seen.extend(arguments[1].tolist())

    from dtr_scale.jobs.build import build_trainer
    from tests.support.runs import run_trainer

    settings = experiment(digits, tmp_path, "--model.expert=2", "--model.num_experts=4")
    trainer = build_trainer(settings, World(0, 0, 1, torch.device("cpu")))
    trainer.engine.network.register_forward_pre_hook(spy)
    run_trainer(trainer)
    assert len(seen) == 4 * 16 + 4  # and the probe of the last save
    assert all(500 <= t < 750 for t in seen)
    assert max(seen) - min(seen) > 200


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.expert=2", "model.expert = 2 is none of model.num_experts = 1"),
        ("--evaluation.every_steps=5", "an expert alone cannot sample"),
        ("--data.type=latents", "model.conditioning = 'text' needs texts"),
    ],
)
def test_what_cannot_work_is_refused(digits, tmp_path, override, message):
    extra = ["--model.expert=0", "--model.num_experts=2"] if "every_steps" in override else []
    if "data.type" in override:
        extra = [f"--model={json.dumps(TEXT)}"]
    with pytest.raises(ConfigError, match=message):
        train_experiment(experiment(digits, tmp_path, *extra, override))


def test_latents_are_sampled_into_an_npz_by_any_sampler(digits, tmp_path):
    latents = [f"--model={json.dumps(DIT | {'in_channels': 4})}", "--data.type=synthetic"]
    assert train_experiment(experiment(digits, tmp_path, *latents, "--train.max_steps=1")) == 0
    drawn = []
    for sampler in ("ddpm", "ddim", "dpm_solver"):
        overrides = [f"--evaluation.sampler={sampler}", "--evaluation.num_sampling_steps=ddim5"]
        path = sample_run(tmp_path, num_samples=3, overrides=overrides, force=True)
        drawn.append(np.load(path)["latents"])
        assert drawn[-1].shape == (3, 4, 8, 8)
    assert not np.array_equal(drawn[0], drawn[1])
    for out in (tmp_path / "x.txt", tmp_path, tmp_path / "config.json" / "x.npz"):
        with pytest.raises(ConfigError, match="--out="):
            sample_run(tmp_path, num_samples=3, out=out)
    with pytest.raises(ConfigError, match="made-up data has no decoder; give --vae"):
        sample_run(tmp_path, num_samples=3, out=tmp_path / "x.npz")


@pytest.mark.parametrize("file", range(4))
def test_the_experts_of_table_6_share_a_run_directory(file):
    config = load_experiment(ROOT / f"configs/dit_b_expert{file}_imagenet_none_vanilla.json")
    assert config.run_path == Path(f"runs/dit_b_experts_imagenet/expert_{file}")
    assert config.model_copy(update={"run_dir": str(config.run_path)}).run_path == config.run_path
    together = load_experiment(
        ROOT / f"configs/dit_b_expert{file}_imagenet_none_vanilla.json", ["--model.expert=null"]
    )
    assert together.run_path == Path("runs/dit_b_experts_imagenet")
