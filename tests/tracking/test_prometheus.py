"""metrics.prom: what node_exporter's textfile collector reads of a run."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.tracking.journal import read_journal
from dtr_scale.tracking.prometheus import METRICS_FILE, PrometheusFile, exposition
from tests.support.runs import status, tiny

# The grammar of the text format, version 0.0.4.
_NAME, _LABEL = "[a-zA-Z_:][a-zA-Z0-9_:]*", "[a-zA-Z_][a-zA-Z0-9_]*"
_PAIR = rf'({_LABEL})="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
_SAMPLE = re.compile(rf"({_NAME})\{{({_PAIR}(?:,{_PAIR})*)\}} (\S+)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (counter|gauge|histogram|summary|untyped)")
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def parsed(text):
    """Return the value of each (name, labels); AssertionError where the text breaks the format."""
    assert not text or text.endswith("\n")
    values, typed, current = {}, set(), None
    for line in text.split("\n")[:-1]:
        if line.startswith("#"):
            match = _TYPE.fullmatch(line)
            assert match, line
            current = match[1]
            assert current not in typed, f"{current} has two types, or its lines stand apart"
            typed.add(current)
            continue
        match = _SAMPLE.fullmatch(line)
        assert match, line
        assert match[1] == current, f"{match[1]} does not stand under its type"
        labels = {
            name: re.sub(r'\\[\\"n]', lambda escape: _ESCAPES[escape[0]], text)
            for name, text in re.findall(_PAIR, match[2])
        }
        place = match[1], frozenset(labels.items())
        assert place not in values, f"{line} stands twice"
        values[place] = float(match[7])
    return values


KEYS = st.sampled_from(["loss", "lr", "step", "mfu", "loss_cluster_0", "loss_cluster_12"])


@given(figures=st.dictionaries(KEYS, st.floats() | st.integers()), name=st.text())
def test_any_figures_and_any_name_of_a_run_come_back(figures, name):
    values = parsed(exposition(figures, (("run", name),)))
    assert len(values) == len(figures)
    for key, value in figures.items():
        family, _, number = key.rpartition("_") if "cluster" in key else (key, "", "")
        labels = {("run", name), *([("cluster", number)] if number else [])}
        found = values[f"dtr_scale_{family}", frozenset(labels)]
        assert found == float(value) or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    "text",
    ["a 1", 'a{run="x"} 1\n', '# TYPE a gauge\na{run="x\ny"} 1\n', "# TYPE a gauge\nb{} 1\n"],
)
def test_the_grammar_refuses_what_is_none(text):
    with pytest.raises(AssertionError):
        parsed(text)


def test_a_run_keeps_it_at_the_newest_step_and_tells_its_end(digits, tmp_path):
    assert tiny(digits, tmp_path, "--tracking.prometheus=true", "--name=a_run") == 0
    values = parsed((tmp_path / METRICS_FILE).read_text(encoding="utf-8"))
    run = ("run", "a_run")
    last = list(read_journal(tmp_path / "journal.jsonl"))[-1]
    for key in ("step", "loss", "samples_per_second", "gpu_hours", "grad_norm"):
        assert values[f"dtr_scale_{key}", frozenset({run})] == last[key]
    cluster = frozenset({run, ("cluster", "0")})
    assert values["dtr_scale_loss_cluster", cluster] == last["loss_cluster_0"]
    told = {name: value for (name, labels), value in values.items() if labels == {run}}
    assert (told["dtr_scale_up"], told["dtr_scale_max_steps"], told["dtr_scale_saved_step"]) == (
        0, 4, 4
    )  # fmt: skip
    assert told["dtr_scale_goodput"] == pytest.approx(status(tmp_path)["goodput"], abs=0.1)


def test_it_is_off_unless_asked_for(digits, tmp_path):
    assert tiny(digits, tmp_path) == 0
    assert not (tmp_path / METRICS_FILE).exists()


def test_a_reader_finds_it_whole_at_any_moment(tmp_path):
    """It is replaced, never written in place; and what cannot be written costs one warning."""
    file = PrometheusFile(tmp_path, "a", max_steps=9, saved_step=lambda: None)
    with (tmp_path / METRICS_FILE).open(encoding="utf-8") as reader:
        file.log({"step": 1.0, "loss": 0.5})
        assert "step" not in reader.read().replace("max_steps", "")
    assert parsed((tmp_path / METRICS_FILE).read_text())["dtr_scale_up", frozenset({("run", "a")})]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_disk_that_takes_nothing_does_not_stop_the_run(tmp_path, warnings_of):
    file = PrometheusFile(tmp_path / "run", "a", max_steps=9, saved_step=lambda: None)
    (tmp_path / "run" / METRICS_FILE).unlink()
    (tmp_path / "run" / METRICS_FILE).mkdir()
    file.log({"step": 1.0})
    file.log({"step": 2.0})
    (warning,) = warnings_of("dtr_scale.tracking.prometheus")
    assert "cannot be written, training goes on" in warning
