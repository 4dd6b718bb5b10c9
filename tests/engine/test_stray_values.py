"""What could slip past clipping and noise beside the recorded gradients: stale ones, buffers, forgotten parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import DPLinear, IsolationError, LoRAConfig, PrivacyEngine, inject_lora
from lora_dp.privacy.accounting import Ledger, PoissonGaussian, PrivacyBudgetExceeded
from tests.support import make_private

X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


CONFIG = LoRAConfig(r=2, target_modules=["0"], trainable_modules=["2"])


def test_a_stale_plain_gradient_moves_nothing():
    model = plain()
    F.cross_entropy(model(X), Y).backward()
    stale = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    inject_lora(model, CONFIG)
    optimizer.add_param_group({"params": [model[0].lora_A, model[0].lora_B]})
    assert stale.grad is not None and stale.grad.any()
    before = stale.detach().clone()
    loader = DataLoader(TensorDataset(X), batch_size=6)
    _, private, _ = PrivacyEngine("rdp").make_private(
        model=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1e-3
    )
    private.step_on_empty_batch()
    assert torch.equal(stale, before)


def test_an_optimizer_made_before_the_adapters_is_refused():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    inject_lora(model, CONFIG)
    with pytest.raises(ValueError, match=r"does not hold '0.lora_A'.*after inject_lora"):
        PrivacyEngine("rdp").make_private(
            model=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(X), batch_size=2),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )


def test_a_factor_that_no_phase_trains_may_be_left_out():
    model = inject_lora(plain(), CONFIG)
    held = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("lora_A")]
    PrivacyEngine("rdp").make_private(
        model=model,
        optimizer=torch.optim.SGD(held, lr=1.0),
        data_loader=DataLoader(TensorDataset(X), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        phases="B",
    )


def test_running_statistics_are_refused_by_name():
    model = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), DPLinear(8, 3))
    with pytest.raises(ValueError, match=r"'0' \(InstanceNorm1d\) keeps running statistics"):
        make_private(model, batch_size=2)


class Averaging(nn.Module):
    """Keeps a moving mean of its inputs, without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(8, 3)
        self.register_buffer("center", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.center.mul_(0.9).add_(x.mean(0).detach(), alpha=0.1)
        self.calls += 1
        return self.head(x)


def test_a_buffer_that_takes_up_the_batch_is_caught_and_a_counter_is_not():
    model = Averaging()
    make_private(model, batch_size=6)
    with pytest.raises(IsolationError, match="The buffer 'center'"):
        model(X)
    assert not model.center.any() and model.calls == 0
    model.forward = lambda x: (model.calls.add_(1), model.head(x))[1]  # type: ignore[method-assign]
    model(X)


def test_a_mean_over_tokens_is_caught_on_the_first_batch_of_uneven_lengths():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(8, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            scores = self.head(x)
            return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}

    model = Tagger()
    optimizer = make_private(model, batch_size=4)
    x, labels = torch.randn(4, 6, 8), torch.randint(3, (4, 6))
    for _ in range(2):
        optimizer.batch.expect(4)
        model(x, labels=labels)["loss"].backward()
        optimizer.step()
    labels[1, 4:] = -100
    with pytest.raises(IsolationError, match="The loss mixes examples"):
        model(x, labels=labels)


def test_two_forwards_through_reentrant_checkpoints_are_refused():
    """Their private layers run in backward, where rows of both forwards would fall into one pass."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = DPLinear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.head, x, use_reentrant=True)

    model = Checkpointed()
    optimizer = make_private(model, batch_size=3)
    x = X.clone().requires_grad_()
    model(x[:3])
    with pytest.raises(RuntimeError, match="second forward pass"):
        model(x[3:])
    optimizer.zero_grad()
    optimizer.batch.expect(3)
    model(x[:3]).mean().backward()
    optimizer.step()


def begun(steps):
    """An engine with a budget of so many steps, of which one is taken."""
    model = inject_lora(plain(), CONFIG)
    engine = PrivacyEngine("rdp")
    _, optimizer, _ = engine.make_private_with_epsilon(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=DataLoader(TensorDataset(X), batch_size=2),
        target_epsilon=3,
        target_delta=1e-5,
        steps=steps,
        max_grad_norm=1.0,
    )
    optimizer.step_on_empty_batch()
    return engine, optimizer


@pytest.mark.slow
def test_the_budget_notices_other_steps_of_equal_number():
    engine, optimizer = begun(steps=4)
    other = Ledger()
    other.append(optimizer.event)
    other.append(PoissonGaussian(0.4, 1.0))
    engine.ledger.load_state_dict(other.state_dict())
    with pytest.raises(PrivacyBudgetExceeded):
        optimizer.step_on_empty_batch()


@pytest.mark.slow
def test_a_step_that_fails_after_the_budgets_check_costs_nothing(monkeypatch):
    engine, optimizer = begun(steps=3)
    append = Ledger.append

    def fails(ledger, *step):
        if ledger is engine.ledger:
            raise KeyboardInterrupt
        append(ledger, *step)

    monkeypatch.setattr(Ledger, "append", fails)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step_on_empty_batch()
    monkeypatch.undo()
    optimizer.step_on_empty_batch()
    optimizer.step_on_empty_batch()
    assert engine.ledger.steps == 3
    with pytest.raises(PrivacyBudgetExceeded):
        optimizer.step_on_empty_batch()


def test_a_ledger_continues_another():
    event, other = PoissonGaussian(1.0, 0.5), PoissonGaussian(2.0, 0.5)
    short, long, different = Ledger(), Ledger(), Ledger()
    short.append(event, 2)
    long.append(event, 3)
    long.append(other)
    different.append(other, 5)
    assert long.continues(short) and long.continues(Ledger()) and long.continues(long)
    assert not short.continues(long) and not different.continues(short) and not Ledger().continues(short)
