"""What only many examples do to each other, and what hides behind large scores."""

import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.other_batches import _compare_part
from lora_dp.isolation.trials import LayerRows, Quiet
from tests.models import Drawing, assert_refuses, examples, mlp, set_up, texts
from tests.support import make_private

N = 24


class Capacity(nn.Module):
    """Experts of a mixture, each of which takes so many examples and drops the rest."""

    def __init__(self, capacity: int | None):
        super().__init__()
        self.inner, self.capacity = mlp(), capacity
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        result = torch.zeros_like(out)
        for number, expert in enumerate(self.experts):
            own = ((out[:, 0] > 0).long() == number).nonzero()[:, 0][: self.capacity]
            result = result.index_add(0, own, expert(out[own]))
        return result


def test_a_capacity_that_many_fill_together_is_refused():
    """Four examples of a trial fill no expert."""
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Capacity(5).train(), (examples(N)[0],), {}, N),
    )
    check_isolation(Capacity(None).train(), (examples(N)[0],), {}, N)


class Placed(nn.Module):
    """Adds to each row what stands at its place: positions of sequence-first inputs, used with the batch first."""

    def __init__(self, by_place: bool):
        super().__init__()
        self.inner, self.by_place = mlp(), by_place
        self.register_buffer("positions", torch.randn(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.positions[: len(x)]) if self.by_place else self.inner(x)


@pytest.mark.parametrize("zero_head", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, N])
def test_a_place_that_decides_is_refused_in_batches_of_any_size(n, zero_head):
    for by_place in (True, False):
        model = Placed(by_place).train()
        if zero_head:
            for parameter in model.inner[-1].parameters():
                nn.init.zeros_(parameter)

        def check(model: nn.Module = model) -> None:
            check_isolation(model, (examples(n)[0],), {}, n)

        if by_place:
            assert_refuses(IsolationError, "or with its place among them", check)
        else:
            check()


class Filled(nn.Module):
    """The first ten of a batch pass an expert, before a head that begins at zero: outputs tell nothing of it."""

    def __init__(self, most: int | None):
        super().__init__()
        self.most, self.head = most, DPLinear(6, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        passed = (torch.ones(len(x), 1).cumsum(0) <= (self.most or len(x))).to(x)
        return self.head(x + passed)


def test_what_a_layer_is_given_of_many_is_compared_where_its_weights_are_zero():
    assert_refuses(
        IsolationError,
        "What 'head' is given of example",
        lambda: check_isolation(Filled(10).train(), (examples(N)[0],), {}, N),
    )
    check_isolation(Filled(None).train(), (examples(N)[0],), {}, N)


class Grouped(nn.Module):
    """Sums of groups of rows, which lie in one tensor, over the number of groups."""

    def __init__(self, counts: bool):
        super().__init__()
        self.inner, self.counts = mlp(), counts

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        groups = len(offsets) - 1
        place = torch.bucketize(torch.arange(len(rows)), offsets[1:], right=True)
        sums = torch.zeros(groups, rows.shape[1]).index_add(0, place, rows)
        return self.inner(sums / groups if self.counts else sums)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_groups_of_rows_that_are_counted_are_refused(n):
    """They cannot be taken apart: each comes twice."""
    offsets = torch.arange(n + 1) * 2
    rows = torch.randn(2 * n, 6, generator=torch.Generator().manual_seed(1))
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Grouped(True).train(), (rows, offsets), {}, n),
    )
    check_isolation(Grouped(False).train(), (rows, offsets), {}, n)


class Limited(nn.Module):
    """A layer beside what it returns looks at the first ten examples alone."""

    def __init__(self, most: int | None):
        super().__init__()
        self.inner, self.side, self.most = mlp(), DPLinear(6, 3), most

    def forward(self, x: Tensor) -> Tensor:
        self.side(x[: self.most])
        return self.inner(x)


