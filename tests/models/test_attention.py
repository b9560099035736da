import sys

import pytest
import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models.attention import attention, resolve_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["sdpa", "xformers", "cudnn"])
def test_attention_is_the_softmax_of_scaled_products(backend):
    q, k, v = torch.randn(3, 2, 5, 3, 8).unbind(0)
    weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(8**0.5).softmax(dim=-1)
    expected = torch.einsum("nhqk,nkhd->nqhd", weights, v)
    torch.testing.assert_close(attention(q, k, v, backend), expected)


def test_without_cuda_auto_means_sdpa():
    assert resolve_backend("auto", CPU) == "sdpa"
    assert resolve_backend("sdpa", CPU) == "sdpa"


@pytest.mark.parametrize("backend", ["xformers", "cudnn"])
def test_asking_for_what_cannot_run_names_key_reason_and_fix(backend):
    with pytest.raises(ConfigError, match=r"model\.attention.*needs a CUDA device.*'sdpa'"):
        resolve_backend(backend, CPU)


def test_a_missing_xformers_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cuda = torch.device("cuda")
    assert resolve_backend("auto", cuda) == "sdpa"
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve_backend("xformers", cuda)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match=r"'flash'.*give one of auto, xformers, sdpa"):
        resolve_backend("flash", CPU)
