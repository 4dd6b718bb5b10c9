"""FedSVD's two promises, whatever was averaged: the product stays what it was, and A's rows are orthonormal."""

import pytest
import torch

from lora_dp.fed.methods import Layers, factor, get_method
from tests.fed.small import federation_generators, make_federation, products, updates


def is_orthonormal(rows, tolerance=1e-12):
    return torch.allclose(rows @ rows.t(), torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=tolerance)


def drawn(shape, rank, generator):
    """A matrix of that shape and rank."""
    left, right = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((shape[0], rank), (rank, shape[1]))
    )
    return left @ right


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r", "rank_B"),
    [
        (6, 12, 3, 3),
        (12, 6, 3, 3),
        (6, 12, 3, 2),
        (6, 12, 3, 1),
        (6, 12, 3, 0),
        (3, 9, 3, 1),
        (9, 3, 3, 1),
        (4, 4, 4, 0),
    ],
)
def test_nothing_is_lost_and_a_is_orthonormal_at_every_rank_of_b(d_out, d_in, r, rank_B, scale):
    generator = torch.Generator().manual_seed(d_out + r + rank_B)
    layers = Layers({"x": (d_out, d_in)}, r, alpha=2.0)
    state = {"x.lora_A": drawn((r, d_in), r, generator), "x.lora_B": torch.zeros(d_out, r).double()}
    mean = {"x.lora_B": scale * drawn((d_out, r), rank_B, generator), "head": torch.ones(2).double()}
    found = get_method("fedsvd").combine(mean, state, layers, 3)
    a, b = found["x.lora_A"], found["x.lora_B"]
    before = mean["x.lora_B"] @ state["x.lora_A"]
    torch.testing.assert_close(b @ a, before, rtol=0, atol=1e-13 * float(before.norm() + 1))
    assert is_orthonormal(a) and found["head"].equal(mean["head"])
    # What is left to train spans what A spanned before.
    span = torch.linalg.qr(state["x.lora_A"].t())[0]
    torch.testing.assert_close(a @ span @ span.t(), a, rtol=0, atol=1e-12)
    gram = b.t() @ b
    lengths = gram.diagonal().sqrt()
    assert (gram - gram.diag().diag()).abs().max() <= 1e-12 * (1e-300 + float(gram.max()))
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert int((lengths > 1e-12 * lengths.max()).sum()) == rank_B


def test_a_run_begins_with_an_orthonormal_a_beside_a_b_of_zero():
    federation = make_federation("fedsvd")
    before = products(federation.server.state)
    federation.server.begin(0, federation_generators(1)[0])
    state = federation.server.state
    for layer, product in products(state).items():
        assert product.equal(before[layer]) and not state[f"{layer}.lora_B"].any()
        assert is_orthonormal(state[f"{layer}.lora_A"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy", [{}, {"unit": "client", "noise_by": "server"}, {"unit": "client", "noise_by": "client"}]
)
def test_b_alone_is_sent_and_every_round_ends_orthonormal(privacy):
    federation = make_federation("fedsvd", weighting="equal", **privacy)
    for index in range(3):
        federation.server.begin(index, federation_generators(3)[index])
        assert all(
            {factor(name) for name in update} == {"B", None} and "4.weight" in update for update in updates(federation)
        )
        federation.run_round()
        for layer, product in products(federation.server.state).items():
            assert is_orthonormal(federation.server.state[f"{layer}.lora_A"])
            assert torch.linalg.matrix_rank(product) == 2  # every row of A has its column of B


def test_single_precision_does_not_drift():
    generator = torch.Generator().manual_seed(0)
    layers, method = Layers({"x": (16, 24)}, 4), get_method("fedsvd")
    state = {"x.lora_A": torch.randn(4, 24, generator=generator), "x.lora_B": torch.zeros(16, 4)}
    for index in range(200):
        mean = {"x.lora_B": state["x.lora_B"] + 0.1 * torch.randn(16, 4, generator=generator)}
        state = {name: tensor.float() for name, tensor in method.combine(mean, state, layers, index).items()}
    assert is_orthonormal(state["x.lora_A"], 1e-6)