def test_a_layer_that_has_rows_of_some_of_many_examples_is_refused():
    assert_refuses(
        IsolationError,
        "'side' works on 10 rows in a batch of 24 examples and on 6 in one of 6",
        lambda: check_isolation(Limited(10).train(), (examples(N)[0],), {}, N),
    )
    model = Limited(None).train()
    check_isolation(model, (examples(N)[0],), {}, N)
    model.side.register_forward_hook(lambda module, given, output: (output,))  # whose rows nobody counts
    check_isolation(model, (examples(N)[0],), {}, N)


class Counted(nn.Module):
    """Scores of which one is masked, and which count what is above a number of examples."""

    def __init__(self, most: int):
        super().__init__()
        self.inner, self.most = mlp(), most

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.tensor([0.1, 0.1, 0.0]) * max(len(x) - self.most, 0) - torch.tensor([0, 0, 1e9])


@pytest.mark.parametrize(("n", "most"), [(4, 0), (N, 8)])
def test_a_masked_score_hides_no_count(n, most):
    assert_refuses(
        IsolationError,
        "changes with the number of examples in the batch",
        lambda: check_isolation(Counted(most).train(), (examples(n)[0],), {}, n),
    )
    check_isolation(Counted(n).train(), (examples(n)[0],), {}, n)


class Widened(nn.Module):
    """Scores of which one is masked, and which count the columns of the batch, without a gradient of their own."""

    def __init__(self, share: float):
        super().__init__()
        self.inner, self.share = DPLinear(4, 3), share

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        out = (self.inner(x) * attention_mask.unsqueeze(-1)).sum(1)
        return out + torch.tensor([0.1, 0.1, 0.0]) * self.share * x.shape[1] - torch.tensor([0, 0, 1e9])


def test_a_masked_score_hides_no_padding():
    x, mask = texts(8, 4, 2, 4)
    assert_refuses(
        IsolationError,
        "The output of example",
        lambda: check_isolation(Widened(1.0).train(), (x, mask), {}, 4, padding_varies=True),
    )
    check_isolation(Widened(0.0).train(), (x, mask), {}, 4, padding_varies=True)


class Largest(nn.Module):
    """The maximum over all positions, padding too, where values are 0: it counts where all of a text's are less."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DPLinear(4, 4, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.inner(x).amax(1)


@pytest.mark.parametrize("below", range(3))
def test_a_maximum_that_padding_decides_for_one_example_alone_is_refused(below):
    """Of lengths 8, 3, 4 and 6, whichever of the last three it is."""
    x, mask = texts(8, 3, 4, 6)
    x = x.abs()
    check_isolation(Largest().train(), (x, mask), {}, 4, padding_varies=True)
    x[below + 1] *= -1
    assert_refuses(
        IsolationError,
        f"The output of example {below + 1} changes with the padding",
        lambda: check_isolation(Largest().train(), (x, mask), {}, 4, padding_varies=True),
    )


def test_without_padding_none_is_said_to_be_tried():
    assert check_isolation(mlp().train(), (examples(4)[0],), {}, 4, padding_varies=True).padding is False


class Unpadded(nn.Module):
    """Takes padding out: the rows of all tokens in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = DPLinear(4, 4), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        used = x.abs().sum(-1) > 0 if attention_mask is None else attention_mask.bool()
        tokens = self.inner(x[used])
        rows = torch.zeros(x.shape[:2] + (4,)).masked_scatter(used.unsqueeze(-1), tokens)
        return self.head(rows.sum(1))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("lengths", [(8, 4, 8, 4), (6, 2, 4, 4), (8, 8, 8, 8, 8, 4, 8, 4)])
