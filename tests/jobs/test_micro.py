"""The reproduction in small: its runs, what is told of them, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.micro.comparison import CONDITIONS, Micro, MicroRun, run_one
from dtr_scale.jobs.micro.report import results, table, verdicts
from tests.support.pictures import idx_files

CONFIG = Path(__file__).parents[2] / "configs" / "micro_fashion.json"
SMALL = (
    "--model.input_size=8", "--model.patch_size=2", "--model.hidden_size=32", "--model.depth=2",
    "--train.max_steps=8", "--train.global_batch_size=16", "--train.micro_batch_size=16",
    "--train.log_every=1", "--checkpoint.every_steps=1", "--evaluation.num_samples=20",
    "--evaluation.num_sampling_steps=2", "--evaluation.batch_size=20",
)  # fmt: skip
TWO = ("none_vanilla", "dtr_antuw")


def micro(out, source=Path("nowhere"), conditions=tuple(CONDITIONS), num_seeds=3, overrides=()):
    return Micro(CONFIG, out, source, conditions, num_seeds, overrides)


def write_measured(of, run, fd):
    folder = of.run_dir(run)
    folder.mkdir(parents=True)
    lines = []
    for step in of.points:
        metrics = {
            "fd_efficientnet": fd * of.points[-1] / step, "pixel_frechet_distance": 1.0,
            "eval_loss": 0.1, "legibility": 0.9,
        }  # fmt: skip
        lines.append(json.dumps({"metrics": metrics, "manifest": {"step": step}}))
    (folder / "evaluations.jsonl").write_text("\n".join(lines) + "\n")


def test_conditions_are_the_base_but_for_routing_and_weights(tmp_path):
    of = micro(tmp_path)
    assert len(of.runs) == 18
    found = {run: of.experiment(run) for run in of.runs}
    first = found[of.runs[0]]
    for run, experiment in found.items():
        routing, weighting = run.condition.split("_")
        assert experiment.model.routing.type == routing
        assert experiment.objective.type == {"minsnr": "min_snr", "antuw": "ant_uw"}.get(
            weighting, weighting
        )
        assert experiment.train == first.train.model_copy(update={"seed": run.seed})
        assert experiment.evaluation == first.evaluation
        assert experiment.run_path == tmp_path / "runs" / run.name
    masks = [found[MicroRun("random_vanilla", seed)].model.routing.seed for seed in range(3)]
    assert masks == [0, 1, 2]
    assert of.points == [first.train.max_steps // part for part in (8, 4, 2, 1)]


def test_verdicts_need_a_difference_beyond_the_seeds(tmp_path):
    of = micro(tmp_path)
    distances = {
        "none_vanilla": (20.0, 21.0, 22.0), "random_vanilla": (30.0, 31.5, 32.0),
        "dtr_vanilla": (20.5, 20.0, 22.5), "none_antuw": (25.0, 26.2, 27.1),
    }  # fmt: skip
    for condition, of_seeds in distances.items():
        for seed, fd in enumerate(of_seeds):
            write_measured(of, MicroRun(condition, seed), fd)
    found = {each["claim"]: each["verdict"] for each in results(of)["claims"]}
    assert found["R-TR is worse than no routing"] == "seen"
    assert found["DTR is better than no routing"] == "not told apart"
    assert found["ANT-UW is better than no weights"] == "the opposite"
    assert found["ANT-UW helps with DTR, too"] == "not finished"
    assert "| R-TR | 31.17 ± 1.04 |" in table(of)
    assert "| DTR, ANT-UW | - | - | - | - | 0 of 3 |" in table(of)
    # 30 - 20, 31.5 - 21, 32 - 22: mean 10.17, standard error 0.167, t 4.30.
    assert "| +10.17 ± 0.72 |" in verdicts(of)


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    micro(tmp_path).keep_plan()
    micro(tmp_path).keep_plan()
    with pytest.raises(ConfigError, match=r"experiments of its plan\.json differ"):
        micro(tmp_path, overrides=["--train.lr=1e-4"]).keep_plan()


def test_mistakes_are_told(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert main(["reproduce", "micro", out, "--conditions", "none_vanilla", "dtr"]) == 2
    assert "'dtr' is unknown; accepted: none_vanilla" in capsys.readouterr().err
    assert main(["reproduce", "micro", out, "--only=dtr_vanilla_s7"]) == 2
    assert "dtr_vanilla_s7 is none of the runs" in capsys.readouterr().err
    assert main(["reproduce", "micro", out, "--run", f"--source={tmp_path}"]) == 2
    assert "has no train-images-idx3-ubyte" in capsys.readouterr().err


def start(of, **environment):
    command = [
        sys.executable, "-m", "dtr_scale", "reproduce", "micro", "--run", f"--out={of.out}",
        f"--source={of.source}", "--seeds=1", f"--configs={CONFIG.parent}",
        "--conditions", *of.conditions, *of.overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, **environment}, start_new_session=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_and_gone_on_it_finds_the_same(tmp_path):
    source = idx_files(tmp_path / "idx", num_train=60, num_val=24)
    of = micro(tmp_path / "killed", source, TWO, 1, SMALL)
    killed = start(of)
    deadline = time.monotonic() + 240
    while not any(of.measured(run) for run in of.runs):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    # The command alone: what it has started leaves by itself, or is waited for.
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not all(of.is_finished(run) for run in of.runs)
    again = start(of)
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0
    assert "| no routing |" in printed and "1 of 1" in printed
    for name in ("micro.md", "micro.json", "micro.png", "samples.png", "real.json"):
        assert (of.out / name).stat().st_size > 100

    through = micro(tmp_path / "through", source, TWO, 1, SMALL)
    (tmp_path / "through").mkdir()
    (tmp_path / "through" / "data").symlink_to(of.data)
    for run in through.runs:
        assert run_one(through, run) == 0
    assert {run: through.measured(run) for run in through.runs} == {
        run: of.measured(run) for run in of.runs
    }
    kept = json.loads((of.out / "micro.json").read_text())["runs"]
    assert [len(each["metrics"]) for each in kept.values()] == [4, 4]
