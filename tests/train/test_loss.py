"""The loss of a step, as it is computed where blocks are compiled."""

import pytest
import torch

from dtr_scale.data.batch import MicroBatch
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.objectives.objective import OBJECTIVE_TYPES, build_objective
from dtr_scale.train.loss import StepLoss

CPU = torch.device("cpu")


# torch.compile looks at .grad of the output and hides its warning; as an error it cannot.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("kind", OBJECTIVE_TYPES)
def test_compiled_it_is_one_graph_and_the_same_loss(kind, learn_sigma):
    torch.compiler.reset()  # it counts what other tests have compiled of the same code
    torch.manual_seed(0)
    diffusion = GaussianDiffusion("cosine", 1000, learn_sigma=learn_sigma)
    objective = build_objective(kind, num_clusters=3, global_batch_size=4, device=CPU)
    x_start, noise, t = torch.randn(4, 2, 8, 8), torch.randn(4, 2, 8, 8), torch.arange(4) * 333
    batch = MicroBatch(x_start, noise, t, torch.tensor([0, 1, 2, 0]), torch.zeros(4))
    counts, x_t = torch.tensor([2, 1, 1]), diffusion.q_sample(x_start, t, noise)
    output = torch.randn(4, 4 if learn_sigma else 2, 8, 8, requires_grad=True)
    found = []
    for compiled in (False, True):
        losses = StepLoss(diffusion, objective, compiled=compiled)(output, x_t, batch, counts)
        found.append([*losses, *torch.autograd.grad(losses.share, output)])
    for expected, actual in zip(*found, strict=True):
        # Of the largest: single gradients are sums that cancel.
        largest = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * largest)