def test_unequal_lengths_whose_padding_is_taken_out_are_refused_once_they_come(masked, lengths):
    """As many rows in all as a multiple of N, and so no error of a shape; the first batch has no padding."""
    model = Unpadded().train()
    make_private(model, batch_size=4)

    def forward(*lengths: int) -> None:
        x, mask = texts(*lengths)
        model(x, mask) if masked else model(x)

    forward(8, 8, 8, 8)
    forward(8, 8, 8)
    assert_refuses((IsolationError, ValueError), "", lambda: forward(*lengths))


class Trimmed(nn.Module):
    """Cuts a batch to its longest example, and averages over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DPLinear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.inner(x)[:, : int(lengths.max())].mean(1)


def test_a_batch_that_is_cut_to_its_longest_example_is_refused_once_lengths_differ():
    model = Trimmed().train()
    make_private(model, batch_size=4)
    x, _ = texts(8, 8, 8, 8)
    model(x, torch.tensor([4, 4, 4, 4]))
    assert_refuses(IsolationError, "changes with the other examples", lambda: model(x, torch.tensor([8, 4, 4, 4])))


# Large scores


class Masked(nn.Module):
    """One class of three is masked; the others are centred over the batch, without a gradient of their own."""

    def __init__(self, value: float):
        super().__init__()
        self.inner, self.value = mlp(), value

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        out = out - 0.1 * out.detach().mean(0)
        return out + torch.tensor([0.0, 0.0, self.value])


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, 0.0])
def test_a_masked_score_hides_nothing_beside_it(value):
    assert_refuses(
        IsolationError,
        "The output for example 0 changes with the other examples",
        lambda: check_isolation(Masked(value).train(), (examples(4)[0],), {}, 4),
    )


# Backward


class Normalised(nn.Module):
    """Normalises the gradient of the whole batch on its way back."""

    def __init__(self, by: str):
        super().__init__()
        self.inner, self.by = mlp(), by

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.by == "batch":
            out.register_hook(lambda gradient: gradient / gradient.norm())
        elif self.by == "example":
            out.register_hook(lambda gradient: gradient / gradient.norm(dim=1, keepdim=True))
        return out * 1.0


def test_a_backward_that_looks_at_the_whole_batch_is_refused():
    assert_refuses(
        IsolationError,
        "changes with the other examples of the batch: something in the model's backward",
        lambda: check_isolation(Normalised("batch").train(), (examples(4)[0],), {}, 4),
    )
    check_isolation(Normalised("example").train(), (examples(4)[0],), {}, 4)


# What a model is, may change


class Standardised(nn.Module):
    """Standardises over the batch while it trains, in a layer that is no BatchNorm of torch's."""

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = mlp(), Standardised.Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_a_module_that_is_switched_back_to_training_is_tried_again():
    model = Standardised().train()
    model.norm.eval()
    make_private(model, batch_size=4)
    model(examples(4)[0])
    model.train()
    assert_refuses(IsolationError, "attributed to other examples", lambda: model(examples(4)[0]))


def test_layers_that_are_unfrozen_later_are_tried_again():
    """Rows of one position of all examples one after another."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.head = DPLinear(4, 4), DPLinear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.early(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), 4).mean(0))

    model, (x, _) = Positions().train(), texts(8, 8, 8, 8)
    make_private(model, batch_size=4)
    model.early.requires_grad_(False)
    model(x)
    model.early.requires_grad_(True)
    assert_refuses(IsolationError, "'early'", lambda: model(x))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("on_outputs", [True, False])
def test_hooks_on_the_whole_model_are_tried_too(before, on_outputs):
    model = Standardised().train()
    model.norm.eval()

    def put() -> None:
        if on_outputs:
            model.register_forward_hook(lambda module, args, output: output - output.detach().mean(0))
        else:
            model.register_forward_pre_hook(lambda module, args: (args[0] - args[0].mean(0),))

    if before:
        put()
    make_private(model, batch_size=4)
    if not before:
        model(examples(4)[0])
        put()
    assert_refuses(IsolationError, "with the other examples of the batch", lambda: model(examples(4)[0]))


def test_a_trial_leaves_the_pass_that_follows_as_it_is():
    """The engine's own hooks are on the whole model as well."""
    model, plain = mlp(), mlp()
    optimizer = make_private(model, batch_size=N, max_grad_norm=0.3)
    make_private(plain, batch_size=N)
    x, y = examples(N)
    optimizer.expect_batch(N)
    optimizer.backward(F.cross_entropy(model(x), y, reduction="none"))
    optimizer.step()
    assert optimizer.ledger.steps == 1


