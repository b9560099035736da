"""Which attention a training computes by, and that its checkpoints remember it."""

import json
import logging

from dtr_scale.jobs.attention import choose
from dtr_scale.models.attention_timing import Timings
from tests.support.runs import tiny

TIMINGS = Timings({"sdpa": 3.0, "cudnn": 2.0}, {"xformers": "it cannot be imported"})
PLACE = "NVIDIA H100, bf16"


def never():
    raise AssertionError("measured")


def test_the_fastest_is_taken_and_told_with_all_figures(caplog):
    caplog.set_level(logging.INFO, "dtr_scale.jobs.attention")
    choice = choose(None, place=PLACE, runs=lambda backend: True, measure=lambda: TIMINGS)
    milliseconds = {"sdpa": 3.0, "cudnn": 2.0}
    assert choice == {"backend": "cudnn", "place": PLACE, "milliseconds": milliseconds}
    assert "by cudnn" in caplog.text
    assert "sdpa 3 ms, cudnn 2 ms, xformers cannot (it cannot be imported)" in caplog.text


def test_a_resumed_run_keeps_its_choice_on_the_same_kind_of_device():
    stored = {"backend": "xformers", "place": PLACE, "milliseconds": {"xformers": 1.0}}
    kept = choose(stored, place=PLACE, runs=lambda backend: True, measure=never)
    assert kept == stored


def test_another_device_or_a_lost_backend_is_measured_anew_and_told(warnings_of):
    stored = {"backend": "xformers", "place": PLACE}
    lost = choose(stored, place=PLACE, runs=lambda backend: False, measure=lambda: TIMINGS)
    moved = choose(stored, place="NVIDIA A100, bf16", runs=lambda b: True, measure=lambda: TIMINGS)
    assert (lost["backend"], moved["backend"]) == ("cudnn", "cudnn")
    told = warnings_of("dtr_scale.jobs.attention")
    assert len(told) == 2
    assert "by xformers (NVIDIA H100, bf16) and is by cudnn (NVIDIA A100, bf16)" in told[1]
    # A CPU has one way; nothing is measured, and the change is told all the same.
    assert choose(stored, place="cpu, bf16", runs=lambda b: True, measure=None)["backend"] == "sdpa"
    assert len(warnings_of("dtr_scale.jobs.attention")) == 3


def test_checkpoints_remember_the_choice(digits, tmp_path, warnings_of):
    def stored(step):
        return json.loads((checkpoints / f"step_{step:08d}" / "index.json").read_text())

    checkpoints = tmp_path / "checkpoints"
    assert tiny(digits, tmp_path, "--train.max_steps=2") == 0
    assert stored(2)["meta"]["attention"] == {"backend": "sdpa", "place": "cpu, fp32"}
    index = stored(2)
    assert tiny(digits, tmp_path) == 0
    assert stored(4)["meta"]["attention"] == index["meta"]["attention"]
    assert not warnings_of("dtr_scale.jobs.attention")
