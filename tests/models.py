"""Small private models and the steps that several tests take with them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lora_dp import DPLinear, DPLoRALinear, PrivacyEngine, PrivateOptimizer
from tests.support import private_gradients

WIDTH, CLASSES = 6, 3

OPTIMIZERS = [
    lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.NAdam,
]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """(N, 6) → (N, 3): an adapter and a full-rank head, with 2 · 6 + 8 · 2 + 3 · 8 + 3 = 55 trainable numbers."""
    torch.manual_seed(seed)
    model = nn.Sequential(DPLoRALinear(WIDTH, 8, r=2, dtype=dtype), nn.Tanh(), DPLinear(8, CLASSES, dtype=dtype))
    nn.init.normal_(model[0].lora_B, std=0.3)
    return model.train()


class Drawing(nn.Module):
    """Draws a number in each pass, which it notes."""

    def __init__(self, seen: list[float]) -> None:
        super().__init__()
        self.inner, self.seen = mlp(), seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(torch.rand(())))
        out: Tensor = self.inner(x)
        return out


def examples(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


def one_by_one(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    x, y = batch
    return [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]


def take_step(
    model: nn.Module,
    optimizer: PrivateOptimizer,
    batch: tuple[Tensor, Tensor],
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    **options: Any,
) -> dict[str, Tensor]:
    """One private step on a hand-made batch; the released sums, that is the gradients times the expected batch."""
    optimizer.zero_grad()
    optimizer.batch.expect(len(batch[0]))
    loss(model, batch).backward()
    optimizer.step(**options)
    return {name: g * optimizer.expected_batch_size for name, g in private_gradients(model).items()}


def pure_noise(model: nn.Module, optimizer: PrivateOptimizer, steps: int) -> Tensor:
    """What ``steps`` empty batches release, as sums: (steps, trained numbers)."""
    rows = []
    for _ in range(steps):
        optimizer.step_on_empty_batch()
        rows.append(flat(private_gradients(model)) * optimizer.expected_batch_size)
    return torch.stack(rows)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ from the snapshot ``before``."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def seeded() -> PrivacyEngine:
    return PrivacyEngine("rdp", reproducible_seed=3)


def loader_of(size: int, batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(size)), batch_size=batch_size, **options)


def private_run(
    engine: PrivacyEngine,
    *,
    size: int = 40,
    batch_size: int = 8,
    lr: float = 0.1,
    seed: int = 0,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    workers: int = 0,
    **options: Any,
) -> tuple[nn.Module, PrivateOptimizer, Any]:
    """Model, optimizer and Poisson loader of a run on ``size`` random examples."""
    model = mlp(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options}
    if "target_epsilon" in options:
        del options["noise_multiplier"]
        make = engine.make_private_with_epsilon
    else:
        make = engine.make_private
    return make(
        model=model,
        optimizer=optimizer(trained, lr=lr),
        data_loader=loader_of(size, batch_size, num_workers=workers),
        **options,
    )


def train(model: nn.Module, optimizer: PrivateOptimizer, batches: Any) -> None:
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_refuses(error: type[BaseException], words: str, action: Callable[[], Any]) -> None:
    """``action`` raises ``error`` with ``words`` in its message; an AssertionError says that it does not."""
    try:
        action()
    except error as refusal:
        assert words in str(refusal), f"'{words}' is not in: {refusal}"
    else:
        raise AssertionError(f"Not refused with {error.__name__}.")


def texts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Texts of these lengths, (N, 8, 4) with zeros at padding, and their mask."""
    mask = (torch.arange(8) < torch.tensor(lengths).unsqueeze(1)).long()
    x = torch.randn(len(lengths), 8, 4, generator=torch.Generator().manual_seed(1)) * mask.unsqueeze(-1)
    return x, mask


def set_up(model: nn.Module) -> None:
    """Makes a model private, for what is refused then or in its forward."""
    PrivacyEngine().make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=loader_of(40, 8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
