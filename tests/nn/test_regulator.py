"""DEeR's noise regulator: what is clipped, what is noised, and what becomes of the noise in the product."""

import pytest
import torch
from torch import Tensor, nn

from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.regulator import RIDGE, Regulator
from tests.support import brute_force, clip_and_sum, make_private


def factors(r: int = 3, d_in: int = 10, d_out: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(r)
    return (
        torch.randn(r, d_in, generator=generator, dtype=dtype) * torch.tensor([3.0, 1.0, 0.2][:r]).unsqueeze(1),
        torch.randn(d_out, r, generator=generator, dtype=dtype),
    )


def model_with(lora_A: Tensor, lora_B: Tensor) -> nn.Module:
    torch.manual_seed(0)
    layer = DPLoRALinear(lora_A.shape[1], lora_B.shape[0], r=lora_A.shape[0], alpha=6, dtype=lora_A.dtype)
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    return nn.Sequential(layer)


def ridged_root(frozen_gram: Tensor) -> Tensor:
    """(G + ρI)^½ from its definition, by Newton's method: nothing in common with an eigendecomposition."""
    target = frozen_gram + RIDGE * frozen_gram.diagonal().mean() * torch.eye(len(frozen_gram), dtype=torch.float64)
    root, inverse = target.clone(), torch.eye(len(target), dtype=torch.float64)
    for _ in range(60):
        root, inverse = (root + inverse.inverse()) / 2, (inverse + root.inverse()) / 2
    return root


@pytest.mark.parametrize("trained", ["A", "B"])
def test_the_measured_norm_is_that_of_the_product_and_a_ridge(trained):
    lora_A, lora_B = factors()
    regulator = Regulator.beside(trained, lora_A if trained == "B" else lora_B)
    change = torch.randn_like(lora_B if trained == "B" else lora_A)
    product = change @ lora_A if trained == "B" else lora_B @ change
    gram = lora_A @ lora_A.t() if trained == "B" else lora_B.t() @ lora_B
    ridge = RIDGE * gram.diagonal().mean()
    expected = product.square().sum() + ridge * change.square().sum()
    torch.testing.assert_close(regulator.measured(change).square().sum(), expected)
    torch.testing.assert_close(regulator.restored(regulator.measured(change)), change)
    torch.testing.assert_close(regulator.root, ridged_root(gram))


@pytest.mark.parametrize("trained", ["A", "B"])
def test_noise_in_the_product_does_not_grow_with_the_frozen_factor(trained):
    lora_A, lora_B = factors()
    shape = lora_B.shape if trained == "B" else lora_A.shape
    sizes = []
    for scale in (1e-3, 1.0, 1e3):
        frozen = (lora_A if trained == "B" else lora_B) * scale
        regulator = Regulator.beside(trained, frozen)
        drawn = torch.randn(4000, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        noise = torch.stack([regulator.restored(each) for each in drawn])
        product = noise @ frozen if trained == "B" else frozen @ noise
        sizes.append(float(product.square().sum((1, 2)).mean()))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=1e-9)
    # Each direction of the frozen factor lets λ / (λ + ρ) of one noise through: all of it, but for weak directions.
    gram = lora_A @ lora_A.t() if trained == "B" else lora_B.t() @ lora_B
    strength = torch.linalg.eigvalsh(gram)
    share = strength / (strength + RIDGE * strength.mean())
    assert sizes[0] == pytest.approx(float(share.sum()) * (8 if trained == "B" else 10), rel=0.03)


def test_a_factor_that_has_lost_rank_raises_noise_at_most_tenfold():
    lora_A, _ = factors()
    lora_A[2] = lora_A[0]
    regulator = Regulator.beside("B", lora_A)
    assert regulator.inverse.isfinite().all()
    typical = (lora_A @ lora_A.t()).diagonal().mean().rsqrt()
    assert torch.linalg.matrix_norm(regulator.inverse, 2) <= 10 * typical * (1 + 1e-6)
    zero = Regulator.beside("A", torch.zeros(8, 3))
    assert zero.root.equal(torch.eye(3)) and zero.inverse.equal(torch.eye(3))


def square_loss(model: nn.Module, example: Tensor) -> Tensor:
    return model(example).square().sum() / 2


@pytest.mark.parametrize("rule", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("phases", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_a_step_clips_by_the_product(rule, phases, dtype, method):
    """Against the definition: per-example gradients one by one, measured, clipped, added, restored."""
    lora_A, lora_B = factors(dtype=dtype)
    model = model_with(lora_A, lora_B)
    trained = f"lora_{phases}"
    generator = torch.Generator().manual_seed(3)
    examples = [torch.randn(1, 5, 10, generator=generator, dtype=dtype) for _ in range(6)]
    name = f"0.{trained}"
    root = ridged_root(((lora_A @ lora_A.t()) if phases == "B" else (lora_B.t() @ lora_B)).double())
    measured = [
        {name: each[name] @ root if phases == "B" else root @ each[name]}
        for each in brute_force(model, square_loss, [x.double() for x in examples], {name})
    ]
    norms = sorted(float(each[name].norm()) for each in measured)
    bound = norms[2]
    total = clip_and_sum(measured, rule, bound, lambda key: key.rpartition(".")[0])[name]
    expected = total @ root.inverse() if phases == "B" else root.inverse() @ total
    optimizer = make_private(
        model,
        batch_size=4,
        size=6,
        max_grad_norm=bound,
        clipping=rule,
        phases=phases,
        norm_method=method,
        regulate_noise=True,
        loss_reduction="sum",
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.batch.expect(6)
    square_loss(model, torch.cat(examples)).backward()
    optimizer.step()
    moved = (before[name] - dict(model.named_parameters())[name].detach()).double()
    tolerance = 4e-6 if dtype == torch.float64 else 2e-5  # the clip rules leave a margin of 2e-6
    torch.testing.assert_close(moved, expected / 4, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    others = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert others == {name}


def test_the_clipped_sum_never_exceeds_the_bound_in_the_measured_norm():
    """Planted: an outlier example moves the sum by no more than C, however the frozen factor is scaled."""
    for scale in (0.1, 1.0, 30.0):
        lora_A, lora_B = factors()
        moves = []
        for count in (3, 4):
            model = model_with(lora_A * scale, lora_B)
            optimizer = make_private(
                model, batch_size=1, size=4, max_grad_norm=0.5, phases="B", regulate_noise=True, loss_reduction="sum"
            )
            x = torch.randn(4, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            x[3] *= 1e4
            before = model[0].lora_B.detach().clone()
            optimizer.batch.expect(count)
            square_loss(model, x[:count]).backward()
            optimizer.step()
            moves.append(before - model[0].lora_B.detach())
        outlier = (moves[1] - moves[0]) @ lora_A * scale
        assert 0.4 < float(outlier.norm()) <= 0.5


@pytest.mark.slow
def test_the_noise_has_the_regulated_covariance():
    """A row of B's noise has covariance σ²C²(AAᵀ + ρI)⁻¹."""
    lora_A, lora_B = factors()
    model = model_with(lora_A, lora_B)
    optimizer = make_private(
        model, batch_size=1, size=2, noise_multiplier=2.0, max_grad_norm=0.5, phases="B", regulate_noise=True
    )
    rows = []
    for _ in range(1500):
        before = model[0].lora_B.detach().clone()
        optimizer.step_on_empty_batch()
        rows.append(before - model[0].lora_B.detach())
    drawn = torch.cat(rows)  # 12,000 rows
    found = drawn.t() @ drawn / len(drawn)
    gram = lora_A @ lora_A.t()
    expected = (gram + RIDGE * gram.diagonal().mean() * torch.eye(3, dtype=torch.float64)).inverse()
    deviation = expected.diagonal().sqrt()
    torch.testing.assert_close(
        found / deviation / deviation[:, None],
        expected / deviation / deviation[:, None],
        rtol=0,
        atol=5 * (2 / len(drawn)) ** 0.5,
    )


def test_a_cycle_of_phases_regulates_each_by_the_other():
    lora_A, lora_B = factors()
    model = model_with(lora_A, lora_B)
    optimizer = make_private(model, batch_size=1, size=2, phases="BA", regulate_noise=True)
    layer = model[0]
    for step in range(4):
        trained = "BA"[step % 2]
        frozen = layer.lora_A if trained == "B" else layer.lora_B
        assert layer.regulator.trained == trained
        assert optimizer.regulators == {id(layer.lora_B if trained == "B" else layer.lora_A): layer.regulator}
        torch.testing.assert_close(layer.regulator.root, Regulator.beside(trained, frozen).root)
        optimizer.batch.expect(2)
        square_loss(model, torch.randn(2, 5, 10, dtype=torch.float64)).mean().backward()
        optimizer.step()


def test_another_optimizer_of_the_same_model_is_not_regulated():
    model = model_with(*factors())
    make_private(model, batch_size=1, size=2, phases="B", regulate_noise=True)
    assert model[0].regulator is not None
    make_private(model, batch_size=1, size=2, phases="B")
    assert model[0].regulator is None


def test_both_factors_in_one_step_are_refused():
    model = model_with(*factors())
    with pytest.raises(ValueError, match="not phases 'AB'"):
        make_private(model, batch_size=1, size=2, phases="AB", regulate_noise=True)
    optimizer = make_private(model, batch_size=1, size=2, phases="B", regulate_noise=True)
    with pytest.raises(ValueError, match="not phases 'AB'"):
        optimizer.set_phases("AB")


def test_evaluation_is_not_touched():
    lora_A, lora_B = factors()
    model = model_with(lora_A, lora_B)
    x = torch.randn(4, 5, 10, dtype=torch.float64)
    before = model(x)
    make_private(model, batch_size=1, size=2, phases="B", regulate_noise=True)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert model.eval()(x).equal(before)
