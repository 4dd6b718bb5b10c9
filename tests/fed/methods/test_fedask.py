"""FedASK: two sketches give the best cut where they cover the rank, and its factors weigh alike."""

import pytest
import torch

from lora_dp.fed.methods import Layers, get_method
from lora_dp.fed.methods.fedask import sketched
from lora_dp.fed.methods.low_rank import LowRank
from tests.fed.methods.test_fedsvd import drawn
from tests.fed.methods.test_prism import best_cut
from tests.fed.small import make_federation, products, updates


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("d_out", "d_in", "r", "rank"), [(20, 30, 3, 9), (30, 20, 3, 11), (20, 30, 3, 2), (4, 9, 3, 4)]
)
def test_a_sketch_that_covers_the_rank_gives_the_best_cut_in_equal_shares(d_out, d_in, r, rank, dense, alpha):
    generator = torch.Generator().manual_seed(rank)
    left, right = drawn((d_out, rank), rank, generator), drawn((rank, d_in), rank, generator)
    mean = {"x.product": left @ right if dense else LowRank(left, right), "head": torch.ones(2)}
    layers = Layers({"x": (d_out, d_in)}, r, alpha)
    found = get_method("fedask").combine(mean, {}, layers, 5)
    a, b = found["x.lora_A"], found["x.lora_B"]
    assert a.shape == (r, d_in) and b.shape == (d_out, r) and found["head"].equal(mean["head"])
    torch.testing.assert_close(layers.scaling(r) * b @ a, best_cut(left @ right, r), rtol=0, atol=1e-11)
    sizes = torch.linalg.svdvals(left @ right)[:r] / layers.scaling(r)
    shares = sizes.where(sizes > 1e-9, torch.zeros(())).diag()
    torch.testing.assert_close(b.t() @ b, shares, rtol=0, atol=1e-11)
    there = sizes > 1e-9
    torch.testing.assert_close((a @ a.t())[there][:, there], shares[there][:, there], rtol=0, atol=1e-11)
    # What has no weight yet can still move.
    assert torch.allclose((a @ a.t()).diagonal()[~there], torch.ones(int((~there).sum())).double())


def test_a_product_of_zero_leaves_a_trainable_adapter():
    layers = Layers({"x": (6, 9)}, 3)
    found = get_method("fedask").combine({"x.product": torch.zeros(6, 9)}, {}, layers, 0)
    assert not found["x.lora_B"].any()
    assert torch.allclose(found["x.lora_A"] @ found["x.lora_A"].t(), torch.eye(3).double())


def test_a_narrower_sketch_is_a_projection_that_is_near_the_best():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(drawn((40, 40), 40, generator))[0] for _ in range(2))
    matrix = left @ (0.6 ** torch.arange(40).double()).diag() @ right
    best = float((matrix - best_cut(matrix, 4)).norm())
    omega, errors = drawn((40, 40), 40, generator), []
    for width in (4, 6, 12, 40):
        found = sketched(matrix, omega[:, :width], 4)
        errors.append(float((matrix - found.left @ found.right).norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * best
    assert errors[2] < 1.01 * best and errors[3] == pytest.approx(best)


def test_each_round_has_a_sketch_of_its_own_that_everyone_can_redraw():
    matrix = {"x.product": drawn((20, 20), 20, torch.Generator().manual_seed(0))}
    layers, narrow = Layers({"x": (20, 20)}, 2), get_method("fedask", {"oversampling": 0})
    found = [narrow.combine(matrix, {}, layers, index)["x.lora_B"] for index in (0, 1, 0)]
    assert found[0].equal(found[2]) and not torch.allclose(found[0].abs(), found[1].abs())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, (1, 3, 2)])
@pytest.mark.parametrize("privacy", [{}, {"unit": "client", "noise_by": "client"}, {"epsilon": None}])
def test_the_server_cuts_the_exact_average_of_the_products(privacy, ranks):
    federation, twin = (make_federation("fedask", weighting="equal", r=3, ranks=ranks, **privacy) for _ in range(2))
    for _ in range(2):
        each = [products(update) for update in updates(twin)]
        for one in (federation, twin):
            one.run_round([0, 1, 2])
        for layer, product in products(federation.server.state).items():
            mean = sum(one[layer] for one in each) / 3
            torch.testing.assert_close(product, best_cut(mean, 3), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_whole_clients_are_protected_by_the_server_s_noise():
    federation = make_federation("fedask", weighting="equal", unit="client", noise_by="server")
    federation.check_model()
    before = products(federation.server.state)
    federation.run_round()
    after = products(federation.server.state)
    assert all(not torch.allclose(after[layer], before[layer]) for layer in before)
    assert 0 < federation.account.worst_epsilon() <= 8
