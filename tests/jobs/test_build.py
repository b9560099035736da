"""What the composition root decides by the machine and the network."""

import pytest
import torch
from torch import nn

from dtr_scale.config.schema import EngineConfig
from dtr_scale.engines.world import World
from dtr_scale.jobs.build import casts_weights_once, compiles_blocks, reshards
from tests.support.engine_jobs import LONE
from tests.support.runs import demo_experiment


@pytest.mark.parametrize(("setting", "small", "large"), [("auto", False, True), (True, True, True)])
def test_a_network_below_a_billion_parameters_stays_gathered(setting, small, large):
    config = EngineConfig(type="fsdp2", reshard_after_forward=setting)
    networks = [nn.Linear(rows, 10**6, bias=False, device="meta") for rows in (999, 1000)]
    assert [reshards(config, network) for network in networks] == [small, large]


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False)])
def test_bf16_weights_replace_autocast_on_a_gpu(tmp_path, precision, expected):
    experiment = demo_experiment("digits", tmp_path, f"--engine.precision={precision}")
    assert casts_weights_once(experiment, torch.device("cuda")) is expected
    assert not casts_weights_once(experiment, torch.device("cpu"))


class Uneven(World):
    """A world whose other node cannot compile."""

    def all_gather_object(self, value):
        return [value, False]


@pytest.mark.parametrize(("stage", "compiles"), [(1, True), (3, False)])
def test_all_ranks_compile_or_none_and_never_under_zero3(tmp_path, stage, compiles):
    overrides = ("--engine.compile=true", f"--engine.zero_stage={stage}")
    experiment = demo_experiment("digits", tmp_path, *overrides)
    assert compiles_blocks(experiment, LONE) is compiles
    assert not compiles_blocks(experiment, Uneven(**vars(LONE)))
    auto = demo_experiment("digits", tmp_path, "--engine.compile=auto")
    assert not compiles_blocks(auto, LONE)
