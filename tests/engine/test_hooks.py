"""When a pass begins, which batches are tried before it, and what it leaves alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_dp.engine.hooks
from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import FEW
from lora_dp.isolation.deterministic import Still
from tests.models import Drawing, examples, mlp, take_step, texts
from tests.support import assert_close, make_private, private_gradients


class Centred(nn.Module):
    """Takes the mean of the batch off, where it is told to."""

    def __init__(self, mixes: bool = True) -> None:
        super().__init__()
        self.inner, self.mixes = mlp(), mixes

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out - out.mean(0) if self.mixes else out


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples each trial was given; none is drawn in secret."""
    sizes: list[int] = []
    check = lora_dp.engine.hooks.check_isolation

    def counted(module: nn.Module, args: Any, kwargs: Any, n: int, **options: Any) -> Any:
        sizes.append(n)
        return check(module, args, kwargs, n, **options)

    monkeypatch.setattr(lora_dp.engine.hooks, "check_isolation", counted)
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    return sizes


def forward(model: nn.Module, optimizer: Any, n: int) -> None:
    optimizer.recorder.discard()
    model(examples(n)[0])


@pytest.mark.parametrize("several", [2, 3])
def test_several_examples_can_meet_and_one_cannot(trials, several):
    model = Centred().train()
    optimizer = make_private(model, batch_size=4)
    forward(model, optimizer, 1)
    assert trials == [2]  # beside a copy of itself, for padding and buffers
    with pytest.raises(IsolationError):
        forward(model, optimizer, several)
    assert trials == [2, several]


def test_the_next_engine_tries_anew(trials):
    """In between the model may have become another, in what nothing tells."""
    model = Centred(mixes=False).train()
    for _ in range(2):
        forward(model, make_private(model, batch_size=4), 4)
    assert trials == [4, 4]


def test_from_four_examples_on_a_batch_is_of_another_kind(trials):
    """It is tried in halves too."""
    model = Centred(mixes=False).train()
    optimizer = make_private(model, batch_size=4)
    for n in (3, 3, 3):
        forward(model, optimizer, n)
    assert trials == [3]
    for n in (FEW, FEW, FEW + 1):
        forward(model, optimizer, n)
    assert trials == [3, FEW]


def test_nothing_is_tried_inside_a_capture(trials):
    model = Centred(mixes=False).train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.capturing = True
    forward(model, optimizer, 4)
    assert not trials
    optimizer.recorder.capturing = False
    forward(model, optimizer, 4)
    assert trials == [4]


class Tokens(nn.Module):
    """(N, T, 4) → (N, 3), a mean over tokens that a private layer is given flattened, or is not."""

    def __init__(self, flat: bool = True, counts: bool = False) -> None:
        super().__init__()
        self.inner, self.flat, self.counts = DPLinear(4, 3), flat, counts

    def forward(self, x: Tensor) -> Tensor:
        rows = self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.flat else self.inner(x)
        return rows.mean(1) * (len(x) if self.counts else 1)


def tokens(n: int, width: int) -> Tensor:
    return texts(*[8] * n)[0][:, :width]


@pytest.mark.parametrize(
    ("flat", "n", "expected"), [(True, 1, [2, 2]), (True, 2, [2] * 3), (True, 4, [4] * 3), (False, 4, [4] * 2)]
)
def test_each_number_of_flattened_rows_is_tried_once(trials, flat, n, expected):
    """The second width tells that widths vary; by the third only flattened rows are of another kind."""
    model = Tokens(flat).train()
    optimizer = make_private(model, batch_size=4)
    for width in (8, 7, 6, 6, 7):
        optimizer.recorder.discard()
        model(tokens(n, width))
    assert trials == expected
    optimizer.recorder.discard()
    model(tokens(n + 1 if n == 4 else n, 6))  # as many rows of each example
    assert trials == expected


def test_flattened_rows_are_not_tried_inside_a_capture(trials):
    model = Tokens().train()
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.capturing = True
    model(tokens(4, 8))
    assert not trials


def test_where_all_sizes_are_fixed_neither_numbers_nor_padding_vary(trials):
    """A sum over the batch's width and a factor that counts its rows are public then."""
    model = Tokens(counts=True).train()
    optimizer = make_private(model, batch_size=4)
    with pytest.raises(IsolationError, match="changes with the number of examples"):
        model(tokens(4, 8))
    optimizer.recorder.sizes_fixed = True
    for width in (8, 7, 6):
        optimizer.recorder.discard()
        model(tokens(4, width))
    optimizer.recorder.discard()
    model(texts(6, 4, 5, 3)[0])
    assert trials == [4] * 5


@pytest.mark.parametrize("n", [1, 4])
def test_padding_that_only_the_values_show_is_tried_once_it_comes(trials, n):
    """A batch of the same structure as others, which had none."""
    model = Tokens(flat=False).train()
    optimizer = make_private(model, batch_size=4)
    for width in (6, 7, 7):
        optimizer.recorder.discard()
        model(tokens(n, width))
    assert trials == [max(n, 2)] * 2
    optimizer.recorder.discard()
    with pytest.raises(IsolationError, match="changes with the padding"):
        model(texts(*[5, 4, 5, 3][:n])[0][:, :7])


