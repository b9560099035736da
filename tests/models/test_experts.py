import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.errors import ConfigError
from dtr_scale.models.dit import DiT
from dtr_scale.models.experts import MultiExperts, expert_timesteps


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    networks = [
        DiT(hidden_size=16, depth=1, num_heads=2, patch_size=2, input_size=4, num_classes=5)
        for _ in range(4)
    ]
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return MultiExperts(networks, num_timesteps=1000)


@given(num_timesteps=st.integers(1, 1000), num_experts=st.integers(1, 20))
def test_intervals_cover_every_timestep_once(num_timesteps, num_experts):
    intervals = [expert_timesteps(k, num_experts, num_timesteps) for k in range(num_experts)]
    assert [t for interval in intervals for t in interval] == list(range(num_timesteps))
    assert max(map(len, intervals)) - min(map(len, intervals)) <= 1


def test_each_sample_goes_to_the_expert_of_its_timestep(experts):
    t = torch.tensor([999, 0, 250, 249, 500, 751])
    x, y = torch.randn(6, 4, 4, 4), torch.tensor([0, 1, 2, 3, 4, 5])
    out = experts(x, t, y)
    for n, owner in enumerate([3, 0, 1, 0, 2, 3]):
        alone = experts.experts[owner](x[n : n + 1], t[n : n + 1], y[n : n + 1])
        torch.testing.assert_close(out[n], alone[0])


def test_an_expert_without_samples_has_zero_gradients(experts):
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 100]), torch.tensor([0, 1])
    experts.zero_grad()
    experts(x, t, y).square().mean().backward()
    for k, expert in enumerate(experts.experts):
        gradients = [parameter.grad for parameter in expert.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.any() for gradient in gradients) == (k == 0)


def test_no_block_is_called_on_nothing_in_training(experts):
    """Compiled, the backward of flash attention fails there."""
    lengths = []
    for block in experts.routed_blocks():
        block.register_forward_pre_hook(lambda block, inputs: lengths.append(len(inputs[0])))
    experts(torch.randn(2, 4, 4, 4), torch.tensor([0, 100]), torch.tensor([0, 1]))
    assert lengths == [2, 1, 1, 1]


def test_the_outside_is_that_of_one_network(experts):
    assert (experts.in_channels, experts.input_size, experts.null_label) == (4, 4, 5)
    assert len(experts.routed_blocks()) == 4


def test_a_timestep_of_no_expert_is_refused(experts):
    x, y = torch.randn(2, 4, 4, 4), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match=r"1 of 2 timesteps belong to no expert; .* 0 to 999"):
        experts(x, torch.tensor([0, 1000]), y)


def test_no_samples_are_no_samples(experts):
    none = torch.zeros(0, dtype=torch.int64)
    with torch.no_grad():
        assert experts(torch.randn(0, 4, 4, 4), none, none).shape == (0, 8, 4, 4)
