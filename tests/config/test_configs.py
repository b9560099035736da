"""The files in configs/ are the experiments of the paper (appendix C), each ready to run."""

import re
from pathlib import Path

import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.config.changes import changes
from dtr_scale.config.load import filled_in, load_experiment
from dtr_scale.config.schema import experiment_schema
from dtr_scale.jobs.build import build_network, caution_of

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(CONFIGS.glob("*.json"))
EXPERIMENTS.remove(CONFIGS / "experiment.schema.json")
FLAGSHIP = CONFIGS / "dit_l_dtr_antuw.json"
# Settings that no table has: what they change of the flagship, besides name and description.
DIFFERENCES = {
    "dit_xl_dtr_antuw": {
        "model.variant": "DiT-XL/2", "train.micro_batch_size": 32, "expected": {},
        "expected.fid_50k": None, "expected.a100_hours": None,
    },
    "dit_l_dtr_antuw_fsdp2": {
        "engine.type": "fsdp2", "engine.shard": 8, "engine.reshard_after_forward": False,
    },
    "dit_l_dtr_antuw_batch1024": {
        "train.global_batch_size": 4 * 256, "train.max_steps": 2_000_000 // 4,
        "train.lr": 4**0.5 * 1e-4, "train.ema_decay": pytest.approx(0.9999**4, abs=1e-6),
        "data.num_lanes": 8, "checkpoint.every_steps": 5_000 // 4,
        "checkpoint.keep_every": 100_000 // 4, "evaluation.every_steps": 50_000 // 4,
        "expected": {}, "expected.fid_50k": None, "expected.a100_hours": None,
    },
}  # fmt: skip
LATE = CONFIGS / "dit_b_dtr_late.json"
OTHERS = {FLAGSHIP.stem, "demo_digits", "micro_fashion", LATE.stem, *DIFFERENCES}
PAPER = [path for path in EXPERIMENTS if path.stem not in OTHERS]

NAME = re.compile(
    r"(?P<model>dit_(?:s|b|l|xl)|adm)(?:_expert(?P<expert>\d))?_(?P<dataset>[a-z0-9]+)"
    r"_(?P<routing>[a-z]+)_(?P<weighting>[a-z0-9]+)(?:_a(?P<alpha>[\d.]+)_b(?P<beta>[\d.]+))?"
)
MILLIONS = {"dit_s": 33, "dit_b": 130, "dit_l": 458, "dit_xl": 675, "adm": 296}
STEPS = {
    "imagenet": 400_000, "coco": 400_000, "ffhq": 100_000,
    "imagenet64": 400_000, "ffhq64": 100_000,
}  # fmt: skip
CONDITIONING = {"imagenet": "class", "imagenet64": "class", "coco": "text"}
WEIGHTINGS = {"vanilla": "vanilla", "minsnr": "min_snr", "antuw": "ant_uw", "p2": "p2"}
ROUTINGS = {
    name: name.replace("maxroaming", "max_roaming")
    for name in ("none", "random", "dtr", "maxroaming", "ercddt", "cdtr")
}