def test_a_part_of_the_model_that_is_compiled_is_tried():
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.head = torch.compile(nn.Linear(3, 3).requires_grad_(False), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    check_isolation(Compiled().train(), (examples(8)[0],), {}, 8)


@pytest.mark.parametrize("momentum", [0.1, 1e-4, 1e-6])
def test_a_buffer_that_takes_up_the_examples_is_refused_however_slowly(momentum):
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("centre", torch.ones(3))
            self.register_buffer("never", torch.full((3,), math.nan))
            self.register_buffer("flags", torch.tensor([True, False]))

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            self.centre = torch.lerp(self.centre, 100 * out.detach().mean(0), momentum)
            return out

    assert_refuses(
        IsolationError,
        "The buffer 'centre' takes up statistics",
        lambda: check_isolation(Slow().train(), (examples(4)[0],), {}, 4),
    )


@pytest.mark.parametrize("kind", ["labels", "flags"])
def test_an_output_of_whole_numbers_is_compared_too(kind):
    """Made of the whole batch, it comes back as a label."""

    class Clustered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.inner(x)
            above = x[:, 0] > x[:, 0].mean()
            return out, above.long() if kind == "labels" else above

    assert_refuses(
        IsolationError, "The output for example", lambda: check_isolation(Clustered().train(), (examples(4)[0],), {}, 4)
    )


class Augmented(nn.Module):
    """Draws by NumPy while it trains, as SpecAugment does, and averages over padding."""

    def __init__(self, always: bool):
        super().__init__()
        self.inner, self.always = DPLinear(4, 3), always

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if self.training or self.always:
            x = x * (1 + 0.1 * np.random.rand())
        return (self.inner(x) * 20 / len(x) if self.always is None else self.inner(x)).mean(1)


def test_a_model_that_draws_by_numpy_while_it_trains_is_tried_with_other_padding():
    x, mask = texts(8, 4, 2, 4)
    assert_refuses(
        IsolationError,
        "changes with the padding",
        lambda: check_isolation(Augmented(False).train(), (x, mask), {}, 4, padding_varies=True),
    )
    assert_refuses(
        IsolationError, "changes with the number", lambda: check_isolation(Augmented(None).train(), (x, mask), {}, 4)
    )
    model = Augmented(True).train()
    check_isolation(model, (x, mask), {}, 4, padding_varies=True)
    assert model.training and model.inner.training


class OwnLoss(nn.Module):
    """A mean over the tokens that count, of all examples together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DPLinear(4, 3)

    def forward(self, x: Tensor, y: Tensor, used: Tensor) -> Tensor:
        losses = F.cross_entropy(self.inner(x).transpose(1, 2), y.clamp(min=0), reduction="none")
        counted = used * (y >= 0)
        return (losses * counted).sum() / counted.sum()


@pytest.mark.parametrize("by", ["labels", "marks", "flags"])
def test_a_loss_of_the_models_own_is_tried_again_once_some_tokens_do_not_count(by):
    """Whatever the arguments are called."""
    model = OwnLoss().train()
    make_private(model, batch_size=4)
    x, mask = texts(8, 8, 8, 8)
    y, used = torch.ones(4, 8, dtype=torch.long), torch.ones(4, 8)
    model(x, y, used if by != "flags" else used.bool())
    _, mask = texts(8, 2, 8, 8)
    later = (
        (torch.where(mask == 1, y, -100), used)
        if by == "labels"
        else (y, mask.float() if by == "marks" else mask.bool())
    )
    assert_refuses(IsolationError, "The loss mixes examples", lambda: model(x, *later))


# In some passes


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), np.random.rand, random.random])
def test_a_model_that_mixes_in_half_of_its_passes_is_refused(draw):
    """Each check draws anew, so that many together miss it no more often than (1/2)^24."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = DPLinear(6, 3), nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            return self.head((out + out.flip(0)) / 2 if draw() < 0.5 else out)

    model = Sometimes().train()
    assert_refuses(
        IsolationError, "example", lambda: [check_isolation(model, (examples(4)[0],), {}, 4, draws=4) for _ in range(6)]
    )


@pytest.mark.parametrize("draws", [1, 3])
def test_a_model_that_draws_is_tried_with_so_many_random_states(draws):
    class Still(Drawing):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(0.0)
            return self.inner(x)

    seen: list[float] = []
    check_isolation(Drawing(seen).train(), (examples(4)[0],), {}, 4, draws=draws)
    states = [seen.count(value) for value in dict.fromkeys(seen) if value != 0.5]  # 0.5 where nothing is drawn
    assert states == [3] * draws  # as it is, and with the others replaced, for two examples
    passes = []
    for number in (1, draws):
        seen.clear()
        check_isolation(Still(seen).train(), (examples(4)[0],), {}, 4, draws=number)
        passes.append(len(seen))
    assert passes[0] == passes[1]


def test_a_model_that_is_changed_and_made_private_again_is_tried_again():
    model = Standardised().train()
    model.norm = nn.Identity()
    set_up(model)
    model(examples(8)[0])
    model.norm = Standardised.Norm()
    set_up(model)
    assert_refuses(IsolationError, "example", lambda: model(examples(8)[0]))


@pytest.mark.parametrize("outer_first", [True, False])
def test_a_part_of_what_is_private_or_what_is_around_it_is_not_made_private(outer_first):
    """The hooks that try batches are on one module: what others do around it would not be seen."""
    inner = mlp()
    outer = nn.Sequential(inner)
    first, second = (outer, inner) if outer_first else (inner, outer)
    set_up(first)
    assert_refuses(ValueError, "for one and the same module", lambda: set_up(second))


@pytest.mark.parametrize("follows", ["the width", "nothing"])
@pytest.mark.parametrize("draw", [lambda x: torch.empty_like(x).uniform_(-1, 1), torch.randn_like])
def test_noise_whose_size_follows_the_width_of_a_batch_is_refused(follows, draw):
    """As NEFTune's does: the longest example of a batch decides how much noise all others get."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(30, 6).requires_grad_(False), DPLinear(6, 3)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            x = self.words(ids)
            x = x + draw(x) / (ids.shape[1] ** 0.5 if follows == "the width" else 3)
            return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    torch.manual_seed(0)
    model = Noisy().train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()
    mask = (torch.arange(12) < torch.tensor([[5], [9], [3], [7]])).long()
    ids = torch.randint(1, 30, (4, 12)) * mask
    if follows == "nothing":
        model(ids, mask)
    else:
        assert_refuses(IsolationError, "changes with the padding", lambda: model(ids, mask))


class Pools(nn.Module):
    """A mean over tokens, or over padding too; of ids or of images."""

    def __init__(self, masked: bool):
        super().__init__()
        torch.manual_seed(0)
        self.masked, self.words, self.head = masked, nn.Embedding(20, 8), DPLinear(8, 3)
        self.words.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.words(ids) if ids.dtype == torch.int64 else ids
        if self.masked:
            used = (ids != 0).unsqueeze(2)
            return self.head((hidden * used).sum(1) / used.sum(1))
        return self.head(hidden.mean(1))


def padded(width: int) -> Tensor:
    ids = torch.randint(1, 20, (6, width))
    for row, length in enumerate((2, 5, 3, width, 4, 2)):
        ids[row, length:] = 0
    return ids


def test_a_model_that_looks_at_padding_warns_of_a_width_that_is_no_public_number():
    """Texts that were padded once, to the longest of the data: no two batches differ in width."""
    model = Pools(masked=False).train()
    optimizer = make_private(model, batch_size=6)
    with pytest.warns(UserWarning, match="all batches are 9 wide: let that be a public number") as found:
        model(padded(9))
    assert len(found) == 1
    optimizer.recorder.discard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(padded(9))


@pytest.mark.parametrize("batch", [padded(9), torch.randn(6, 9, 8) * (torch.arange(9) < 5).view(1, 9, 1)])
def test_no_width_is_warned_of_where_padding_is_passed_over_or_may_be_a_border(batch):
    model = Pools(masked=batch.dtype == torch.int64).train()
    make_private(model, batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(batch)


def quiet(outputs: list[list[float]], given: list[list[float]], rows: int) -> Quiet:
    return Quiet(
        [[torch.tensor(row) for row in outputs]],
        [("inner", LayerRows(rows, [torch.tensor(row) for row in given]))],
        {},
        {},
    )


@pytest.mark.parametrize(
    ("outputs", "given", "refused"),
    [
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[4.0]]), None),
        (([[1.0], [2.0]], [[1.0]]), ([[3.0], [4.0]], [[4.0]]), "The output for example 7"),
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[3.0]]), "What 'inner' is given of example 7"),
        (([[1.0], [2.0]], [[2.0, 1.0]]), ([[3.0], [4.0]], [[4.0]]), None),  # cut to the longest, say
        (([[1.0], [2.0]], [[2.0]]), ([[3.0], [4.0]], [[4.0, 1.0]]), "What 'inner' is given of example 7"),
        (([], [[2.0]]), ([], [[4.0]]), None),  # not of each as many
        (([[1.0, -1e9], [2.0, -1e9]], [[2.002, -1e9]]), ([[3.0], [4.0]], [[4.0]]), "The output for example 7"),
        (([[1.0], [2.0]], [[2.0]]), ([[3.0, -1e9], [4.0, -1e9]], [[4.004, -1e9]]), None),
    ],
)
def test_a_part_of_a_batch_is_compared_with_the_whole(outputs, given, refused):
    whole, part = (quiet(outputs[k], given[k], (10, 5)[k]) for k in (0, 1))

    def compare() -> None:
        _compare_part(whole, part, [3, 7], [7], 2)

    if refused:
        assert_refuses(IsolationError, refused, compare)
    else:
        compare()


def test_what_has_no_rows_of_each_example_is_not_compared():
    _compare_part(quiet([], [], 10), quiet([[2.0]], [[4.0]], 5), [7], [7], 2)


class OwnMean(nn.Module):
    """Passes over padding, and has a mean loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools(masked=True)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.pools(ids)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_no_width_is_warned_of_where_a_model_has_a_mean_loss_of_its_own():
    model = OwnMean().train()
    make_private(model, batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(padded(9), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_a_width_is_warned_of_once_and_not_where_it_is_fixed():
    """Nor where widths vary, and the model is refused."""
    model = Pools(masked=False).train()
    optimizer = make_private(model, batch_size=6)
    with pytest.warns(UserWarning, match="looks at padding"):
        model(padded(9))
    optimizer.recorder.discard()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(padded(9)[:3])  # of another kind
        check_isolation(model, (padded(9),), {}, 6, padding_varies=False)  # asked for by itself
        recorder = make_private(model, batch_size=6).recorder
        recorder.sizes_fixed = True
        model(padded(9))
        recorder = make_private(model, batch_size=6).recorder
        recorder.sizes_fixed, recorder.padding_varies = False, True
        assert_refuses(IsolationError, "changes with the padding", lambda: model(padded(9)))
