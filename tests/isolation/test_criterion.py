"""What a criterion and losses of the model's own make of padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from tests.isolation.token_models import Tokens, padded


@pytest.mark.slow
@pytest.mark.parametrize("over", ["own", "all"])
@pytest.mark.parametrize(
    ("join", "reduction"),
    [(Tensor.mean, "mean"), (Tensor.sum, "sum"), (Tensor.clone, "mean"), (Tensor.clone, "sum"), (Tensor.clone, None)],
)
def test_a_criterion_is_held_to_padding(over, join, reduction):
    """Though no output that the model returned shows it."""

    class Logits(Tokens):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, attention_mask)["logits"]

    def criterion(out: Tensor, mask: Tensor) -> Tensor:
        total = (out * mask.unsqueeze(2)).square().sum((1, 2))
        return join(total / (mask.sum(1) if over == "own" else out.shape[1]))

    for n in (3, 4):
        batch = padded(n)
        options: Any = {"targets": batch["attention_mask"], "criterion": criterion, "reduction": reduction}
        if over == "own":
            assert check_isolation(Logits().train(), (), batch, n, **options).losses == {0}
        else:
            with pytest.raises(IsolationError, match="gradient at 'inner' of example . changes with the padding"):
                check_isolation(Logits().train(), (), batch, n, **options)


@pytest.mark.parametrize("left", [False, True])
def test_a_sum_over_padding_too_is_refused(left):
    """At an example's own tokens nothing changes; what padding adds to its gradient grows with the longest."""

    def criterion(out: Any, mask: Tensor) -> Tensor:
        return out["logits"].square().sum((1, 2))

    for n in (2, 4):
        with pytest.raises(IsolationError, match="gradient at 'inner' of example . changes with the padding"):
            check_isolation(
                Tokens().train(), (), padded(n, left), n, targets=padded(n, left)["attention_mask"], criterion=criterion
            )


@pytest.mark.parametrize("masked", [True, False])
def test_several_rows_of_an_example_that_are_no_tokens_are_held_to_padding(masked):
    """Beside a table with as many rows as a batch has tokens, which fits no other batch."""

    class Pooled(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.extra = DPLinear(6, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
            self.extra(torch.ones(len(x) if len(x) == 4 else 3, 6))
            weights = attention_mask if masked else torch.ones_like(attention_mask)
            pooled = (self.inner(x) * weights.unsqueeze(2)).sum(1) / weights.sum(1, keepdim=True)
            return {
                "table": torch.ones(4 * x.shape[1] if len(x) == 4 else 28, 3),
                "odd": torch.ones(6, 1),
                "pooled": pooled.repeat_interleave(2, 0),
            }

    if masked:
        assert check_isolation(Pooled().train(), (), padded(4), 4).padding
    else:
        with pytest.raises(IsolationError, match="output of example . changes with the padding"):
            check_isolation(Pooled().train(), (), padded(4), 4)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (lambda out, own: own.square().mean(), None),
        (lambda out, own: out.mean((0, 1)).square().sum(), ""),
        (lambda out, own: out.square().sum((1, 2)).mean(), "changes with the padding"),
    ],
)
def test_of_a_second_loss_only_what_keeps_examples_apart_is_held_to_padding(second, words):
    class Two(Tokens):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
            out = self.inner(x)
            own = (out * attention_mask.unsqueeze(2)).square().sum((1, 2)) / attention_mask.sum(1)
            return {"loss": own.mean(), "second": second(out, own)}

    if words:
        with pytest.raises(IsolationError, match=words):
            check_isolation(Two().train(), (), padded(4), 4, reduction="mean")
    else:
        passed = check_isolation(Two().train(), (), padded(4), 4, reduction="mean")
        assert passed.padding and passed.losses == ({0, 1} if words is None else {0})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_that_was_not_said_to_be_a_mean_or_a_sum_may_be_either(reduction):
    model = Tokens(reduction=reduction).train()
    assert check_isolation(model, (), padded(4), 4).losses == {0}
