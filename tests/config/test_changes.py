from pathlib import Path

import pytest

from dtr_scale.config.changes import changes
from dtr_scale.config.load import filled_in, load_experiment, resolved

FLAGSHIP = Path(__file__).parents[2] / "configs" / "dit_l_dtr_antuw.json"


def settings(*overrides):
    return load_experiment(FLAGSHIP, overrides)


def test_what_the_run_is_differs_from_how_it_is_run():
    stored = resolved(settings())
    wanted = resolved(settings("--train.seed=7", "--train.lr=1e-3", "--objective.lr=0.1"))
    found = {change.key: change for change in changes(stored, wanted, "step_5")}
    assert [key for key, change in found.items() if change.identity] == ["train.seed"]
    assert str(found["train.lr"]) == "train.lr was 0.0001 and is 0.001"
    assert len(found) == 3


def test_paths_that_an_older_run_kept_as_given_are_no_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = settings(
        "--data.shards=./data/digits", "--tracking.uri=sqlite:///ml.db", "--checkpoint.dir=d"
    )
    older = filled_in(given)
    assert older["data"]["shards"] == "./data/digits"
    assert changes(older, resolved(given), "step_5") == []
    moved = resolved(settings("--data.shards=other/digits", "--checkpoint.dir=d"))
    told = [str(change) for change in changes(older, moved, "step_5")]
    assert told[0] == f"data.shards was './data/digits' and is '{tmp_path}/other/digits'"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("evaluation", "num_sampling_steps", "ddim300"), ("train", "ema_decays", [0.9, 0.9])],
)
def test_a_run_of_settings_that_are_refused_now_can_go_on_with_others(section, key, value):
    stored = resolved(settings())
    stored[section][key] = value
    (change,) = changes(stored, resolved(settings()), "step_5")
    assert (change.key, change.before) == (f"{section}.{key}", value)
