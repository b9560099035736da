"""Resume runs whose configuration has changed: refused, harmless or allowed by name."""

import json

import pytest

from dtr_scale.errors import ConfigError
from tests.support.runs import copied, journal, tiny


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.routing.alpha=2", "model.routing.alpha was 4.0 and is 2.0"),
        ("--train.global_batch_size=64", "train.global_batch_size was 32 and is 64"),
        ("--model.depth=3", "model.depth was 2 and is 3; .*--checkpoint.allow_changes=model.depth"),
        ("--objective.type=vanilla", "objective.type was 'ant_uw' and is 'vanilla'"),
        ("--data.num_lanes=2", "data.num_lanes was 1 and is 2"),
        ("--data.window_shards=4", "data.window_shards was 8 and is 4"),
        ("--data.horizontal_flip=true", "data.horizontal_flip was False and is True"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(digits, tmp_path, override, message):
    tiny(digits, tmp_path)
    with pytest.raises(ConfigError, match=message):
        tiny(digits, tmp_path, override, "--train.max_steps=8")
    assert len(journal(tmp_path)) == 4


def test_another_manifest_is_another_run(digits, tmp_path):
    place = copied(digits, tmp_path)
    run_dir = tmp_path / "run"
    tiny(place, run_dir)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["shards"] = [s for s in manifest["shards"] if s["name"] != "train-000002.tar"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"data\.shards was 'manifest .*' and is 'manifest "):
        tiny(place, run_dir, "--train.max_steps=8")
    allowed = ("--checkpoint.allow_changes=data.shards", "--train.max_steps=8")
    assert tiny(place, run_dir, *allowed) == 0


def test_harmless_changes_go_on_and_are_told(digits, tmp_path, caplog):
    tiny(digits, tmp_path)
    changes = ("--train.lr=1e-4", "--train.micro_batch_size=8", "--train.grad_clip=1")
    caplog.set_level("INFO", "dtr_scale")
    assert tiny(digits, tmp_path, *changes, "--train.max_steps=6") == 0
    assert len(journal(tmp_path)) == 6
    assert [text for text in caplog.messages if "since then" in text] == [
        "since then: train.grad_clip was None and is 1.0",
        "since then: train.lr was 0.001 and is 0.0001",
        "since then: train.max_steps was 4 and is 6",
        "since then: train.micro_batch_size was 32 and is 8",
    ]


@pytest.mark.parametrize(
    "changed",
    [
        {"objective.type": "vanilla"},
        {"objective.num_clusters": 4},
        {"train.global_batch_size": 64, "train.seed": 5},
        {"model.routing.alpha": 2},
    ],
)
def test_changes_that_are_allowed_by_name_go_on(digits, tmp_path, changed, caplog):
    """There and back: an objective that was not there before starts afresh."""
    tiny(digits, tmp_path)
    overrides = [f"--{key}={value}" for key, value in changed.items()]
    caplog.set_level("INFO", "dtr_scale")
    for max_steps, extra in ((6, overrides), (8, [])):
        with pytest.raises(ConfigError, match=f"{next(iter(changed))} was .* and is "):
            tiny(digits, tmp_path, *extra, f"--train.max_steps={max_steps}")
        allowed = f"--checkpoint.allow_changes={','.join(changed)}"
        assert tiny(digits, tmp_path, *extra, allowed, f"--train.max_steps={max_steps}") == 0
        told = [text for text in caplog.messages if "by checkpoint.allow_changes" in text]
        assert len(told) == len(changed)
        caplog.clear()
    assert [record["step"] for record in journal(tmp_path)] == list(range(1, 9))


def test_another_batch_size_goes_on_at_the_same_position(digits, tmp_path):
    """The journal's step counts updates, samples_seen is where the data goes on."""
    tiny(digits, tmp_path)
    allowed = "--checkpoint.allow_changes=train.global_batch_size"
    for size, max_steps in ((64, 6), (16, 8)):
        batch = (f"--train.global_batch_size={size}", "--train.micro_batch_size=16")
        assert tiny(digits, tmp_path, *batch, allowed, f"--train.max_steps={max_steps}") == 0
    found = [(record["step"], record["samples_seen"]) for record in journal(tmp_path)]
    seen = [32, 64, 96, 128, 192, 256, 272, 288]
    assert found == list(enumerate(seen, 1))


def test_a_change_that_does_not_fit_the_weights_is_refused_all_the_same(digits, tmp_path):
    tiny(digits, tmp_path)
    allowed = ("--model.depth=3", "--checkpoint.allow_changes=model.depth", "--train.max_steps=8")
    with pytest.raises(ConfigError, match=r"of another network.*blocks\.2.* has shape None"):
        tiny(digits, tmp_path, *allowed)
