"""Private layers without an engine: drop-ins for torch's own, with ordinary gradients."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear
from tests.models import assert_refuses
from tests.nn.lora_layers import close


@pytest.mark.parametrize("plain", [nn.Linear(7, 5), nn.Linear(7, 5, bias=False), Conv1D(5, 7)])
def test_linear_is_a_drop_in(plain):
    plain.weight.requires_grad_(False)
    layer = DPLinear.from_linear(plain)
    assert layer.weight is plain.weight and layer.bias is plain.bias
    assert not layer.weight.requires_grad
    assert set(layer.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, 3, 7)
    assert close(layer(x), plain(x), torch.float32)


@pytest.mark.parametrize(
    "plain",
    [nn.LayerNorm(7), nn.LayerNorm(7, bias=False), nn.LayerNorm(7, eps=0.1), nn.LayerNorm(7, elementwise_affine=False)],
)
def test_layer_norm_is_a_drop_in(plain):
    layer = DPLayerNorm.from_layer_norm(plain)
    assert set(layer.state_dict()) == set(plain.state_dict())
    x = torch.randn(2, 3, 7)
    assert torch.equal(layer(x), plain(x))


def test_layer_norm_over_two_dimensions_is_refused():
    assert_refuses(ValueError, "freeze this LayerNorm", lambda: DPLayerNorm.from_layer_norm(nn.LayerNorm((3, 7))))


def test_embedding_is_a_drop_in():
    plain = nn.Embedding(9, 4, padding_idx=2)
    layer = DPEmbedding.from_embedding(plain)
    assert layer.weight is plain.weight
    ids = torch.tensor([[1, 2, 2], [8, 1, 1]])
    gradients = []
    for module in (plain, layer):
        out = module(ids)
        gradients.append(torch.autograd.grad(out.square().sum(), module.weight)[0])
        assert out.shape == (2, 3, 4)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_embedding_options_that_mix_examples_are_refused(options):
    assert_refuses(ValueError, "mixes examples", lambda: DPEmbedding.from_embedding(nn.Embedding(9, 4, **options)))
