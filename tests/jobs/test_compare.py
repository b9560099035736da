"""Compare real runs: the tables, the page in a browser, and what is refused."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from dtr_scale.cli.main import main
from dtr_scale.evaluation.comparison.results import result_blocks
from dtr_scale.jobs.recorded import read_runs
from tests.support.runs import tiny

FEW = (
    "--objective.num_clusters=2",
    "--evaluation.every_steps=2",
    "--evaluation.num_samples=20",
    "--evaluation.num_sampling_steps=2",
)
# What a page does when it is used, written where `--dump-dom` shows it.
USE = """<script>
const shown = (name) => [...document.querySelectorAll(name)].filter(
  (element) => element.getClientRects().length).length;
const told = {fits: document.documentElement.scrollWidth <= innerWidth,
  paper: getComputedStyle(document.body).backgroundColor,
  ids: new Set([...document.querySelectorAll("[id]")].map((e) => e.id)).size
    === document.querySelectorAll("[id]").length};
told.before = [shown(".axis-step svg"), shown(".axis-gpu_hours svg"), shown(".run-1")];
document.getElementById("axis-gpu_hours").click();
document.getElementById("show-1").click();
told.after = [shown(".axis-step svg"), shown(".axis-gpu_hours svg"), shown(".run-1")];
told.pictures = [...document.images].map((image) => image.naturalWidth);
const place = document.createElement("pre");
place.id = "told";
place.textContent = JSON.stringify(told);
document.body.append(place);
</script>"""


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A run with routing and one without, which no test writes to."""
    home = tmp_path_factory.mktemp("runs")
    assert tiny(digits, home / "dtr", "--name=dtr", *FEW) == 0
    plain = ("--model.routing.type=none", "--objective.type=vanilla")
    assert tiny(digits, home / "plain", "--name=plain", *plain, *FEW) == 0
    for name in ("dtr", "plain"):
        assert main(["evaluate", str(home / name), "--num-samples", "20"]) == 0
    return home


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    places = [str(runs / name) for name in ("dtr", "plain")]
    assert main(["compare", *places, "--out", str(out)]) == 0
    return out / "index.html"


@pytest.fixture
def copied(runs, tmp_path):
    """Both runs, to be damaged."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["compare", *map(str, arguments)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


def assert_same_journals(run, original):
    assert run.journal.keys() == original.journal.keys()
    for key, column in original.journal.items():
        assert np.array_equal(run.journal[key], column, equal_nan=True), key


def test_the_terminal_shows_results_losses_and_settings(runs, capsys):
    assert main(["compare", str(runs / "dtr"), str(runs / "plain")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^A  dtr +finished +4 of 4 +128 ", out, flags=re.M)
    assert re.search(r"^pixel_frechet_distance +\d.* \([+-]\d", out, flags=re.M)
    assert re.search(r"^loss at step 4 +\d", out, flags=re.M)
    assert re.search(r"^model\.routing\.type +dtr +none$", out, flags=re.M)
    assert "Not comparable" not in out and "--out DIR" in out


def test_the_plots_are_pictures(page):
    names = {path.name for path in page.parent.iterdir()}
    assert {"index.html", "training_loss.png", "clusters.png", "uncertainty_weights.png"} <= names
    for path in page.parent.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20, path.name


def test_the_browser_sees_what_a_page_asks_for_and_complains_of(browser, tmp_path):
    """Else the test below would assert nothing."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("broken")</script>')
    opened = browser.open(page)
    assert opened.requests == {"http://127.0.0.1:9/x.png"}
    assert any("broken" in line for line in opened.console)


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_the_page_works_in_a_browser_and_asks_nobody_for_anything(
    page, browser, tmp_path, width, dark
):
    used = tmp_path / "used.html"
    used.write_text(page.read_text().replace("</body>", f"{USE}</body>"))
    opened = browser.open(used, width=width, dark=dark)
    assert opened.console == []
    assert opened.requests == set()
    told = json.loads(re.findall(r'<pre id="told">(.*?)</pre>', opened.dom)[0])
    assert told["fits"] and told["ids"]
    assert told["paper"] == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    num_charts, no_charts, num_curves = told["before"]
    assert num_charts > 10 and no_charts == 0 and num_curves > 15
    # Another axis, and a run that is hidden.
    assert told["after"] == [0, num_charts, 0]
    assert len(told["pictures"]) == 4 and min(told["pictures"]) > 100
    for heading in ("Results", "Settings that differ", "Curves", "Samples at equal steps"):
        assert re.search(rf"<h2>{heading}</h2>", opened.dom)
    assert opened.dom.count("<img") == len(re.findall(r'<img [^>]*alt="Samples of run', opened.dom))
    assert "began as the same noise" in opened.dom


