"""The paper's tables: every row resolves, and finished runs are put beside its figures."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtr_scale.cli.main import main
from dtr_scale.cli.reproduce import TABLES as COMMANDS
from dtr_scale.config.load import load_experiment, resolved
from dtr_scale.jobs.paper import reproduce
from dtr_scale.jobs.paper.collect import gpu_hours, trainings_of
from dtr_scale.jobs.paper.launches import Places
from dtr_scale.jobs.paper.reproduce import Reproduction
from dtr_scale.jobs.paper.tables import TABLES, Column, Part, Row, Table
from tests.support.runs import BATCH, DEMO, SINGLE, SMALL

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = [(name, part, row) for name, table in TABLES.items() for part in table.parts
        for row in part.rows]  # fmt: skip
NO_ROW = {
    "demo_digits", "micro_fashion", "experiment.schema", "dit_xl_dtr_antuw", "dit_b_dtr_late",
    "dit_l_dtr_antuw_fsdp2", "dit_l_dtr_antuw_batch1024",
}  # fmt: skip
# What the paper plots without printing it.
PLOTTED = {"fig3", "fig4", "fig5", "fig6"}
INCEPTION = {"inception": {"name": "inception", "weights_sha256": "6726825d00"}}


@pytest.fixture
def places(tmp_path):
    return Places(CONFIGS, tmp_path / "runs", None)


def written_run(places, config, *, step, outcome="finished", changes=(), evaluations=()):
    """Write a run directory as training and evaluation leave it."""
    experiment = load_experiment(CONFIGS / f"{config}.json", list(changes))
    path = places.runs / config
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(resolved(experiment)))
    (path / "status.json").write_text(json.dumps({"outcome": outcome, "step": step}))
    (path / "journal.jsonl").write_text(
        json.dumps({"step": step, "loss": 0.1, "samples_per_second": 512.0}) + "\n"
    )
    evaluation = experiment.evaluation
    manifest = {
        "sampler": "ddpm", "num_sampling_steps": 250, "cfg_scale": evaluation.cfg_scale,
        "cfg_channels": evaluation.cfg_channels, "cfg_interval": None, "noise_schedule": "cosine",
        "num_timesteps": 1000, "num_samples": 50_000, "step": step, "seed": 0,
        "features": INCEPTION, "reference": {"inception": {"sha256": "aa"}},
    }  # fmt: skip
    lines = [json.dumps({"metrics": m, "manifest": manifest | more}) for m, more in evaluations]
    (path / "evaluations.jsonl").write_text("\n".join([*lines, '{"metrics": {"fi']))
    return path


def rows_of(name, places):
    (part,) = Reproduction(name, places).as_json()["parts"]
    return part, {row["label"]: row for row in part["rows"]}


def test_the_command_line_has_every_table():
    assert list(COMMANDS) == list(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_an_experiment_with_the_papers_figures(name):
    for part in TABLES[name].parts:
        for row in part.rows:
            trainings = trainings_of(row, CONFIGS, [])
            experiment = trainings[0].experiment
            # What it is measured with is valid, too.
            measured = [f"--{key}={json.dumps(value)}" for key, value in row.measured_with.items()]
            load_experiment(trainings[0].config, [*trainings[0].overrides, *measured])
            if name not in PLOTTED:
                for column in part.columns:
                    known = {**experiment.expected, **row.figures}
                    assert column.key in known, f"{row.label}: {column.title}"


def test_every_experiment_of_the_paper_is_in_a_table():
    used = {config for _, _, row in ROWS for config in row.configs}
    assert used == {path.stem for path in CONFIGS.glob("*.json")} - NO_ROW


def test_hours_are_those_of_table_7_and_estimates_are_told():
    def hours(config, **changes):
        return gpu_hours(trainings_of(Row("", (config,), **changes), CONFIGS, [])[0])

    assert hours("dit_l_dtr_antuw") == (1198, False)
    # 400,000 steps at 3.71 a second on 8 GPUs.
    assert hours("dit_l_imagenet_dtr_vanilla") == (pytest.approx(239.6, abs=0.1), False)
    assert hours("dit_b_coco_dtr_vanilla")[1]
    # By arithmetic, DiT-L/2 with 80.71 GMACs is the unit.
    more, is_estimate = hours("dit_xl_imagenet_none_vanilla")
    assert is_estimate
    assert more == pytest.approx(7e6 / 3.72 / 3600 * 8 * 118.64 / 80.71, rel=0.01)


def test_finished_rows_stand_beside_the_papers_and_tell_what_differs(places):
    written_run(
        places, "dit_b_ffhq_none_vanilla", step=100_000,
        evaluations=[({"fid": 11.5}, {}), ({"fid": 14.0}, {"num_samples": 10_000})],
    )  # fmt: skip
    written_run(
        places, "dit_b_ffhq_dtr_vanilla", step=100_000, changes=["--train.lr=2e-4"],
        evaluations=[
            ({"fid": 8.0}, {"sampler": "ddim", "num_sampling_steps": 50,
                            "reference": {"inception": {"sha256": "bb"}}}),
            ({"fd_efficientnet": 3.0}, {"features": {"efficientnet": {}}}),
        ],
    )  # fmt: skip
    part, rows = rows_of("table8", places)
    vanilla, dtr = rows["Vanilla"], rows["DTR"]
    assert vanilla["figures"]["FID-50K"] == {
        "paper": 10.99, "ours": 11.5, "manifest_differences": {},
    }  # fmt: skip
    assert dtr["figures"]["FID-50K"]["ours"] == 8.0
    assert dtr["figures"]["FID-50K"]["manifest_differences"] == {
        "sampler": {"paper": "ddpm", "ours": "ddim"},
        "num_sampling_steps": {"paper": 250, "ours": 50},
    }
    assert dtr["trainings"][0]["settings_that_differ"] == ["train.lr: 0.0001, the run's 0.0002"]
    assert part["differences_between_rows"]["reference.inception.sha256"] == {
        "Vanilla": "aa", "DTR": "bb",
    }  # fmt: skip
    assert rows["CDTR"]["figures"]["FID-50K"]["ours"] is None
    text = Reproduction("table8", places).text()
    assert "sampler: the paper's ddpm, ours ddim" in text
    assert "rows differ in reference.inception.sha256: Vanilla: aa; DTR: bb" in text
    assert "dit_b_ffhq_cdtr_vanilla: not started" in text


def test_unfinished_rows_say_how_far_they_are(places):
    path = written_run(places, "dit_b_ffhq_dtr_vanilla", step=90_000, outcome="running")
    _, rows = rows_of("table8", places)
    assert rows["DTR"]["trainings"][0]["state"] == "stopped", "its job does not hold it"
    (path / "lock").write_text("{}")
    _, rows = rows_of("table8", places)
    training = rows["DTR"]["trainings"][0]
    assert (training["state"], training["step"]) == ("running", 90_000)
    assert training["eta_seconds"] == 10_000 * 256 / 512
    text = Reproduction("table8", places).text()
    assert "running, step 90,000 of 100,000, 1:23 h left" in text


def test_figures_of_another_network_are_not_called_fid(places):
    other = {"inception": {"weights_sha256": "00"}}
    written_run(
        places, "dit_b_ffhq_cdtr_vanilla", step=100_000,
        evaluations=[({"fid": 9.0}, {"features": other})],
    )  # fmt: skip
    _, rows = rows_of("table8", places)
    assert rows["CDTR"]["figures"]["FID-50K"]["manifest_differences"] == {
        "features": {"paper": "inception", "ours": "inception of other weights"}
    }


def test_a_curve_takes_each_number_from_its_step(places):
    found = [({"fid": 40.0 - k}, {"step": k * 100_000, "num_samples": 10_000}) for k in (1, 2)]
    written_run(places, "dit_b_imagenet_dtr_vanilla", step=250_000, evaluations=found)
    _, rows = rows_of("fig5", places)
    figures = rows["DiT-B/2 + DTR"]["figures"]
    assert [each["ours"] for each in figures.values()] == [39.0, 38.0, None, None]
    assert figures["200K"]["paper"] == 31


def test_a_training_of_two_rows_is_one_that_goes_on(places, capsys):
    runs = f"--runs={places.runs}"
    assert main(["reproduce", "table3", "--dry-run", "--references=refs", runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    xl = [line for line in lines if "dit_xl" in line]
    assert [("--train.max_steps=2350000" in line, "evaluate" in line) for line in xl] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    assert "--reference=refs/imagenet-256.npz" in xl[1]
    assert main(["reproduce", "table3", "--dry-run", "--slurm=--nodes=4", runs]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[:3] == ["sbatch", "--array=0-1", "--nodes=4"]
    first, second = Path(command[-1]).read_text(encoding="utf-8").splitlines()
    assert "dit_xl" in first and "max_steps" not in first
    assert "dit_l_dtr_antuw" in second


def test_mistakes_are_told(tmp_path, capsys):
    assert main(["reproduce", "table1", f"--configs={tmp_path}"]) == 2
    assert "no experiments of the paper" in capsys.readouterr().err
    assert main(["reproduce", "table1", "--trian.lr=1"]) == 2
    assert "unknown key trian" in capsys.readouterr().err
    assert main(["reproduce", "table1", "--reference=x"]) == 2
    assert "did you mean --references" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_missing_is_trained_and_measured(digits, tmp_path, monkeypatch, caplog):
    """By a small experiment as a row: the training ends, and a second call finds it there."""
    configs, runs = tmp_path / "configs", tmp_path / "runs"
    configs.mkdir()
    (configs / "demo_digits.json").write_bytes(DEMO.read_bytes())
    row = Row("demo", ("demo_digits",), figures={"cka": 0.5})
    part = Part("digits", (Column("mean CKA", "cka", "cka"),), (row,))
    monkeypatch.setitem(reproduce.TABLES, "table1", Table("Table", (part,)))
    small = [*SMALL, *BATCH, *SINGLE, f"--data.shards={digits}", "--train.max_steps=2"]
    small.append("--evaluation.every_steps=0")
    reproduction = Reproduction("table1", Places(configs, runs, None), small)
    assert len(list(reproduction.commands())) == 2
    assert reproduction.run() == 0
    assert not list(reproduction.commands())
    (found,) = reproduction.found()[0].rows
    assert found.is_trained
    assert 0 < (found.cells[0].ours or 0) <= 1
    assert "demo_digits: finished, step 2 of 2" in reproduction.text()


@pytest.mark.slow
def test_a_run_that_mlflow_alone_has_is_collected(digits, tmp_path, monkeypatch, capsys):
    configs, uri = tmp_path / "configs", f"sqlite:///{tmp_path}/mlflow.db"
    configs.mkdir()
    known = json.loads(DEMO.read_text()) | {"expected": {"fid_50k": 2.0}}
    (configs / "demo_digits.json").write_text(json.dumps(known))
    (configs / "dit_l_dtr_antuw.json").write_text("{}")  # by which the folder is known
    part = Part("digits", (Column("FID-50K", "fid_50k", "fid", 50_000),), (
        Row("demo", ("demo_digits",), changes={"train.max_steps": 2}),
    ))  # fmt: skip
    monkeypatch.setitem(reproduce.TABLES, "table1", Table("Table", (part,)))
    overrides = [*SMALL, *BATCH, *SINGLE, f"--data.shards={digits}", "--train.max_steps=2"]
    overrides += ["--evaluation.every_steps=0", "--tracking.type=mlflow", f"--tracking.uri={uri}"]
    place = tmp_path / "elsewhere" / "demo"
    # In processes of their own, as MLflow's threads are; the second sends what the first had no
    # time for.
    for command in (
        ["train", "--config", str(DEMO), f"--run_dir={place}", *overrides],
        ["tracking", "sync", str(place)],
    ):
        subprocess.run([sys.executable, "-m", "dtr_scale", *command], check=True)
    shutil.rmtree(place)
    capsys.readouterr()
    table = ["reproduce", "table1", f"--configs={configs}", f"--runs={tmp_path / 'none'}"]
    assert main([*table, *overrides]) == 0
    assert "demo_digits: not started" in capsys.readouterr().out
    assert main([*table, f"--tracking-uri={uri}", *overrides]) == 0
    assert "demo_digits: finished, step 2 of 2" in capsys.readouterr().out
