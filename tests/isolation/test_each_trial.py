"""What one trial of the isolation check alone tells: each kind of mixing that the other trials do not show."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPEmbedding, DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from tests.isolation.checked_models import Function, Made, passes
from tests.isolation.token_models import Tokens, padded, refused
from tests.models import examples, mlp

TAKEN: dict[str, Function] = {
    "plain": lambda other: other,
    "a constant": lambda other: other.detach(),
    "a gradient": lambda other: other - other.detach(),
}


def neighbourly(place: int, other: int, kind: str, share: float = 1.0) -> Function:
    """One example takes something of another one: only a trial of this very example shows it."""

    def taking(out: Tensor) -> Tensor:
        alone = (torch.arange(len(out)) == place).view(-1, *[1] * (out.dim() - 1))
        return out + share * alone * TAKEN[kind](out[other % len(out)])

    return taking


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", TAKEN)
def test_what_the_first_or_the_last_takes_of_one_other_is_refused(kind, n):
    for place, other in ((0, 1), (0, n - 1), (n - 1, n - 2), (n - 1, 0)):
        refused(
            "attributed to other examples" if kind == "a gradient" else f"example {place}",
            Made(neighbourly(place, other, kind)),
            n,
            examples(n)[0],
        )


def test_under_autocast_what_its_rounding_would_hide_is_refused():
    x = examples(4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        refused("example 0", Made(neighbourly(0, 1, "plain", share=1e-3)), 4, x)
        assert torch.is_autocast_enabled("cpu")
        passes(mlp(), 4, x.bfloat16())  # weights of float32 take them under autocast alone


@pytest.mark.parametrize(("place", "other"), [(0, 1), (3, 2)])
@pytest.mark.parametrize("kind", TAKEN)
def test_examples_of_unequal_groups_are_held_to_it_too(kind, place, other):
    """Rows of all examples lie in one tensor; neither the least nor the largest group takes something."""

    class Pooled(Made):
        def forward(self, x: Tensor, counts: Tensor) -> Any:  # type: ignore[override]
            return super().forward(torch.stack([part.mean(0) for part in x.split(counts.tolist())]))

    x, counts = examples(8)[0], torch.tensor([2, 1, 3, 2])
    refused(f"example {place}", Pooled(neighbourly(place, other, kind)), 4, x, counts)
    passes(Pooled(), 4, x, counts)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("kind", TAKEN)
def test_values_of_any_size_are_held_to_the_same_share(kind, scale):
    def of(share: float) -> nn.Module:
        taking = neighbourly(0, 1, kind, share)
        return Made(lambda out: scale * taking(out))

    refused("example 0", of(1e-2), 4, examples(4)[0])
    passes(of(1e-6), 4)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_of_one_sign_is_seen_and_rounding_of_that_sign_is_none(sign):
    """Values, and gradients of one number for each example, all of one sign."""
    x = torch.tensor([[4.0], [3.0], [2.0], [1.0]]).expand(4, 6)
    for kind, words in (("a constant", "The output for example 0"), ("a gradient", "attributed to other examples")):
        for share in (1e-2, 1e-6):
            taking = neighbourly(0, 1, kind, share)
            model = Made(lambda out, taking=taking: sign * taking(1 + out.abs()), width=1)
            if share == 1e-2:
                refused(words, model, 4, x)
            else:
                passes(model, 4, x)


@pytest.mark.parametrize("after", [lambda out: out.sum(1), lambda out: out[:, :1]])
def test_outputs_of_one_number_are_held_to_it_too(after):
    for place, other in ((0, 1), (3, 2)):
        taking = neighbourly(place, other, "a constant")
        refused(
            f"The output for example {place}", Made(lambda out, taking=taking: taking(after(out))), 4, examples(4)[0]
        )
    refused("changes with the number of examples", Made(lambda out: after(out) / len(out)), 4, examples(4)[0])
    passes(Made(after), 4)


@pytest.mark.parametrize("n", [2, 4])
def test_what_a_layer_without_effect_yet_is_given_is_tried(n):
    """With weights of zero its output tells nothing, and its gradient all the same."""

    def of(before: Function) -> nn.Module:
        model = Made(before=before)
        nn.init.zeros_(model.inner.weight)
        nn.init.zeros_(model.inner.bias)
        return model

    refused(
        "What 'inner' is given of example 0 changes with the other examples",
        of(lambda x: x + x.mean(0)),
        n,
        examples(n)[0],
    )
    refused("What 'inner' is given of example . changes with the number", of(lambda x: x / len(x)), n, examples(n)[0])
    passes(of(lambda x: x.tanh()), n)


def test_tokens_that_follow_other_examples_are_seen_where_they_are_looked_up():
    """Before what comes after lets anything through."""

    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = DPEmbedding(8, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return 0 * self.table((ids + ids.sum(0)) % 8)

    refused("Rows of 'table' attributed to example 0 change", Looked(), 4, torch.arange(12).view(4, 3) % 5)


@pytest.mark.parametrize("n", [2, 4])
def test_tokens_that_an_empty_table_is_given_are_tried(n):
    """A table of zeros, as an adapter begins, looks up the same for all: by its gradient they differ."""

    class Empty(nn.Module):
        def __init__(self, given: Callable[..., Tensor]) -> None:
            super().__init__()
            self.table, self.given = DPEmbedding(60, 6), given
            nn.init.zeros_(self.table.weight)

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.table(self.given(ids, attention_mask)) * attention_mask.unsqueeze(2)

    ids, mask = torch.arange(5 * n).view(n, 5) % 7, torch.ones(n, 5).long()
    refused("What 'table' is given of example 0 changes with the other", Empty(lambda x, _: x + x.sum(0)), n, ids, mask)
    refused("What 'table' is given of example . changes with the number", Empty(lambda x, _: x + len(x)), n, ids, mask)
    for row in range(1, n):
        mask[row, : 1 + row] = 0
    by_mask, by_place = (
        Empty(lambda x, mask: mask.cumsum(1)),
        Empty(lambda x, mask: torch.arange(mask.shape[1]).expand(len(mask), -1)),
    )
    with pytest.raises(IsolationError, match="input of 'table' of example . changes with the padding"):
        check_isolation(by_place, (ids,), {"attention_mask": mask}, n)
    assert check_isolation(by_mask, (ids,), {"attention_mask": mask}, n).padding


def test_a_layer_that_the_batch_does_not_use_mixes_nothing():
    class Unused(Made):
        def forward(self, x: Tensor) -> Any:
            return self.other(x) + 0 * self.inner(x)

    model = Unused()
    model.other = DPLinear(6, 6)
    passes(model, 4)


@pytest.mark.parametrize("share", [1e-5, 2e-6, 4e-8, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_layer_of_a_small_gradient_is_held_to_it_until_rounding_is_all_of_it(sign, share):
    """Below a thousandth of the rounding in the largest gradient, or 1e-7 of it in float32, nothing is told."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.other = DPLinear(6, 3), DPLinear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.other(x)

    def criterion(output: Any, _: Any) -> Tensor:
        large = sign * (output[0] * torch.tensor([0.0, 1.0, 2.0])).sum(1).mean()
        return large + share * output[1].mean(0).square().sum()

    if share > 1e-7:
        refused("The loss mixes examples", Two(), 4, examples(4)[0], criterion=criterion)
    else:
        assert passes(Two(), 4, criterion=criterion).losses == {0}


