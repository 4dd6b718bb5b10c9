"""Models in half precision are tried in full: rounding is no influence, and hides none."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import IsolationError, LoRAConfig, inject_lora
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.full_precision import in_full_precision
from lora_dp.losses import causal_lm_loss
from tests.isolation.checked_models import Made, passes
from tests.isolation.test_each_trial import neighbourly
from tests.isolation.token_models import refused
from tests.language_models import ATTENTION, FAMILIES, causal_lm, completions, stacked
from tests.models import examples

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def products() -> Iterator[Any]:
    """Where a processor or a GPU may round, as it was after the test."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_of_half_precision_is_taken(family: str) -> None:
    """Its weights are so large that rounding moves values by more than 2 % where a batch has another shape."""
    model = inject_lora(causal_lm(family, torch.bfloat16), LoRAConfig(r=2, target_modules=ATTENTION[family]))
    batch = stacked(completions(6))
    passed = check_isolation(
        model.train(),
        (),
        {"use_cache": False, **{name: values for name, values in batch.items() if name != "labels"}},
        6,
        targets=batch["labels"],
        criterion=lambda outputs, labels: causal_lm_loss(outputs.logits, labels),
    )
    assert passed.padding


@pytest.mark.parametrize("dtype", HALVES)
def test_an_influence_below_its_rounding_is_seen(dtype: torch.dtype) -> None:
    refused("example 0", Made(neighbourly(0, 1, "plain", share=1e-3)).to(dtype), 4, examples(4)[0].to(dtype))
    passes(Made().to(dtype), 4, examples(4)[0].to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_model_is_as_it_was_after(dtype: torch.dtype) -> None:
    model = Made().to(dtype)
    model.register_buffer("kept", torch.ones(2, dtype=dtype))
    model.again = model.inner  # tied
    before = [*model.parameters(), *model.buffers()]

    def look(call: Any) -> None:
        assert {tensor.dtype for tensor in [*model.parameters(), *model.buffers(), call]} == {torch.float32}
        assert model.again.weight is model.inner.weight and model.inner.weight.requires_grad
        raise IsolationError("found")

    with pytest.raises(IsolationError, match=r"^found$"):
        in_full_precision(model, torch.ones(2, dtype=dtype), look)
    assert all(now is then for now, then in zip([*model.parameters(), *model.buffers()], before, strict=True))


class Picky(Made):
    """A kernel that takes half precision alone."""

    def forward(self, x: Tensor) -> Any:
        if x.dtype == torch.float32:
            raise TypeError("float32 is not taken")
        return super().forward(x)


def test_a_model_that_takes_half_precision_alone_is_tried_as_it_is() -> None:
    x = examples(4)[0].bfloat16()
    passes(Picky().bfloat16(), 4, x)
    refused("example 0 .*Tried in half precision, .*TypeError", Picky(neighbourly(0, 1, "plain")).bfloat16(), 4, x)


def test_an_error_of_a_model_in_float32_is_its_own() -> None:
    calls = []

    def fails(call: Any) -> None:
        calls.append(call)
        raise TypeError("another")

    with pytest.raises(TypeError, match="another"):
        in_full_precision(nn.Linear(4, 2), torch.ones(1), fails)
    assert len(calls) == 1


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_products_are_exact_in_a_trial_and_as_they_were_after(products: Any, precision: str) -> None:
    products.fp32_precision = precision
    within = in_full_precision(nn.Linear(4, 2), None, lambda _: products.fp32_precision)
    assert (within, products.fp32_precision) == ("ieee", precision)
    with pytest.raises(IsolationError):
        in_full_precision(nn.Linear(4, 2), None, lambda _: (_ for _ in ()).throw(IsolationError("found")))
    assert products.fp32_precision == precision