def test_a_run_that_goes_on_is_compared_with_a_cut_line_left_out(copied, capsys):
    journal = copied / "plain" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    (copied / "plain" / "status.json").write_text('{"outcome": "running"}')
    with (copied / "plain" / "evaluations.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert main(["compare", str(copied / "dtr"), str(copied / "plain")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^B  plain +running +2 of 4 ", out, flags=re.M)
    assert "loss at step 2 " in out


def test_names_that_are_the_same_are_told_apart_and_shown_as_text(copied, tmp_path, capsys):
    for name in ("dtr", "plain"):
        path = copied / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "<b>twice</b>"}))
    arguments = [str(copied / "dtr"), str(copied / "plain"), "--out", str(tmp_path / "out")]
    assert main(["compare", *arguments]) == 0
    assert re.search(r"^A  …?.*runs/dtr\) +finished", capsys.readouterr().out, flags=re.M)
    assert "<b>" not in (tmp_path / "out" / "index.html").read_text()


def test_what_cannot_be_compared_is_refused(copied, tmp_path, capsys):
    dtr, plain = copied / "dtr", copied / "plain"
    assert "is one run; give another one" in refused(capsys, dtr)
    assert "are the same run; give it once" in refused(capsys, dtr, copied / "." / "dtr")
    assert "it has no config.json" in refused(capsys, dtr, tmp_path)
    line = refused(capsys, dtr, "nothing", "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert "'nothing' is no run directory, and there is no MLflow database" in line
    file = tmp_path / "file"
    file.write_text("")
    assert f"--out={file} is not accepted" in refused(capsys, dtr, plain, "--out", file)
    (plain / "journal.jsonl").write_text('{"step": 1,\n{"step": 2}\n')
    assert "has a line that is not JSON" in refused(capsys, dtr, plain)
    os.truncate(plain / "journal.jsonl", 0)
    assert "has no step in journal.jsonl yet" in refused(capsys, dtr, plain)


@pytest.mark.slow
def test_runs_are_read_back_from_mlflow(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracked = (
        *FEW,
        "--tracking.type=mlflow",
        "--tracking.experiment=both",
        f"--tracking.uri={uri}",
    )
    for name in ("a", "b"):
        assert tiny(digits, tmp_path / name, f"--name={name}", "--train.lr=1e-3", *tracked) == 0
        # The end of a run waits 10 s, in which a busy machine may not have sent everything.
        assert main(["tracking", "sync", str(tmp_path / name)]) == 0
    here = read_runs([str(tmp_path / name) for name in "ab"])
    # The directories are found by their runs, and read.
    assert [run.place for run in read_runs(["both"], uri)] == [run.place for run in here]
    # Elsewhere there is the server alone.
    for name in "ab":
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    there = read_runs(["both"], uri)
    for run, original in zip(there, here, strict=True):
        assert (run.outcome, run.settings) == ("finished", original.settings)
        assert_same_journals(run, original)
        assert run.evaluations == original.evaluations
        assert run.grids.keys() == {2, 4}
    # In the middle of a first attempt there are metrics and params alone.
    for name in ("config.json", "journal.jsonl", "evaluations.jsonl"):
        for path in (tmp_path / "mlartifacts").rglob(name):
            path.unlink()
    for run, original in zip(read_runs(["both"], uri), here, strict=True):
        assert run.settings.items() >= {("train.lr", 1e-3), ("model.routing.type", "dtr")}
        assert_same_journals(run, original)
        assert [each.step for each in run.evaluations] == [2, 4]
        assert (
            run.evaluations[0].metrics["eval_loss"] == original.evaluations[0].metrics["eval_loss"]
        )
    assert result_blocks(read_runs(["both"], uri))[0].differences == {"manifest": ["unknown"] * 2}
    one = there[0].place
    assert main(["compare", one, str(tmp_path / "moved_b"), "--tracking-uri", uri]) == 0
    assert re.search(rf"^A  a +finished .* {one}$", capsys.readouterr().out, flags=re.M)
    assert "nor an experiment of MLflow" in refused(capsys, one, "none", "--tracking-uri", uri)
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert f"MLflow at {nowhere}: " in refused(capsys, one, "both", "--tracking-uri", nowhere)


def test_plots_draws_one_run_and_its_masks(copied, capsys):
    capsys.readouterr()
    assert main(["plots", str(copied / "dtr")]) == 0
    paths = capsys.readouterr().out.splitlines()
    names = [path.rpartition("/")[2] for path in paths]
    method = {"routing.png", "boundaries.png", "loss_weights.png"}
    assert names[-1] == "sheet.png" and {"loss.png", "clusters.png", *method} <= {*names}
    with Image.open(paths[-1]) as sheet:
        assert sheet.width > 1000
    assert main(["plots", str(copied / "plain"), "--out", str(copied / "elsewhere")]) == 0
    # Neither log-variances nor masks nor weights: it has none.
    names = {path.name for path in (copied / "elsewhere").iterdir()}
    assert "loss.png" in names and not names & {"log_variances.png", *method}