# Every row of the tables and every curve of the figures that is a training of its own, with FID.
ROWS = {
    "table 1": {
        "dit_b_ffhq_none_vanilla": 10.99, "dit_b_ffhq_random_vanilla": 11.99,
        "dit_b_ffhq_dtr_vanilla": 7.32, "dit_l_imagenet_none_vanilla": 12.59,
        "dit_l_imagenet_random_vanilla": 16.18, "dit_l_imagenet_dtr_vanilla": 8.90,
        "dit_b_coco_none_vanilla": 7.70, "dit_b_coco_random_vanilla": 10.49,
        "dit_b_coco_dtr_vanilla": 7.04, "adm_ffhq64_none_vanilla": 3.12,
        "adm_ffhq64_random_vanilla": 3.33, "adm_ffhq64_dtr_vanilla": 2.65,
        "adm_imagenet64_none_vanilla": 6.34, "adm_imagenet64_random_vanilla": 7.34,
        "adm_imagenet64_dtr_vanilla": 4.91,
    },
    "table 2, ImageNet; figures 3 and 5": {
        "dit_l_imagenet_none_vanilla": 12.59, "dit_l_imagenet_dtr_vanilla": 8.90,
        "dit_l_imagenet_none_minsnr": 9.58, "dit_l_imagenet_dtr_minsnr": 8.24,
        "dit_l_imagenet_none_antuw": 5.85, "dit_l_imagenet_dtr_antuw": 4.61,
    },
    "table 3": {"dit_xl_imagenet_none_vanilla": 2.27, "dit_l_dtr_antuw": 2.33},
    "table 4": {
        "dit_b_ffhq_dtr_vanilla_a0.5_b0.8": 7.78, "dit_b_ffhq_dtr_vanilla_a1_b0.8": 7.78,
        "dit_b_ffhq_dtr_vanilla_a2_b0.8": 7.64, "dit_b_ffhq_dtr_vanilla_a3_b0.8": 7.77,
        "dit_b_ffhq_dtr_vanilla_a5_b0.8": 7.40, "dit_l_imagenet_dtr_vanilla_a0.5_b0.8": 11.55,
        "dit_l_imagenet_dtr_vanilla_a1_b0.8": 10.31, "dit_l_imagenet_dtr_vanilla_a2_b0.8": 9.39,
        "dit_l_imagenet_dtr_vanilla_a3_b0.8": 8.89, "dit_l_imagenet_dtr_vanilla_a5_b0.8": 9.66,
        "dit_b_coco_dtr_vanilla_a1_b0.8": 8.25, "dit_b_coco_dtr_vanilla_a3_b0.8": 7.25,
        "dit_b_coco_dtr_vanilla_a5_b0.8": 6.93, "adm_imagenet64_dtr_vanilla_a1_b0.8": 5.30,
        "adm_imagenet64_dtr_vanilla_a3_b0.8": 5.44, "adm_imagenet64_dtr_vanilla_a5_b0.8": 5.22,
    },
    "table 5; table 7; figure 5": {
        "dit_s_imagenet_none_vanilla": 44.28, "dit_s_imagenet_dtr_vanilla": 37.43,
        "dit_b_imagenet_none_vanilla": 27.96, "dit_b_imagenet_dtr_vanilla": 16.58,
        "dit_l_imagenet_none_vanilla": 12.59, "dit_l_imagenet_dtr_vanilla": 8.90,
    },
    "table 6": {f"dit_b_expert{k}_imagenet_none_vanilla": 9.48 for k in range(4)},
    "table 8": {
        "dit_b_ffhq_none_vanilla": 10.99, "dit_b_ffhq_maxroaming_vanilla": 39.90,
        "dit_b_ffhq_ercddt_vanilla": 10.13, "dit_b_ffhq_cdtr_vanilla": 9.61,
        "dit_b_ffhq_dtr_vanilla": 7.32,
    },
}  # fmt: skip
FID_10K = {  # table 2, FFHQ
    "dit_b_ffhq_none_vanilla": 12.93, "dit_b_ffhq_none_minsnr": 9.73,
    "dit_b_ffhq_none_antuw": 9.30, "dit_b_ffhq_none_p2": 10.08, "dit_b_ffhq_dtr_vanilla": 8.82,
    "dit_b_ffhq_dtr_minsnr": 8.93, "dit_b_ffhq_dtr_antuw": 8.81, "dit_b_ffhq_dtr_p2": 8.83,
}  # fmt: skip
FIGURE_4 = {
    *(f"dit_b_ffhq_dtr_vanilla_a{alpha}_b0.6" for alpha in (0.5, 1, 2, 3, 4, 5)),
    "dit_b_ffhq_random_vanilla_a4_b0.6",
}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_is_shown_and_builds_its_network(path, capsys):
    assert main(["config", "show", str(path)]) == 0
    assert f'"name": "{path.stem}"' in capsys.readouterr().out
    with torch.device("meta"):
        network = build_network(load_experiment(path, ["--model.routing.type=none"]))
    assert sum(parameter.numel() for parameter in network.parameters()) > 100_000


def test_schema_file_is_the_one_the_code_makes():
    committed = (CONFIGS / "experiment.schema.json").read_text(encoding="utf-8")
    assert committed == experiment_schema(), (
        "run: dtr-scale config schema > configs/experiment.schema.json"
    )


def test_every_training_of_the_paper_has_its_file_and_no_other_has():
    named = {name for rows in ROWS.values() for name in rows} | FID_10K.keys() | FIGURE_4
    assert named == {path.stem for path in PAPER} | {FLAGSHIP.stem}


def test_dtr_is_switched_on_late_in_as_many_steps():
    plain, late = CONFIGS / "dit_b_imagenet_none_vanilla.json", load_experiment(LATE)
    found = changes(filled_in(load_experiment(plain)), filled_in(late), str(LATE))
    changed = {change.key: change.after for change in found}
    place = Path(changed.pop("checkpoint.start_from"))
    assert place.parts[-4:-1] == ("runs", plain.stem, "checkpoints")
    steps = int(place.name.removeprefix("step_"))
    assert steps % late.checkpoint.keep_every == 0  # else it would be gone
    assert steps + changed.pop("train.max_steps") == load_experiment(plain).train.max_steps
    told = [k for k in changed if k.startswith(("name", "run_dir", "description", "expected"))]
    assert {key: changed[key] for key in changed.keys() - set(told)} == {
        "model.routing.type": "dtr",
        "train.seed": 1,  # not the samples and the noise of the first half again
    }


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_the_published_figures_are_those_of_the_tables(rows):
    for name, fid in rows.items():
        assert load_experiment(CONFIGS / f"{name}.json").expected["fid_50k"] == fid, name


