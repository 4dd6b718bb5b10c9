"""The private gradient without noise equals a float64 loop over examples: one layer, then whole models."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear, LoRAConfig, inject_lora
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear
from tests.support import RULES, assert_close, brute_force, clip_and_sum, make_private, private_gradients
from tests.tiny_models import HEADS, IMAGES, KINDS, build


def trained_names(model: nn.Module, factors: str) -> set[str]:
    dropped = {"A": "lora_B", "B": "lora_A"}.get(factors)
    return {name for name, p in model.named_parameters() if p.requires_grad and not name.endswith(dropped or "-")}


def fill_lora_b(model: nn.Module) -> None:
    """B starts at zero, which would make every gradient of A zero."""
    for module in model.modules():
        if isinstance(module, DPLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)


def compare(
    model: nn.Module,
    batch: Any,
    take: Any,
    loss: Any,
    n: int,
    phases: str,
    rule: str,
    method: str,
    reduction: str = "mean",
    bound: float = 0.5,
) -> None:
    """One private step on ``batch`` against the oracle on ``take(batch, i)``."""
    step_loss = loss if reduction == "mean" else (lambda m, b: loss(m, b) * n)
    options = {"phases": phases, "clipping": rule, "loss_reduction": reduction, "norm_method": method}
    expected_batch = max(n, 1)
    gradients = brute_force(model, loss, [take(batch, i) for i in range(n)], trained_names(model, phases))
    optimizer = make_private(model, batch_size=expected_batch, max_grad_norm=bound, lr=0.0, **options)
    optimizer.batch.expect(n)
    step_loss(model, batch).backward()
    optimizer.step()
    actual = private_gradients(model)
    assert set(actual) == trained_names(model, phases)
    if n == 0:
        assert all(not gradient.any() for gradient in actual.values())
        return
    terms = [joined(clip_and_sum([gradient], rule, bound, layer_of)) / expected_batch for gradient in gradients]
    try:
        assert_close(joined(actual), torch.stack(terms).sum(0), scale=sum(float(term.norm()) for term in terms))
    except AssertionError:
        # Inside one example's gradient terms may cancel, in torch's own backward too: no closer than that is asked.
        examples = [take(batch, i) for i in range(n)]
        plain = brute_force(model, loss, examples, trained_names(model, phases), torch.float32)
        theirs = [joined(clip_and_sum([gradient], rule, bound, layer_of)) / expected_batch for gradient in plain]
        error = sum(float((a.double() - b.double()).norm()) for a, b in zip(theirs, terms, strict=True))
        assert float((joined(actual).double() - torch.stack(terms).sum(0)).norm()) <= 4 * error


def joined(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


class OneLayer(nn.Module):
    """Rows of several leading dimensions through one private layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def slice_of(batch: Tensor, i: int) -> Tensor:
    return batch[i : i + 1]


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, batch.shape[1:-1].numel()).view(*batch.shape[1:-1], 1).to(batch)
    out = model(batch.double() if next(model.parameters()).dtype == torch.float64 else batch)
    return ((out * weights).sum(-1).square()).flatten(1).sum(1).sum() / max(len(batch), 1)


def squared_norm(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch.to(next(model.parameters()))).square().sum((1, 2)).mean()


# Of adapters and their inputs.
SIZES = {
    "n": st.integers(0, 6),
    "tokens": st.lists(st.integers(1, 5), min_size=1, max_size=2),
    "d_in": st.integers(1, 17),
    "d_out": st.integers(1, 17),
    "r": st.integers(1, 4),
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    **SIZES,
    phases=st.sampled_from(["A", "B", "AB"]),
    rule=st.sampled_from(RULES),
    method=st.sampled_from(["auto", "direct", "ghost"]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**16),
)
def test_lora_linear(n, tokens, d_in, d_out, r, phases, rule, method, reduction, seed):
    torch.manual_seed(seed)
    model = OneLayer(DPLoRALinear(d_in, d_out, r=min(r, d_in, d_out), alpha=3))
    fill_lora_b(model)
    compare(model, torch.randn(n, *tokens, d_in), slice_of, mean_square, n, phases, rule, method, reduction)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    **SIZES,
    rule=st.sampled_from(RULES),
    method=st.sampled_from(["auto", "direct", "ghost"]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_lora_xs_linear(n, tokens, d_in, d_out, r, rule, method, bias, transposed):
    torch.manual_seed(n + 10 * d_in + 100 * d_out)
    layer = DPLoRAXSLinear(d_in, d_out, r=min(r, d_in, d_out), alpha=3, fan_in_fan_out=transposed)
    layer.bias.requires_grad_(bias)
    nn.init.normal_(layer.lora_R, std=0.5)
    compare(OneLayer(layer), torch.randn(n, *tokens, d_in), slice_of, mean_square, n, "AB", rule, method)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    **SIZES,
    rule=st.sampled_from(RULES),
    method=st.sampled_from(["auto", "direct", "ghost"]),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_lora_tangent_linear(n, tokens, d_in, d_out, r, rule, method, bias, transposed):
    torch.manual_seed(n + 10 * d_in + 100 * d_out)
    layer = DPLoRATangentLinear(d_in, d_out, r=min(r, d_in, d_out), alpha=3, fan_in_fan_out=transposed)
    layer.bias.requires_grad_(bias)
    nn.init.orthogonal_(layer.lora_B)
    for coordinates in (layer.lora_dA, layer.lora_dB):
        nn.init.normal_(coordinates, std=0.5)
    compare(OneLayer(layer), torch.randn(n, *tokens, d_in), slice_of, mean_square, n, "AB", rule, method)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 5),
    tokens=st.integers(1, 6),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    rule=st.sampled_from(RULES),
    method=st.sampled_from(["direct", "ghost"]),
    transposed=st.booleans(),
)
def test_full_rank_linear(n, tokens, d_in, d_out, rule, method, transposed):
    torch.manual_seed(n + 10 * tokens)
    model = OneLayer(DPLinear(d_in, d_out, fan_in_fan_out=transposed))
    compare(model, torch.randn(n, tokens, d_in), slice_of, mean_square, n, "AB", rule, method)


