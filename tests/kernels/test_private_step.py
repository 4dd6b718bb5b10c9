"""Whole private steps by the kernels against the same steps by the plain-torch reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, GaussianFilter, LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.engine import fused_step
from lora_dp.ops import registry
from lora_dp.ops.lora_backward import lora_backward
from lora_dp.ops.lora_forward import lora_forward
from lora_dp.ops.per_example_grad import per_example_grad, per_example_grad_and_u
from lora_dp.ops.per_example_norm import ghost_sq_norm
from lora_dp.ops.registry import kernels_take, reference_only
from lora_dp.privacy import mechanism
from lora_dp.privacy.mechanism import Mechanism
from tests.models import examples, mlp, snapshot
from tests.support import RULES, assert_close, make_private, private_gradients
from tests.tiny_models import HEADS, IMAGES, TARGETS, build, randomise


def released(model: nn.Module, x: Tensor, y: Tensor, mask: Tensor | None = None, **options) -> dict[str, Tensor]:
    optimizer = make_private(model, batch_size=len(x), engine=PrivacyEngine("rdp"), lr=0.0, **options)
    optimizer.batch.expect(len(x))
    out = model(x)
    F.cross_entropy(getattr(out, "logits", out), y).backward()
    optimizer.step(mask=mask)
    return private_gradients(model)


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert ours.keys() == reference.keys()
    for name, value in reference.items():
        assert_close(ours[name].cpu(), value.cpu(), relative)


def noting(kernel: Callable[..., Any], name: str, seen: list[str]) -> Callable[..., Any]:
    def noted(*args: Any, **options: Any) -> Any:
        seen.append(name)
        return kernel(*args, **options)

    return noted


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that kernels ran."""
    seen: list[str] = []
    from lora_dp.kernels import adapted_product, clip_sum, example_grad, gram, low_rank_update, noise_update

    for module, name in (
        (adapted_product, "adapted_product"),
        (clip_sum, "clip_sum"),
        (example_grad, "example_grad"),
        (gram, "gram_sq_norm"),
        (low_rank_update, "add_low_rank_"),
        (noise_update, "noise_update"),
    ):
        monkeypatch.setattr(module, name, noting(getattr(module, name), name, seen))
    return seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("phases", ["B", "A", "AB"])
def test_step_of_an_mlp(device, launches, phases, rule):
    x, y = (tensor.to(device) for tensor in examples(6))
    mask = torch.tensor([True, False, True, True, True, False], device=device)
    options = {"phases": phases, "clipping": rule, "max_grad_norm": 0.3}
    ours = released(mlp().to(device), x, y, mask, **options)
    assert "clip_sum" in launches
    with reference_only():
        assert_same(ours, released(mlp().to(device), x, y, mask, **options))


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_both_norm_methods(device, launches, method):
    x, y = (tensor.to(device) for tensor in examples(5))
    ours = released(mlp().to(device), x, y, norm_method=method, max_grad_norm=0.3)
    assert ("example_grad" if method == "direct" else "gram_sq_norm") in launches
    with reference_only():
        assert_same(ours, released(mlp().to(device), x, y, norm_method=method, max_grad_norm=0.3))


