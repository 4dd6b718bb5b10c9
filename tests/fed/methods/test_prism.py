"""PRISM in a federation: exact averages of tangent vectors, and the best cut to rank r afterwards."""

from dataclasses import replace

import pytest
import torch

from lora_dp.fed.methods import Layers, factor, get_method
from lora_dp.fed.methods.prism import retracted
from lora_dp.fed.rounds.messages import Task, Workspace
from tests.fed.methods.test_fedsvd import is_orthonormal
from tests.fed.small import TRAINING, Adapted, make_federation, products, updates

UNITS = [{}, {"unit": "client", "noise_by": "server"}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}]


def best_cut(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r", "rank_B"), [(6, 12, 3, 3), (12, 6, 3, 2), (6, 12, 3, 0), (4, 4, 3, 3), (3, 9, 3, 1)]
)
def test_the_cut_is_the_nearest_matrix_of_that_rank(d_out, d_in, r, rank_B, scale):
    generator = torch.Generator().manual_seed(d_out + r + rank_B)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, u = torch.linalg.qr(drawn(d_in, r))[0].t(), torch.linalg.qr(drawn(d_out, r))[0]
    sizes = torch.arange(r, 0, -1).double() * (torch.arange(r) < rank_B)
    dA, dB = scale * drawn(r, d_in), scale * drawn(d_out, r)
    unit = u * (sizes > 0)
    whole = (u * sizes + dB) @ a + unit @ (dA - dA @ a.t() @ a)
    found = retracted(a, u * sizes, dA, dB, r)
    tolerance = 1e-12 * float(whole.norm())
    torch.testing.assert_close(found.left @ found.right, best_cut(whole, r), rtol=0, atol=tolerance)
    gram = found.left.t() @ found.left
    assert is_orthonormal(found.right)
    assert (gram - gram.diag().diag()).abs().max() <= 1e-12 * float(gram.max())


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [UNITS[0], *UNITS[2:]])
def test_the_server_cuts_the_exact_average_of_what_clients_send(privacy):
    federation, twin = (make_federation("prism", weighting="equal", r=3, **privacy) for _ in range(2))
    for _ in range(2):
        before = dict(twin.server.state)
        sent = updates(twin)
        each = [products({**before, **update}) for update in sent]
        assert all({factor(name) for name in update} == {None} and "1.lora_dA" in update for update in sent)
        federation.run_round([0, 1, 2])
        twin.run_round([0, 1, 2])
        for layer, product in products(federation.server.state).items():
            mean = sum(one[layer] for one in each) / 3
            torch.testing.assert_close(product, best_cut(mean, 3), rtol=0, atol=1e-10)
            assert torch.linalg.matrix_rank(mean) > 3 or not before[f"{layer}.lora_B"].any()


@pytest.mark.slow
@pytest.mark.parametrize("privacy", UNITS)
def test_a_round_begins_at_a_point_of_its_own_tangent_space(privacy):
    federation = make_federation("prism", weighting="equal", **privacy)
    federation.check_model()
    for _ in range(3):
        federation.run_round()
        state = federation.server.state
        for layer in ("1", "3"):
            assert is_orthonormal(state[f"{layer}.lora_A"])
            assert not state[f"{layer}.lora_dA"].any() and not state[f"{layer}.lora_dB"].any()
            gram = state[f"{layer}.lora_B"].t() @ state[f"{layer}.lora_B"]
            assert (gram - gram.diag().diag()).abs().max() < 1e-12 and gram.diagonal().min() > 0
    if privacy.get("epsilon", 1.0) is not None:
        assert 0 < federation.account.worst_epsilon() <= 8


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "projected"), [("adamw", True), ("sgd", False)])
def test_moments_see_noise_of_the_tangent_space_alone(optimizer, projected):
    """SGD has none, and dA's part along A's rows changes nothing."""
    federation, along = make_federation("prism", replace(TRAINING, optimizer=optimizer)), []
    federation.run_round([0, 1, 2])
    state = federation.server.state

    def watch(client, private, batches):
        model = federation.model

        def record(*_):
            gradients = {name: model.get_submodule(name).lora_dA.grad for name in ("1", "3")}
            along.extend((g @ state[f"{name}.lora_A"].t()).norm() / g.norm() for name, g in gradients.items())

        private.register_step_pre_hook(record)

    replace(federation.trainer, on_turn=watch).train(0, federation.engine.parts[0], Task(1, 0, 2, state))
    assert len(along) == 6
    assert max(along) < 1e-12 if projected else min(along) > 1e-3


def test_random_coordinates_do_not_follow_what_a_server_may_scale():
    """Trials of a client hold random numbers in the adapters, whose output must not grow with alpha."""
    found = []
    for scaling in (1.0, 1e8):
        model = Adapted(adapter="tangent")
        layer, x = model[1], torch.ones(2, 12).double()
        layer.scaling = scaling
        with Workspace(model).at_random(torch.Generator().manual_seed(0)):
            found.append((layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)).detach())
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_single_precision_does_not_drift():
    generator = torch.Generator().manual_seed(0)
    layers, method = Layers({"x": (16, 24)}, 4), get_method("prism")
    state = {
        "x.lora_A": torch.linalg.qr(torch.randn(24, 4, generator=generator))[0].t(),
        "x.lora_B": torch.zeros(16, 4),
    }
    zeros = {"x.lora_dA": torch.zeros(4, 24), "x.lora_dB": torch.zeros(16, 4)}
    for index in range(200):
        mean = {name: 0.1 * torch.randn(zero.shape, generator=generator) for name, zero in zeros.items()}
        combined = method.combine(mean, {**state, **zeros}, layers, index)
        state = {name: combined[name].float() for name in state}
    assert is_orthonormal(state["x.lora_A"], 1e-6)


def test_what_the_server_sets_from_statistics_is_not_trained():
    """Beside a head on centred features: their mean and scale travel down alone."""
    for name in ("prism", "lora-xs"):
        trained = [part for part in ("4.weight", "4.feature_mean", "1.lora_A") if get_method(name).trains(part, 0)]
        assert trained == ["4.weight"]
