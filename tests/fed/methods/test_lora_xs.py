"""LoRA-XS in a federation: r² numbers a layer, between vectors that all clients share to the last bit."""

import math
from dataclasses import replace

import pytest
import torch

from lora_dp.fed.methods import factor, get_method
from lora_dp.fed.models.loading import load_model
from lora_dp.fed.models.options import ModelConfig
from lora_dp.fed.rounds.update_statistics import expected_noise_norm
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear, singular_factors
from tests.fed.small import TRAINING, make_federation, products, updates

UNITS = [{}, {"unit": "client", "noise_by": "server"}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}]


@pytest.mark.slow
@pytest.mark.parametrize("privacy", UNITS)
def test_the_core_and_the_head_travel_up_and_the_vectors_stay(privacy):
    federation = make_federation("lora-xs", weighting="equal", r=3, **privacy)
    start = dict(federation.server.state)
    assert {factor(name) for name in start} == {"A", "B", None}
    for update in updates(federation):
        assert {name: tuple(t.shape) for name, t in update.items() if "lora" in name} == {
            "1.lora_R": (3, 3),
            "3.lora_R": (3, 3),
        }
        assert update.keys() - {"1.lora_R", "3.lora_R"} == {"4.weight", "4.bias"}
    down = [federation.run_round().bytes_down for _ in range(2)]
    sent = 8 * 3 * (2 * 9 + 6 * 3 + 3)
    if privacy.get("noise_by") != "server":  # there bytes are those of a client that was there before
        assert down[0] == sent + 8 * 3 * 3 * (12 + 6 + 6 + 6)
    assert down[1] == sent
    for name, tensor in federation.server.state.items():
        assert tensor.equal(start[name]) is (factor(name) is not None)


def test_the_vectors_are_those_of_the_public_weight():
    federation = make_federation("lora-xs", r=3)
    for name in ("1", "3"):
        layer = federation.model.get_submodule(name)
        left, right = singular_factors(layer.weight, 3)
        state = federation.server.state
        torch.testing.assert_close(state[f"{name}.lora_B"], left, rtol=0, atol=1e-6)  # worked out in float32
        torch.testing.assert_close(state[f"{name}.lora_A"], right, rtol=0, atol=1e-6)
        assert not state[f"{name}.lora_R"].any()


@pytest.mark.slow
def test_the_noise_of_a_change_does_not_grow_with_the_width():
    """Of a step, by r² numbers a layer and the head's; LoRA's grows with the layer's width."""
    found = {}
    for method in ("lora-xs", "ffa-lora"):
        federation = make_federation(method, replace(TRAINING, local_steps=1), r=2)
        federation.server.begin(0, torch.Generator().manual_seed(0))
        norm = expected_noise_norm(federation.trainer, federation.server.task(0, 0, 2), 12, 1.0)
        found[method] = (norm * TRAINING.batch_size / TRAINING.learning_rate) ** 2
    head = 6 * 3 + 3
    assert found["lora-xs"] == pytest.approx(2 * 2**2 + head) and found["ffa-lora"] == pytest.approx(2 * 6 * 2 + head)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", UNITS[:3])
def test_every_client_trains_as_the_unit_of_privacy_asks_for(privacy):
    federation = make_federation("lora-xs", weighting="equal", **privacy)
    federation.check_model()
    before = products(federation.server.state)
    federation.run_round()
    after = products(federation.server.state)
    assert all(not torch.allclose(after[layer], before[layer]) for layer in before)
    assert 0 < federation.account.worst_epsilon() < 8


def test_a_method_says_which_adapters_it_trains():
    assert get_method("flat-lora:lora-xs").adapter == "xs" and get_method("flat-lora").adapter == "lora"
    model = load_model(ModelConfig(r=3), 10, "image", adapter=get_method("lora-xs").adapter).model
    layers = [module for module in model.modules() if isinstance(module, DPLoRAXSLinear)]
    assert len(layers) == 16
    trained = [p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")]
    assert trained == [9] * 16
    assert math.prod(model.head.weight.shape) > 0 and model.head.weight.requires_grad
    with pytest.raises(ValueError, match="has no effect with adapter 'xs'"):
        load_model(ModelConfig(init_a="orthonormal"), 10, "image", adapter="xs")