@pytest.mark.parametrize("kind", ["roberta", "timm_swin", "gpt2"])
def test_step_of_a_model(device, launches, kind):
    """Swin's windows are grouped by example; GPT-2's weights are stored transposed."""

    def model() -> nn.Module:
        return (
            randomise(
                inject_lora(build(kind), LoRAConfig(r=3, target_modules=TARGETS[kind], trainable_modules=[HEADS[kind]]))
            )
            .train()
            .to(device)
        )

    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(3, 1, 16, 16, generator=generator)
        if kind in IMAGES
        else torch.randint(1, 40, (3, 7), generator=generator)
    ).to(device)
    y = torch.tensor([0, 1, 2], device=device)
    ours = released(model(), x, y, phases="AB", norm_method="direct")
    assert {"adapted_product", "example_grad", "clip_sum"} <= set(launches)
    with reference_only():
        assert_same(ours, released(model(), x, y, phases="AB", norm_method="direct"), 1e-3)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine whose install found no CUDA compiler: the update falls to the Triton kernel."""
    monkeypatch.setattr(fused_step, "can_update", lambda parameter, strength: False)


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.1)


def test_the_kernels_noise_is_that_of_all_parameters_together(device, launches, without_native, monkeypatch):
    """Of a sum of as many numbers as all of them have, whatever the largest has."""
    sizes, std = [], Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda own, size: (sizes.append(size), std(own, size))[1])
    model = mlp().to(device)
    optimizer = make_private(
        model, batch_size=6, noise_multiplier=1.0, phases="AB", engine=PrivacyEngine("rdp", reproducible_seed=0)
    )
    optimizer.step_on_empty_batch()
    assert "noise_update" in launches
    assert set(sizes) == {sum(p.numel() for p in model.parameters() if p.requires_grad)}


@pytest.mark.parametrize("make", [adamw, torch.optim.Adam, torch.optim.SGD, momentum])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_update_in_one_launch(device, launches, without_native, make, strength):
    """Without noise, the fused step is torch's optimizer after the filter; its state goes on in torch."""
    ends = []
    for fused in (True, False):
        model = mlp().to(device)
        low_pass = GaussianFilter(strength) if strength else None
        optimizer = make_private(model, batch_size=4, phases="BA", low_pass=low_pass)
        optimizer.original_optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for step in range(5):
            x, y = (tensor.to(device) for tensor in examples(4, step))
            optimizer.batch.expect(4)
            F.cross_entropy(model(x), y).backward()
            # The last step is torch's own, with the state that the launches left.
            if fused and step < 4:
                optimizer.step()
            else:
                with reference_only():
                    optimizer.step()
            optimizer.zero_grad()
        ends.append(snapshot(model))
    assert launches.count("noise_update") == 4
    assert_same(*ends)


def test_noise_of_the_launch(device, launches, without_native):
    """Its deviation; the same seed repeats it, another step or seed does not; a resumed source goes on."""

    def run(seed: int, resume: bool = False) -> Tensor:
        model, engine = mlp().to(device), PrivacyEngine("rdp", reproducible_seed=seed)
        optimizer = make_private(model, batch_size=1, engine=engine, noise_multiplier=2.0, max_grad_norm=3.0, lr=1.0)
        before, rows = snapshot(model), []
        for step in range(16):
            if resume and step == 8:
                state = engine.state_dict()
                engine.source.next_counter()
                engine.source.load_state_dict(state["source"])
            optimizer.step_on_empty_batch()
            after = snapshot(model)
            rows.append(torch.cat([(before[name] - after[name]).flatten() for name in after]))
            before = after
        moved = torch.stack(rows).cpu()
        return moved[:, moved[0] != 0]

    noise = run(1)
    assert launches.count("noise_update") == 16
    assert noise.shape == (16, 55)
    assert torch.equal(noise, run(1)) and torch.equal(noise, run(1, resume=True))
    assert not torch.isclose(noise, run(2)).any(1).all()
    assert float(noise.std()) == pytest.approx(6.0, rel=0.13)
    assert float(torch.corrcoef(noise).fill_diagonal_(0).abs().max()) < 0.75


def test_a_sum_that_is_formed_late_or_of_an_unused_layer(device, launches, without_native, monkeypatch):
    """Neither that of a batch which the reference clipped, nor zeros in another dtype, keep the launch from a step."""
    ends = []
    for by_reference in (False, True):
        model = nn.ModuleDict({"used": mlp(), "unused": DPLinear(6, 3)}).to(device).train()
        monkeypatch.setattr(model, "forward", lambda x, model=model: model["used"](x))
        optimizer = make_private(model, batch_size=4, max_grad_norm=0.3)
        if by_reference:
            monkeypatch.setattr(mechanism, "can_clip_and_sum", lambda gradients, sq_norms: False)
        x, y = (tensor.to(device) for tensor in examples(4))
        optimizer.batch.expect(4)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        ends.append(snapshot(model))
    assert launches.count("noise_update") == 2 and launches.count("clip_sum") == 1
    assert_same(*ends)


def test_a_parameter_of_another_layout_is_left_to_torch(device, launches, without_native):
    model = mlp().to(device)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    optimizer = make_private(model, batch_size=4)
    optimizer.step_on_empty_batch()
    assert "noise_update" not in launches and optimizer.steps_taken == 1


def test_the_default_dtype_does_not_matter(device, launches, without_native):
    optimizer = make_private(mlp().to(device), batch_size=4, noise_multiplier=1.0)
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.step_on_empty_batch()
    finally:
        torch.set_default_dtype(torch.float32)
    assert "noise_update" in launches


