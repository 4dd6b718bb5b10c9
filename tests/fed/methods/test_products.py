"""How each method averages products of factors, and what it makes of them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.fed.methods import factor, get_method
from lora_dp.fed.methods.low_rank import LowRank, truncated_svd
from tests.fed.small import federation_generators, make_federation, products, updates


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [{}, {"epsilon": None}])
@pytest.mark.parametrize(
    ("method", "exact"),
    [
        ("ffa-lora", True),
        ("rolora", True),
        ("deer", True),
        ("rac-lora", True),
        ("galore", True),
        ("fedsvd", True),
        ("lora-xs", True),
        ("flora", True),
        ("la-lora", False),
        ("dp-lora", False),
        ("lora-fair", False),
    ],
)
def test_the_average_of_the_products_is_the_product_of_the_averages(method, exact, privacy):
    """Over three rounds, merged weights included; a twin federation shows what each client sent."""
    federation, twin = make_federation(method, **privacy), make_federation(method, **privacy)
    sizes = federation.account.sizes.tolist()
    for index in range(3):
        gap = 0.0
        if federation.method.turns == 1:
            twin.server.begin(index, federation_generators(3)[index])
            before = dict(twin.server.state)
            each = [products({**before, **update}) for update in updates(twin)]
            twin.server.state = before
            twin.run_round([0, 1, 2])
            federation.run_round([0, 1, 2])
            for layer, product in products(federation.server.state).items():
                ideal = sum(size * one[layer] for size, one in zip(sizes, each, strict=True)) / sum(sizes)
                gap = max(gap, float((product - ideal).norm() / ideal.norm()))
        else:
            for turn in range(2):
                before = dict(federation.server.state)
                each = [products({**before, **update}) for update in updates(federation, turn)]
                federation._run_turn(index, turn, [0, 1, 2], lambda: None)
                for layer, product in products(federation.server.state).items():
                    ideal = sum(size * one[layer] for size, one in zip(sizes, each, strict=True)) / sum(sizes)
                    gap = max(gap, float((product - ideal).norm() / ideal.norm()))
            federation.rounds_done += 1
        assert gap < 1e-10 if exact else gap > 1e-4, (index, gap)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, (2, 1, 4)])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_flora_merges_the_exact_sum_of_products(ranks, alpha):
    federation = make_federation("flora", r=4, alpha=alpha, ranks=ranks)
    layers = federation.server.layers
    total: dict[str, Tensor] = {layer: torch.zeros(shape).double() for layer, shape in layers.shapes.items()}
    for index in range(3):
        federation.server.begin(index, federation_generators(3)[index])
        sent = updates(federation)
        for update, size in zip(sent, federation.account.sizes.tolist(), strict=True):
            for layer in total:
                a, b = update[f"{layer}.lora_A"], update[f"{layer}.lora_B"]
                total[layer] += size / 41 * (1 if alpha is None else alpha / len(a)) * b @ a
        federation.run_round([0, 1, 2])
        for layer, expected in total.items():
            torch.testing.assert_close(federation.server.state[f"{layer}.merged"], expected, rtol=1e-12, atol=1e-14)
            assert not federation.server.state[f"{layer}.lora_B"].any()
    assert [update["1.lora_A"].shape[0] for update in sent] == list(ranks or (4, 4, 4))


def ideal_products(federation, sent):
    scaling = federation.server.layers.scaling
    sizes = federation.account.sizes.tolist()
    return {
        layer: sum(
            size
            / sum(sizes)
            * scaling(len(update[f"{layer}.lora_A"]))
            * update[f"{layer}.lora_B"]
            @ update[f"{layer}.lora_A"]
            for size, update in zip(sizes, sent, strict=True)
        )
        for layer in federation.server.layers.shapes
    }


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_flexlora_is_exact_at_full_rank_and_the_best_cut_below(alpha):
    for r, ranks in ((6, (6, 3, 1)), (2, None)):
        federation = make_federation("flexlora", r=r, alpha=alpha, ranks=ranks)
        for _ in range(2):
            ideal = ideal_products(federation, updates(federation))
            federation.run_round([0, 1, 2])
            found = products(federation.server.state, federation.server.layers.scaling(r))
            for layer, matrix in ideal.items():
                tail = torch.linalg.svdvals(matrix)[r:].norm()
                torch.testing.assert_close((found[layer] - matrix).norm(), tail, rtol=1e-6, atol=1e-12)
                assert bool(tail < 1e-12) is (r == 6)


@pytest.mark.slow
def test_flexlora_gives_each_client_the_best_cut_at_its_rank():
    federation = make_federation("flexlora", r=4, alpha=2.0, ranks=(4, 2, 1))
    federation.run_round([0, 1, 2])
    layers, state = federation.server.layers, federation.server.state
    whole = products(state, layers.scaling(4))
    for rank in (4, 2, 1):
        cut = products(federation.method.for_client(state, layers, rank), layers.scaling(rank))
        for layer, matrix in whole.items():
            tail = torch.linalg.svdvals(matrix)[rank:].norm()
            torch.testing.assert_close((cut[layer] - matrix).norm(), tail, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ridge", "cosine"])
def test_lora_fair_is_never_further_from_the_ideal_than_plain_averaging(objective):
    federation = make_federation("lora-fair", options={"objective": objective})
    plain = make_federation("dp-lora")
    for index in range(3):
        sent = updates(federation)
        ideal = ideal_products(federation, sent)
        plain.server.state, plain.rounds_done = dict(federation.server.state), index
        plain.run_round([0, 1, 2])
        federation.run_round([0, 1, 2])
        for layer, matrix in ideal.items():
            corrected, averaged = (products(f.server.state)[layer] for f in (federation, plain))
            if objective == "ridge":
                assert (corrected - matrix).norm() < (averaged - matrix).norm()
            cosines = [F.cosine_similarity(p.flatten(), matrix.flatten(), dim=0) for p in (corrected, averaged)]
            assert cosines[0] > cosines[1] - (0 if objective == "cosine" else 1)


def test_lora_fair_solves_its_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    a, b, m = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 7), (5, 2), (5, 7)))
    fair = get_method("lora-fair", {"regularisation": 0.1})
    found = fair._correction(a, b, m, 1.0)
    weight = 0.1 * (a @ a.t()).diagonal().mean()
    variable = found.clone().requires_grad_(True)
    (((b + variable) @ a - m).square().sum() + weight * variable.square().sum()).backward()
    assert variable.grad.abs().max() < 1e-12
    low = LowRank(m, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(fair._correction(a, b, low, 1.0), found)


@pytest.mark.slow
def test_rac_lora_draws_a_fresh_frozen_factor_each_round():
    for trained, frozen in (("B", "A"), ("A", "B")):
        federation = make_federation("rac-lora", options={"trained": trained})
        seen = []
        for index in range(3):
            federation.server.begin(index, federation_generators(3)[index])
            seen.append(federation.server.state[f"1.lora_{frozen}"])
            assert all(
                set(update) == {f"1.lora_{trained}", f"3.lora_{trained}", "4.weight", "4.bias"}
                for update in updates(federation)
            )
            federation.run_round([0, 1, 2])
            assert not federation.server.state[f"1.lora_{trained}"].any()
        assert not any(a.equal(b) for a, b in itertools.combinations(seen, 2))


def test_a_cut_has_the_same_signs_however_it_was_computed():
    generator = torch.Generator().manual_seed(3)
    for shape in ((5, 7, 2), (7, 5, 3), (4, 4, 4), (3, 8, 3)):
        left, right = (torch.randn(s, generator=generator).double() for s in (shape[::2], (shape[2], shape[1])))
        mixing = torch.randn(shape[2], shape[2], generator=generator).double()
        cuts = [
            truncated_svd(matrix, shape[2])
            for matrix in (LowRank(left, right), LowRank(left @ mixing, mixing.inverse() @ right), left @ right)
        ]
        for cut in cuts[1:]:
            torch.testing.assert_close((cut.left, cut.right), (cuts[0].left, cuts[0].right), rtol=1e-9, atol=1e-9)
        assert (cuts[0].right.abs().amax(1) == cuts[0].right.amax(1)).all()


def test_galore_finds_the_leading_subspace_of_the_gradient():
    """With a constant gradient, alternating sides is subspace iteration: the movement of a round approaches the part of
    the gradient in its leading singular directions."""
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    galore = get_method("galore")
    federation = make_federation("galore")
    layers = federation.server.layers
    state = dict(federation.server.state)
    state |= galore.begin(state, layers, 0, generator)
    best = torch.linalg.svdvals(gradient)[:2].norm()
    caught = []
    for index in range(40):
        a, b = state["1.lora_A"], state["1.lora_B"]
        mean = {name: tensor for name, tensor in state.items() if factor(name) == galore.phases(index)}
        mean["1.lora_" + galore.phases(index)] = b.t() @ gradient if index % 2 == 0 else gradient @ a.t()
        combined = galore.combine(mean, state, layers, index)
        moved = combined["1.merged"]
        caught.append(float((moved.left @ moved.right).norm() / best))
        state |= {n: t for n, t in combined.items() if not n.endswith(".merged")}
    assert caught[0] < 0.9 and caught[-1] == pytest.approx(1, abs=1e-3)
    assert all(later > earlier - 1e-9 for earlier, later in itertools.pairwise(caught[2:]))
