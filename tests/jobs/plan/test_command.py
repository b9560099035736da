"""The plan of a run, from the command line."""

import json
import re
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.config.load import load_experiment

ROOT = Path(__file__).parents[3]
LARGE = str(ROOT / "configs" / "dit_l_dtr_antuw.json")
NETWORK = (
    "--model.variant=null", "--model.hidden_size=384", "--model.depth=2", "--model.num_heads=6",
    "--model.patch_size=8",
)  # fmt: skip
SMALL = (*NETWORK, "--gpu=a100-80gb")


def plan(capsys, *arguments, code=0):
    assert main(["plan", "--config", LARGE, *arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


def figures(capsys, *arguments):
    return json.loads(plan(capsys, *arguments, "--json"))


def test_the_table_tells_network_memory_speed_money_and_failures(capsys):
    table = plan(capsys, *SMALL, "--price=2", "--nodes=2", "--gpus=4")
    assert re.search(
        r"^network +DiT 384x2, [\d.]+ M parameters, one forward [\d.]+ GMACs$", table, re.M
    )
    assert re.search(r"^on +2 nodes of 4 a100-80gb, zero-1, bf16, compiled, micro-batch 32 x 1$",
                     table, re.M)  # fmt: skip
    rows = re.findall(r"^[ *] (zero-\d|fsdp2|flat) ", table, re.M)
    assert rows == ["zero-0", "zero-1", "zero-2", "zero-3", "fsdp2", "flat"]
    for name in ("forward", "backward", "update", "exchange", "step", "time", "goodput", "failures",
                 "checkpoints", "data"):  # fmt: skip
        assert re.search(rf"^{name} ", table, re.M), name
    assert "at 2 a GPU hour" in table


def test_figures_follow_from_each_other(capsys):
    found = figures(capsys, *SMALL, "--price=3")
    assert found["steps_per_second"] * 256 == pytest.approx(found["samples_per_second"])
    assert found["seconds_without_failures"] == pytest.approx(2e6 / found["steps_per_second"])
    assert found["seconds"] * found["goodput"] == pytest.approx(found["seconds_without_failures"])
    assert found["cost"] == pytest.approx(3 * 8 * found["seconds"] / 3600)
    zero1 = found["engines"]["zero-1"]
    parts = {key: value for key, value in zero1["memory"].items() if key != "total"}
    context, late = parts.pop("context"), parts.pop("late")
    assert zero1["memory"]["total"] == pytest.approx(1.05 * (sum(parts.values()) - late) + context)
    assert zero1["step_seconds"] == found["step"]["total"]


def test_more_nodes_take_less_memory_and_more_exchange(capsys):
    one, four = (figures(capsys, *SMALL, f"--nodes={nodes}") for nodes in (1, 4))
    optimizer = [each["engines"]["flat"]["memory"]["optimizer"] for each in (one, four)]
    assert optimizer[0] == 4 * optimizer[1]
    assert one["failures"]["seconds_between"] == 4 * four["failures"]["seconds_between"]
    fast, slow = (figures(capsys, *SMALL, "--nodes=4", f"--network={gbps}") for gbps in (3200, 10))
    assert slow["step"]["exposed"] > 10 * fast["step"]["exposed"]
    assert any("waits for exchanges" in each["reason"] for each in slow["recommended"])


def test_recommendations_are_written_with_the_overrides(capsys, tmp_path):
    target = tmp_path / "planned.json"
    found = figures(
        capsys, *NETWORK, "--gpu=a10-24gb", "--gpus=1", "--train.lr=2e-4",
        "--train.global_batch_size=64", "--train.micro_batch_size=1", "--failures=20",
        f"--apply={target}",
    )  # fmt: skip
    advised = {each["key"]: each["value"] for each in found["recommended"]}
    assert advised["train.micro_batch_size"] == 64
    assert advised["checkpoint.every_steps"] == found["best_every_steps"]
    assert found["best_goodput"] > found["goodput"]
    planned = load_experiment(target)
    assert planned.train.lr == 2e-4
    assert planned.train.micro_batch_size == 64
    assert planned.checkpoint.every_steps == found["best_every_steps"]


def test_what_does_not_fit_is_told_and_mended(capsys):
    found = figures(
        capsys, "--gpu=a10-24gb", "--gpus=1", "--train.micro_batch_size=128",
        "--engine.type=single", "--engine.zero_stage=1",
    )  # fmt: skip
    assert not found["engines"]["single"]["fits"]
    assert 0 < found["engines"]["single"]["largest_micro_batch"] < 128
    advised = {each["key"]: each for each in found["recommended"]}
    assert advised["train.micro_batch_size"]["value"] <= 64
    assert "do not fit a10-24gb" in advised["train.micro_batch_size"]["reason"]


def test_a_measured_step_beats_the_modelled_one(capsys, tmp_path):
    modelled = figures(capsys, *SMALL, "--gpus=2")
    config = {k: v for k, v in _flat(load_experiment(LARGE, NETWORK)).items() if k != "name"}
    report = {
        "bench": "train",
        "machine": {"device": "NVIDIA A100-SXM4-80GB", "ranks": 2},
        "config": config,
        "step_seconds": {"median": 2 * modelled["step"]["total"]},
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(report))
    measured = figures(capsys, *SMALL, "--gpus=2", f"--measured={path}")
    assert measured["step"]["total"] == pytest.approx(2 * modelled["step"]["total"])
    error = plan(capsys, *NETWORK, "--gpu=h100-80gb", f"--measured={path}", code=2)
    assert "is of 'NVIDIA A100-SXM4-80GB', --gpu=h100-80gb" in error


def _flat(experiment):
    from dtr_scale.jobs.bench.report import config

    return config(experiment)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--gpu=a100",), "did you mean a100"),
        (("--gpu=tpu",), "h200-141gb"),
        (("--nodes=2",), "--nodes needs --gpu: give one of a100-40gb"),
        (("--as-released",), "--as-released needs --gpu"),
        (("--gpu=a100-80gb", "--gpus=7"), "is not divisible by 7 ranks"),
        (("--gpu=a100-80gb", "--engine.type=single"), "plan with --gpus=1"),
    ],
)
def test_mistakes_are_told_in_a_line(capsys, arguments, told):
    error = plan(capsys, *arguments, code=2)
    assert told in error
    assert error.count("\n") == 1