def test_the_published_figures_of_ten_thousand_samples_are_those_of_table_2():
    for name, fid in FID_10K.items():
        assert load_experiment(CONFIGS / f"{name}.json").expected["fid_10k"] == fid, name


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_an_experiment_has_the_papers_hyperparameters(path):
    match = NAME.fullmatch(path.stem)
    assert match
    experiment, dataset = load_experiment(path), match["dataset"]
    quoted = match["model"] == "dit_xl"  # table 3 quotes DiT's own training
    is_expert = match["expert"] is not None

    train = experiment.train
    steps = 7_000_000 if quoted else 200_000 if is_expert else STEPS[dataset]
    assert (train.max_steps, train.global_batch_size, train.lr) == (steps, 256, 1e-4)
    assert (train.weight_decay, train.ema_decay, train.grad_clip) == (0.0, 0.9999, None)
    assert experiment.data.horizontal_flip
    schedule = "linear" if quoted else "cosine"
    assert experiment.diffusion.model_dump() == {
        "noise_schedule": schedule, "num_timesteps": 1000,
    }  # fmt: skip

    model, routing = experiment.model, experiment.model.routing
    conditioning = CONDITIONING.get(dataset, "none")
    assert model.conditioning == conditioning
    assert model.class_dropout_prob == (0.0 if conditioning == "none" else 0.1)
    assert routing.type == ROUTINGS[match["routing"]]
    assert routing.alpha == float(match["alpha"] or 4)
    assert routing.beta == float(match["beta"] or 0.8)
    assert routing.num_clusters == 8
    assert (model.num_experts, model.expert) == (
        (4, int(match["expert"])) if is_expert else (1, None)
    )

    assert experiment.objective.type == WEIGHTINGS[match["weighting"]]
    assert experiment.objective.gamma in (None, {"minsnr": 5, "p2": 1}.get(match["weighting"]))
    assert (experiment.objective.num_clusters, experiment.objective.lr) == (8, 0.025)

    evaluation = experiment.evaluation
    assert (evaluation.sampler, evaluation.num_sampling_steps) == ("ddpm", 250)
    assert evaluation.num_samples == (10_000 if set(experiment.expected) == {"fid_10k"} else 50_000)
    assert evaluation.cfg_scale == (1.0 if conditioning == "none" else 1.5)
    if match["model"] != "adm" and conditioning != "none":
        assert evaluation.cfg_channels == (3 if quoted else 4)  # DiT guides 3, the DTR code all


# No size is published for DiT with text.
@pytest.mark.parametrize(
    "path", [path for path in PAPER if "_coco_" not in path.stem], ids=lambda path: path.stem
)
def test_a_network_has_the_published_size(path):
    experiment = load_experiment(path, ["--model.routing.type=none"])
    with torch.device("meta"):
        network = build_network(experiment)
    name = NAME.fullmatch(path.stem)
    assert name
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name["model"]], abs=1.2)


def test_flagship_is_the_papers_setting():
    flagship = load_experiment(FLAGSHIP)
    routing = flagship.model.routing
    assert (routing.type, routing.alpha, routing.beta) == ("dtr", 4, 0.8)
    assert (flagship.objective.type, flagship.objective.num_clusters) == ("ant_uw", 8)
    assert (flagship.diffusion.noise_schedule, flagship.diffusion.num_timesteps) == ("cosine", 1000)
    train = flagship.train.model_dump()
    assert train == train | {
        "max_steps": 2_000_000, "global_batch_size": 256, "lr": 1e-4, "weight_decay": 0.0,
        "ema_decay": 0.9999, "grad_clip": None,
    }  # fmt: skip
    assert (flagship.model.class_dropout_prob, flagship.data.horizontal_flip) == (0.1, True)
    assert flagship.evaluation.cfg_channels == 4


@pytest.mark.parametrize(("name", "differences"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_the_other_flagships_are_the_flagship_but_for_what_they_say(name, differences):
    flagship, other = (
        filled_in(load_experiment(CONFIGS / f"{stem}.json")) for stem in (FLAGSHIP.stem, name)
    )
    found = {change.key: change.after for change in changes(flagship, other, source=name)}
    assert found.keys() >= {"name", "run_dir", "description"}
    assert {k: v for k, v in found.items() if k not in ("name", "run_dir", "description")} == (
        differences
    )


def test_fsdp2s_file_is_the_flagships_run_on_nodes_of_eight():
    fsdp2 = load_experiment(CONFIGS / "dit_l_dtr_antuw_fsdp2.json")
    assert [fsdp2.engine.mesh(8 * nodes) for nodes in (1, 2, 8)] == [(1, 8), (2, 8), (8, 8)]
    stored = filled_in(load_experiment(FLAGSHIP))
    # So it goes on from the flagship's checkpoints, and the other way round.
    assert not [c for c in changes(stored, filled_in(fsdp2), FLAGSHIP.stem) if c.identity]


def test_who_trains_dit_xl_with_dtr_is_told_how_that_went():
    xl, plain = (
        CONFIGS / f"{n}.json" for n in ("dit_xl_dtr_antuw", "dit_xl_imagenet_none_vanilla")
    )
    caution = caution_of(load_experiment(xl))
    assert caution
    assert "FID 10.85 against 9.40" in caution
    assert "\n" not in caution
    eq4 = load_experiment(plain, ["--model.routing.type=dtr_eq4"])
    assert caution_of(eq4) == caution
    for experiment in (load_experiment(plain), load_experiment(FLAGSHIP)):
        assert caution_of(experiment) is None
