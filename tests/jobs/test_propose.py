"""`dtr-scale config init`: an experiment that fits the data and the machine."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch

from dtr_scale.cli.main import main
from dtr_scale.config.load import load_experiment
from dtr_scale.data.manifest import Manifest, Shard, read_manifest, write_manifest
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.gpus import find_gpu
from dtr_scale.jobs.plan.planner import Planner
from dtr_scale.jobs.propose import Machine, propose, write_proposal
from dtr_scale.jobs.sampling import captions_told, reference_split
from dtr_scale.storage.folder import open_folder

CPU = Machine(cores=2, memory=8 * 10**9)
BIG_CPU = Machine(cores=64, memory=200 * 10**9)
T4 = Machine(4, 15 * 10**9, "Tesla T4", bf16=False)
H100 = Machine(16, 80 * 10**9, "NVIDIA H100")
SHAPES = [(3, 64, 64), (4, 32, 32), (1, 28, 28), (4, 50, 50), (3, 7, 7)]


def prepared(place, num_samples, shape=(4, 32, 32), **told):
    """Write the manifest of a data set."""
    sha = "0" * 64
    of_shard = {"split": "train", "bytes": 1, "sha256": sha, "index_sha256": sha}
    shard = Shard(name="train-000000.tar", samples=num_samples, **of_shard)
    described = {"encoding": "posterior", "dtype": "float16", "num_classes": 10} | told
    write_manifest(open_folder(place), Manifest(shape=shape, shards=(shard,), **described))
    return str(place)


def proposed(place, machine, name="mine.json"):
    """Return the experiment that is read from the file that was proposed."""
    out = place / name
    write_proposal(propose(str(place), out, machine), out, force=True)
    return load_experiment(out)


# Of a GPU each is planned, which takes a second.
ALL = [
    *product((CPU, BIG_CPU), (90, 20_000, 1_281_167), SHAPES),
    *product((T4,), (1_281_167,), SHAPES),
    *product((H100,), (90, 20_000), [(4, 32, 32)]),
]


@pytest.mark.parametrize(("machine", "num_samples", "shape"), ALL)
def test_every_proposal_trains_with_routing_and_fits(tmp_path, machine, num_samples, shape):
    prepared(tmp_path, num_samples, shape)
    experiment = proposed(tmp_path, machine)
    with torch.device("meta"):
        network = build_network(experiment)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 16 * num_parameters < machine.memory / 2
    assert (experiment.model.routing.type, experiment.objective.type) == ("dtr", "ant_uw")
    assert experiment.train.global_batch_size % experiment.train.micro_batch_size == 0
    assert (network.in_channels, network.input_size) == shape[:2]
    assert 2 <= experiment.train.max_steps / experiment.evaluation.every_steps <= 10
    assert experiment.engine.precision == ("bf16" if machine.bf16 else "fp32")
    lines = (tmp_path / "mine.json").read_text().splitlines()
    # But for the data's own path.
    assert len(lines) <= 15
    assert max(len(line.replace(str(tmp_path), "")) for line in lines) <= 96


def test_more_data_and_more_memory_get_larger_networks(tmp_path):
    sizes = {}
    for num_samples in (90, 20_000, 1_281_167):
        prepared(tmp_path, num_samples)
        for machine in (CPU, BIG_CPU, T4, H100):
            with torch.device("meta"):
                network = build_network(proposed(tmp_path, machine))
            sizes[num_samples, machine.told] = sum(p.numel() for p in network.parameters())
    for machine in (T4, H100):
        of_machine = [sizes[n, machine.told] for n in (90, 20_000, 1_281_167)]
        assert of_machine == sorted(of_machine)
    of_all = [sizes[1_281_167, machine.told] for machine in (CPU, BIG_CPU, T4, H100)]
    assert of_all == sorted(set(of_all))


def test_the_micro_batch_shrinks_to_the_memory(tmp_path):
    prepared(tmp_path, 1_281_167)
    small = H100._replace(memory=40 * 10**9)
    micro = [proposed(tmp_path, machine).train.micro_batch_size for machine in (H100, small)]
    assert micro[0] > micro[1] >= 4


def test_the_plan_agrees_that_it_fits(tmp_path):
    """A fifth of the memory is left, and twice the micro-batch would take from it."""
    prepared(tmp_path, 1_281_167)
    experiment = proposed(tmp_path, T4)
    experiment = experiment.model_copy(
        update={"engine": experiment.engine.model_copy(update={"compile": False})}
    )
    gpu = replace(find_gpu("a100-40gb"), memory_gb=0.8 * T4.memory / 1e9)
    planner = Planner(experiment, Cluster(gpu, gpus=1))
    assert planner.fits(planner.memory(planner.layout()))
    assert planner.largest_micro_batch() < 2 * experiment.train.micro_batch_size


@pytest.mark.parametrize(
    ("told", "conditioning", "cfg_scale"),
    [
        ({"num_classes": 10}, "class", 1.5),
        ({"num_classes": 1}, "none", 1.0),
        ({"num_classes": 1, "context_shape": (16, 32)}, "text", 1.5),
    ],
)
def test_the_manifest_says_what_steers_samples(tmp_path, told, conditioning, cfg_scale):
    prepared(tmp_path, 100, **told)
    experiment = proposed(tmp_path, CPU)
    assert experiment.model.conditioning == conditioning
    assert experiment.evaluation.cfg_scale == cfg_scale
    if conditioning == "text":
        assert experiment.model.type == "dit"
        assert (experiment.model.context_length, experiment.model.context_dim) == (16, 32)


def test_texts_without_a_held_out_split_are_drawn_by_the_training_captions(tmp_path):
    """As the proposal's evaluations in training do: they were refused."""
    prepared(tmp_path, 100, num_classes=1, context_shape=(16, 32))
    experiment = proposed(tmp_path, CPU)
    assert experiment.evaluation.every_steps
    assert (reference_split(experiment), captions_told(experiment)) == (
        "train", "training captions",
    )  # fmt: skip
    manifest = read_manifest(open_folder(tmp_path))
    held_out = replace(manifest.shards[0], split="val", name="val-000000.tar")
    shards = (*manifest.shards, held_out)
    write_manifest(open_folder(tmp_path), manifest.model_copy(update={"shards": shards}))
    assert (reference_split(experiment), captions_told(experiment)) == ("val", "held-out captions")