def test_cryptographic_noise_does_not_take_the_launch(device, launches, without_native):
    optimizer = make_private(mlp().to(device), batch_size=4, engine=PrivacyEngine("rdp"), noise_multiplier=1.0)
    optimizer.step_on_empty_batch()
    assert "noise_update" not in launches


def test_a_seed_of_64_bits(device, launches, without_native):
    engine = PrivacyEngine("rdp", reproducible_seed=2**64 - 1)
    optimizer = make_private(mlp().to(device), batch_size=4, engine=engine, noise_multiplier=1.0)
    optimizer.step_on_empty_batch()
    assert "noise_update" in launches


def test_half_precision_parameters_keep_torchs_optimizer(device, launches, without_native):
    """Whose state is in the parameter's dtype: the launch's would be float32, and not resume bit for bit."""
    optimizer = make_private(mlp(dtype=torch.bfloat16).to(device), batch_size=4, noise_multiplier=1.0)
    optimizer.step_on_empty_batch()
    assert "noise_update" not in launches


def test_ranks_beyond_the_kernels(device):
    torch.manual_seed(0)
    x, g, weight = (torch.randn(shape, device=device) for shape in ((4, 320), (4, 310), (310, 320)))
    a, b = torch.randn(300, 320, device=device), torch.randn(310, 300, device=device)
    for call in (lambda: lora_forward(x, weight, None, a, b, 0.5), lambda: lora_backward(g, weight, a, b, 0.5)):
        ours = call()
        with reference_only():
            close(ours, call(), 1e-5)


@pytest.mark.parametrize("phases", ["B", "A"])
def test_backward_inside_autocast(device, phases):
    """A forward in float32 keeps float32 in its backward."""
    sums = []
    for inside in (False, True):
        model, (x, y) = mlp().to(device), (tensor.to(device) for tensor in examples(4))
        optimizer = make_private(model, batch_size=4, phases=phases, engine=PrivacyEngine("rdp"), lr=0.0)
        optimizer.batch.expect(4)
        out = F.cross_entropy(model(x), y)
        with torch.autocast(device.type, torch.bfloat16, enabled=inside):
            out.backward()
        optimizer.step()
        sums.append(private_gradients(model))
    assert_same(sums[1], sums[0], 1e-7)


def close(ours: tuple[Tensor, ...], reference: tuple[Tensor, ...], relative: float) -> None:
    for mine, expected in zip(ours, reference, strict=True):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape
        assert mine.is_contiguous() and expected.is_contiguous()
        assert_close(mine, expected, relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r", [1, 5, 20])
def test_ops(device, dtype, r):
    """Every op by its kernel, as the layers call it, against its reference: values, dtypes, shapes and strides."""
    torch.manual_seed(0)
    n, tokens, d_in, d_out = 3, 6, 24, 17
    x, g = (torch.randn(n * tokens, d).to(device, dtype) for d in (d_in, d_out))
    weight, bias = torch.randn(d_out, d_in).to(device, dtype), torch.randn(d_out).to(device, dtype)
    a, b = torch.randn(r, d_in).to(device, dtype), torch.randn(d_out, r).to(device, dtype)
    wide, skinny = g.view(n, tokens, d_out), torch.randn(n, tokens, r).to(device, dtype)
    u = torch.randn(n * tokens, r).to(device, dtype)
    relative = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert kernels_take(x)
    for call in (
        lambda: lora_forward(x, weight, bias, a, b, 0.5),
        lambda: lora_forward(x, weight.t().contiguous().t(), None, a, b, 0.5),
        lambda: lora_forward(x, None, None, a, b, 0.5),
        lambda: lora_backward(g, weight, a, b, 0.5),
        lambda: lora_backward(g, None, a, b, 0.5),
        lambda: lora_backward(g, weight, a, b, 0.5, u),
        lambda: per_example_grad(wide, skinny, 0.5),
        lambda: per_example_grad(skinny, wide, 0.5),
        lambda: per_example_grad_and_u(wide, skinny, b, 0.5),
        lambda: (ghost_sq_norm(wide, skinny, 0.5),),
    ):
        ours = call()
        with reference_only():
            close(ours, call(), relative)


def test_float64_is_the_references(device):
    assert not kernels_take(torch.zeros(1, dtype=torch.float64, device=device))
    with reference_only():
        assert not kernels_take(torch.zeros(1, device=device))
    assert registry._reference_only is False
