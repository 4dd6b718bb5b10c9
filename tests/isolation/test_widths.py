"""A batch's width: padding may change nothing, and a model that looks at it is warned of."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from tests.models import assert_refuses, examples, mlp, texts
from tests.support import make_private


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


@pytest.mark.slow
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
