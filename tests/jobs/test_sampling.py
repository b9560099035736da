"""The network that samples are drawn with is compiled as its training's was."""

from typing import Any

import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.sampling import build_sampler
from tests.support.runs import DEMO, SMALL


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("is_compiled", [True, False])
def test_every_batch_size_is_compiled_by_itself(is_compiled, monkeypatch):
    """What a batch is computed by must not depend on those that the rank has drawn before."""
    graphs: list[Any] = []

    def compile_fx(graph, inputs, **options):
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    settings = ["--evaluation.num_sampling_steps=5", "--evaluation.cfg_interval=[200,800]"]
    compiled = f"--engine.compile={str(is_compiled).lower()}"
    experiment = load_experiment(DEMO, [*SMALL, *settings, compiled])
    network, device = build_network(experiment).eval(), torch.device("cpu")
    sampler = build_sampler(
        experiment, network, device, conditions=None, null_condition=None, step=0
    )
    sampler.draw(range(4))
    sampler.draw(range(4, 8))
    # With and without guidance; no number of samples is left open.
    assert len(graphs) == (2 if is_compiled else 0)
    assert not any(isinstance(value, torch.SymInt) for inputs in graphs for value in inputs)
