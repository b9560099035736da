"""What the planner says that a compiled block keeps, beside what one really keeps."""

from pathlib import Path

import pytest
import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.plan.fusion import compiled_saved
from dtr_scale.jobs.plan.trace import trace_step

CONFIG = Path(__file__).parents[3] / "configs" / "dit_l_dtr_antuw.json"
SIZES = (
    "--model.variant=null", "--model.hidden_size=192", "--model.num_heads=3",
    "--model.patch_size=2", "--model.input_size=16",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_block_keeps_what_products_and_norms_touch():
    torch.compiler.reset()  # it keeps what other tests have compiled of the same code
    one, two = (
        trace_step(load_experiment(CONFIG, [*SIZES, f"--model.depth={n}"]), 4, precision="fp32")
        for n in (1, 2)
    )
    expected = [sum(each.saved[key] for key in compiled_saved(each)) for each in (one, two)]
    block = build_network(load_experiment(CONFIG, [*SIZES, "--model.depth=1"])).routed_blocks()[0]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    block.compile(dynamic=False)
    z = torch.randn(4, 64, 192, requires_grad=True)
    c = torch.randn(4, 192, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(z, c, None, torch.arange(192).expand(4, 192) < 150)
    assert out.requires_grad
    # Measured 3,570,432 bytes, planned 3,563,544.
    assert expected[1] - expected[0] == pytest.approx(sum(kept.values()), rel=0.02)
