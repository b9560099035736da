from collections import Counter
from typing import Any

import pytest
import torch

from dtr_scale.models.attention_timing import AttentionShape, attention_shapes, time_attention
from dtr_scale.models.build import build_network
from dtr_scale.models.dit import DiT

SIZES: Any = {"hidden_size": 32, "depth": 3, "num_heads": 2, "patch_size": 2, "input_size": 8}
ADM: Any = {
    "image_size": 8, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2],
    "channel_mult": [1, 2], "num_heads": 2, "in_channels": 4,
}  # fmt: skip
SELF = AttentionShape(heads=2, head_dim=16, queries=16, keys=16)


def shapes_of(build, y=None):
    with torch.device("meta"):
        t = torch.zeros(1, dtype=torch.int64)
        y = t if y is None else torch.empty(*y)
        return attention_shapes(build(), torch.empty(1, 4, 8, 8), t, y)


def test_the_shapes_are_those_of_all_layers():
    assert shapes_of(lambda: DiT(**SIZES)) == {SELF: 3}
    text = {"conditioning": "text", "context_length": 5, "context_dim": 12}
    cross = AttentionShape(heads=2, head_dim=16, queries=16, keys=5)
    assert shapes_of(lambda: DiT(**SIZES, **text), y=(1, 5, 12)) == {SELF: 3, cross: 3}
    # At half the resolution: one on the way down, one in the middle, two on the way up.
    wide = AttentionShape(heads=2, head_dim=32, queries=16, keys=16)
    assert shapes_of(lambda: build_network("adm", **ADM)) == {wide: 4}


def test_experts_have_the_shapes_of_one():
    assert shapes_of(lambda: build_network("dit", **SIZES, num_experts=4)) == {SELF: 3}


@pytest.mark.parametrize("keys", [16, 5])
def test_what_runs_here_is_timed_and_the_rest_has_its_reason(keys):
    timings = time_attention(
        ("xformers", "sdpa", "cudnn"),
        Counter({SELF: 3, SELF._replace(keys=keys): 1}),
        num_samples=2,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert timings.milliseconds.keys() == {"sdpa"} and timings.milliseconds["sdpa"] > 0
    assert set(timings.obstacles.values()) == {"it needs a CUDA device"}
    assert timings.fastest == "sdpa"