@pytest.mark.parametrize("later", [False, True])
def test_of_a_model_that_draws_the_first_batch_is_tried_with_four_random_states_and_later_kinds_with_one(trials, later):
    seen: list[float] = []
    model = Drawing(seen).train()
    optimizer = make_private(model, batch_size=4)
    if later:
        forward(model, optimizer, 3)
        seen.clear()
    forward(model, optimizer, FEW)
    # A state is that of three passes: of the batch as it is, and with others replaced, for two examples.
    with Still():
        still = float(torch.rand(()))
    assert sum(seen.count(value) == 3 for value in set(seen) - {still}) == (1 if later else 4)


@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_between_forward_and_backward_changes_nothing(fails):
    def evaluate(model: nn.Module) -> None:
        model.eval()
        if fails:
            with pytest.raises(RuntimeError):
                model(examples(4)[0][:, :5])
        else:
            model(examples(4, seed=2)[0])
        model.train()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor], between: bool = True) -> Tensor:
        out = model(batch[0])
        if between:
            evaluate(model)
        return nn.functional.cross_entropy(out, batch[1])

    released = []
    for between in (False, True):
        model = mlp()
        optimizer = make_private(model, batch_size=4)
        take_step(model, optimizer, examples(4), lambda m, b, between=between: loss(m, b, between))
        released.append(private_gradients(model))
    for name, gradient in released[0].items():
        assert_close(released[1][name], gradient)


def test_a_graph_that_is_kept_may_be_looked_at_when_its_pass_is_over():
    """Without reentrant checkpoints nothing is recorded then."""
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    x = examples(4)[0].requires_grad_()
    logits = model(x)
    logits.square().sum(1).mean().backward(retain_graph=True)
    optimizer.zero_grad()
    assert torch.autograd.grad(logits.sum(), x)[0].any()
    assert not optimizer.recorder.pending


def test_a_batch_norm_that_is_thawed_later_is_refused():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3)).train()
    model[1].requires_grad_(False).eval()
    make_private(model, batch_size=4)
    model(examples(4)[0])
    model.train()
    with pytest.raises(RuntimeError, match="BatchNorm1d that was frozen"):
        model(examples(4)[0])


def test_nor_does_it_take_up_statistics_without_gradients():
    """As by torch.optim.swa_utils.update_bn, of the model or of a copy."""
    model = nn.Sequential(nn.BatchNorm1d(6), mlp()).train()
    model[0].eval().requires_grad_(False)
    make_private(model, batch_size=4)
    copied = copy.deepcopy(model)
    for each, words in ((model, "was frozen and in eval mode"), (copied, "copy of a private model is a BatchNorm1d")):
        before = each[0].running_mean.clone()
        for no_gradients in (torch.no_grad, torch.inference_mode):
            with no_gradients():
                each(examples(4)[0])  # frozen
                each[0].train()
                with pytest.raises(RuntimeError, match=words):
                    each(examples(4)[0])
                each.eval()(examples(4)[0])
                each.train()[0].eval()
        assert torch.equal(each[0].running_mean, before)


def test_a_loss_that_joins_examples_is_refused_in_the_first_pass():
    model = mlp()
    optimizer = make_private(model, batch_size=4)
    optimizer.batch.expect(4)
    logits = model(examples(4)[0])
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        (logits - logits.mean(0)).square().sum(1).mean().backward()


class Balanced(nn.Module):
    """Returns a second number, which mixes examples in stacks (N, 1, 6) or where it is told to."""

    mixes = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.inner(x.flatten(1))
        mixed = self.mixes or x.dim() == 3
        balance = out.mean(0).square().sum() if mixed else (1 + out).square().mean()
        return {"loss": out.square().mean(), "balance": balance}


def refused_where_used(output: dict[str, Tensor]) -> None:
    with pytest.raises(IsolationError, match="a number that the model returned"):
        (output["loss"] + output["balance"]).backward()


def test_a_number_of_the_models_is_proven_for_its_kind_of_batch_alone(trials):
    model, x = Balanced().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)
    optimizer.recorder.expect_padding()  # that widths differ is no news
    for batch in (x.unsqueeze(1), x, x.unsqueeze(1)):
        optimizer.recorder.discard()
        output = model(batch)
    assert trials == [4, 4]
    refused_where_used(output)
    optimizer.recorder.discard()
    output = model(x)
    (output["loss"] + output["balance"]).backward()


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_number_of_the_models_must_pass_every_trial(trials, monkeypatch, order):
    model, x = Balanced().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: True)
    for model.mixes in order:
        optimizer.recorder.discard()
        output = model(x)
    assert len(trials) == 2
    model.mixes = False
    optimizer.recorder.discard()
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    output = model(x)
    refused_where_used(output)


def test_the_loss_of_a_batch_that_is_tried_is_looked_at_again(trials):
    """Its graph may be known, and its indices others; of so many outputs no other batch's loss is looked through."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.flatten(1)).repeat(1, 2**14)

    model, x = Flat().train(), examples(4)[0]
    optimizer = make_private(model, batch_size=4)

    def loss(batch: Tensor, places: list[int]) -> Tensor:
        optimizer.recorder.discard()
        logits = model(batch)
        return (logits - 2 * logits.index_select(0, torch.tensor(places))).square().sum(1).mean()

    loss(x, [0, 1, 2, 3]).backward()
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        loss(x.unsqueeze(1), [3, 1, 2, 0]).backward()
    assert len(trials) == 2


def test_a_model_may_return_nothing():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> None:
            self.seen = self.inner(x).detach()

    model = Silent().train()
    make_private(model, batch_size=4)
    assert model(examples(1)[0]) is None
    assert model.eval()(examples(4)[0]) is None