def test_pixels_are_clipped_and_latents_are_not(tmp_path):
    for encoding, clips in [("pixels", True), ("posterior", False)]:
        prepared(tmp_path, 100, encoding=encoding)
        assert proposed(tmp_path, CPU).evaluation.clip_denoised is clips


def test_the_file_is_short_and_the_command_asks_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path / "data", 90, (3, 64, 64))
    assert main(["config", "init", "--data", "data", "--out", "my run.json"]) == 0
    out, err = capsys.readouterr()
    assert "with DTR and ANT-UW" in out and "launch/train.py --config 'my run.json'" in out
    assert err == ""
    experiment = json.loads((tmp_path / "my run.json").read_text())
    assert experiment["name"] == "my-run"


def test_the_file_says_what_the_defaults_do_not_and_what_one_turns_first(tmp_path):
    prepared(tmp_path, 1_281_167)
    out = tmp_path / "mine.json"
    write_proposal(propose(str(tmp_path), out, H100), out, force=True)
    raw = json.loads(out.read_text())
    assert raw["model"]["routing"] == {"type": "dtr"} and raw["data"] == {"shards": str(tmp_path)}
    assert "engine" not in raw and "checkpoint" not in raw
    assert list(raw["train"]) == [
        "max_steps", "global_batch_size", "micro_batch_size", "lr", "ema_decay", "log_every",
    ]  # fmt: skip
    experiment = load_experiment(out)
    assert (experiment.model.routing.alpha, experiment.model.routing.beta) == (4, 0.8)
    assert experiment.objective.num_clusters == 8 and experiment.data.horizontal_flip


def test_the_time_on_a_cpu_is_told(tmp_path):
    """So long as the cores make half of the least that was measured."""
    place = prepared(tmp_path, 90, (3, 64, 64))
    told = propose(place, tmp_path / "mine.json", CPU).told
    minutes = int(told.partition("at most about ")[2].partition(" minutes")[0])
    assert 40 < minutes <= 60 and told.endswith("on 2 CPU cores")
    assert propose(place, tmp_path / "mine.json", H100).told.endswith("for NVIDIA H100")


def test_what_stands_in_the_way_is_told(tmp_path, capsys):
    place, out = prepared(tmp_path / "data", 90), tmp_path / "mine.json"
    out.write_text("{}")
    command = ["config", "init", "--data", place, "--out", str(out)]
    assert main(command) == 2
    assert "mine.json is there already; give another name, or --force" in capsys.readouterr().err
    assert out.read_text() == "{}"
    assert main([*command, "--force"]) == 0
    assert load_experiment(out).name == "mine"
    assert main(["config", "init", "--data", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "manifest.json is missing" in capsys.readouterr().err