@pytest.mark.parametrize("rule", RULES)
def test_plain_vectors(rule):
    torch.manual_seed(0)
    model = OneLayer(nn.Sequential(DPLoRALinear(7, 5, r=2), DPLayerNorm(5), DPLinear(5, 3)))
    fill_lora_b(model)
    compare(model, torch.randn(4, 1, 7), slice_of, mean_square, 4, "AB", rule, "auto")


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 6), (3, 2, 4, 6)])
def test_layer_norm(shape):
    torch.manual_seed(0)
    model = OneLayer(nn.Sequential(DPLinear(6, 6), DPLayerNorm(6)))
    nn.init.normal_(model.layer[1].weight)
    batch = torch.randn(shape) if len(shape) > 2 else torch.randn(shape).unsqueeze(1)
    compare(model, batch, slice_of, mean_square, 3, "AB", "flat", "auto")


@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_embedding_with_repeated_and_padding_tokens(method):
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = DPEmbedding(5, 4, padding_idx=0)
            self.head = DPLinear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids).tanh().sum(1))

    batch = torch.tensor([[1, 1, 2, 0], [3, 3, 3, 3], [0, 0, 4, 1]])
    compare(Tokens(), batch, slice_of, lambda m, b: m(b).square().sum(1).mean(), 3, "AB", "flat", method)


@pytest.mark.parametrize("method", ["auto", "direct", "ghost"])
@pytest.mark.parametrize("phases", ["A", "B", "AB"])
def test_adapter_used_twice_with_different_lengths(phases, method):
    """Per-example gradients of both uses add up before the norm."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = DPLoRALinear(6, 6, r=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x))[:, :2])

    model = Twice()
    fill_lora_b(model)
    compare(model, torch.randn(4, 5, 6), slice_of, squared_norm, 4, phases, "flat", method, bound=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DPLinear(6, 6)
            self.layer = DPLoRALinear(6, 6, r=2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if not torch.is_grad_enabled():
                return self.layer(hidden).tanh()
            return checkpoint(lambda h: self.layer(h).tanh(), hidden, use_reentrant=reentrant)

    model = Checkpointed()
    fill_lora_b(model)
    compare(model, torch.randn(4, 3, 6), slice_of, squared_norm, 4, "AB", "flat", "auto")


def adapted(kind: str) -> nn.Module:
    model = inject_lora(build(kind), LoRAConfig(r=2, alpha=4, trainable_modules=[HEADS[kind]]))
    fill_lora_b(model)
    return model.train()


def batch_for(kind: str) -> dict[str, Tensor]:
    n = 4
    labels = torch.randint(3, (n,))
    if kind in IMAGES:
        return {"images": torch.randn(n, 1, 16, 16), "labels": labels}
    ids = torch.randint(1, 40, (n, 7))
    mask = torch.ones_like(ids)
    # GPT-2 and Llama pick the last token that is no padding: pad on the right, one example not at all.
    for row, length in enumerate((7, 5, 3, 6)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def cross_entropy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    if "images" in batch:
        out = model(batch["images"].to(dtype))
    else:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, batch["labels"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("phases", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_model(kind, phases, rule):
    model = adapted(kind)
    compare(
        model,
        batch_for(kind),
        lambda b, i: {k: v[i : i + 1] for k, v in b.items()},
        cross_entropy,
        4,
        phases,
        rule,
        "auto",
        bound=0.3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["direct", "ghost"])
def test_model_with_either_norm_forced(method):
    model = adapted("timm_swin")
    compare(
        model,
        batch_for("timm_swin"),
        lambda b, i: {k: v[i : i + 1] for k, v in b.items()},
        cross_entropy,
        4,
        "AB",
        "flat",
        method,
        bound=0.3,
    )