@pytest.mark.slow
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e12])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out: (out - out.mean(0)).square().mean(),
        lambda out: (out * out.roll(1, 0)).mean(),
        lambda out: out[:, 0].mean() + 1e-3 * (out[:, 1:] - out[:, 1:].roll(1, 0)).tanh().mean(),
    ],
)
def test_an_extreme_example_hides_no_loss_that_mixes(loss, place, value):
    """Nor does what it makes of its own gradients fake one."""
    x = examples(4)[0]
    x[place] = value
    for model in (Made(), Made(lambda out: {"loss": loss(out)})):
        options = {} if isinstance(model(x), dict) else {"criterion": lambda out, _: loss(out)}
        refused("mixes examples", model, 4, x, **options)
    assert passes(Made(), 4, x, criterion=lambda out, _: out.square().mean()).losses == {0}
    assert passes(Made(lambda out: {"loss": out.square().mean()}), 4, x).losses == {0}


def test_an_example_whose_own_gradient_is_nan_takes_nothing_of_others():
    x = examples(4)[0]
    x[0] = torch.nan
    taking = neighbourly(0, 1, "a gradient", 1e-5)
    refused("attributed to other examples", Made(lambda out: taking(out.tanh())), 4, x)


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 8])
@pytest.mark.parametrize(
    ("second", "kept"),
    [
        (lambda out: out.square().mean(), True),
        (lambda out: out.square().sum(), False),
        (lambda out: (out * out.roll(1, 0)).mean(), False),
        (lambda out: out.mean(0).square().sum(), False),
        # In pairs, so that half of a batch has the same company.
        (lambda out: out[: len(out) // 2 * 2].view(-1, 2, 6).prod(1).sum() / len(out), False),
    ],
)
def test_a_second_loss_of_the_model_is_taken_only_if_every_trial_finds_it_apart(second, kept, n):
    """Of three examples, all doubled, a statistic scales as a mean does: nothing is told of a second loss."""
    model = Made(lambda out: {"loss": out.square().mean(), "second": second(out)})
    assert passes(model, n, reduction="mean").losses == ({0, 1} if kept and n > 3 else {0})


@pytest.mark.parametrize("of_all", [True, False])
def test_losses_that_some_examples_have_are_compared_where_they_are(of_all):
    class Conditional(Made):
        def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            out, used = self.inner(x), labels >= 0
            losses = out.square().mean(1) * used
            found = {"loss": losses.mean(), "second": losses.square().mean()} if used.any() else {}
            return {"logits": out, **({"main": out.mean()} if not of_all else {}), **found}

    labels = torch.tensor([-1, 0, 1, 2])
    assert passes(Conditional(), 4, examples(4)[0], labels).losses == ({0, 1} if of_all else {0, 1, 2})


def test_a_buffer_whose_size_follows_the_examples_is_refused():
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("kept", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            self.kept = torch.ones(int((x[:, 0] > 0).sum()))
            return self.inner(x)

    x = examples(4)[0]
    x[:, 0] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    refused("The buffer 'kept' takes up statistics", Keeping(), 4, x)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.from_numpy(np.random.rand(*x.shape[::-1])).t().to(x),
        lambda x: torch.tensor([[random.random() for _ in range(len(x))] for _ in range(6)]).t(),
    ],
)
def test_what_numpy_and_python_draw_is_compared_in_batches_of_one_shape(draw):
    """Masks of another shape are others: neither the number of examples nor their padding can be tried."""
    model = Made(before=lambda x: x * draw(x) if x.dim() == 2 else x)
    assert not passes(model, 4, criterion=lambda out, _: out.square().mean(), padding_varies=True).padding
    mixing = Made(lambda out: out - out.mean(0), before=lambda x: x * draw(x))
    refused("example", mixing, 4, examples(4)[0])

    class Drawn(Tokens):
        def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return super().forward(
                x * draw(x[:, :, 0].flatten().unsqueeze(1))[:, :1].view(*x.shape[:2], 1), attention_mask
            )

    passed = check_isolation(Drawn().train(), (), padded(4), 4, reduction="mean", padding_varies=True)
    assert passed.losses == {0} and not passed.padding


def test_what_is_taken_from_another_row_with_one_sign_is_refused():
    """Whatever the signs of the random weights by which the trial adds up outputs."""
    for _ in range(12):
        refused("attributed to other examples", Made(lambda out: out[:, :1] + out.flip(0)[:, :1]), 4, examples(4)[0])


@pytest.mark.parametrize("n", [4, 8])
def test_a_random_order_of_the_batch_is_refused(n):
    """Without chance everybody would be his own partner."""
    # One order in twelve leaves the first and the last example of four where they are.
    refused(
        "attributed to other examples",
        Made(lambda out: out + out[torch.randperm(len(out))]),
        n,
        examples(n)[0],
        draws=9,
    )


# What the layers of a model are to a trial


def test_a_block_that_mixes_by_itself_is_named():
    class Block(Made):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).sub(x.mean(0))

    refused(
        "the first module where this is seen is '0'",
        nn.Sequential(Block().requires_grad_(False), nn.Tanh(), DPLinear(6, 3)),
        4,
        examples(4)[0],
    )


def test_a_module_that_gives_one_number_is_passed_over_where_the_first_that_mixes_is_named():
    class Block(Made):
        def __init__(self) -> None:
            super().__init__()
            self.error, self.centre = nn.MSELoss(), nn.Identity()

        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                self.error(x, 0 * x)
            return self.inner(self.centre(x - x.mean(0)))

    refused("the first module where this is seen is 'centre'", Block(), 4, examples(4)[0])
