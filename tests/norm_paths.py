"""One example through every path by which a gradient reaches the clipped sum, at any magnitude."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_dp import DPEmbedding, DPLayerNorm, DPLinear, DPLoRALinear
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.nn.lora_tangent_linear import DPLoRATangentLinear
from lora_dp.nn.lora_xs_linear import DPLoRAXSLinear
from lora_dp.privacy.clip_bounds import LARGEST_BOUND, LEAST_BOUND
from lora_dp.privacy.mechanism import total
from tests.support import RULES, make_private

D_IN, D_OUT, ROWS = 24, 20, 4
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Drawn:
    """The data of one case.

    Attributes:
        bound: C.
        excess: power of two by which the gradient, or what cancelling leaves of it, is larger than the bound.
        tokens: of the one example that is not zero.
        inputs, factor: powers of two of the inputs and of the adapter's factors.
        cancels: whether tokens come in pairs of opposite sign, ``rest`` powers of two larger than the first one.
        examples: N; all but one are zero.
    """

    bound: float
    excess: float
    tokens: int
    inputs: float
    factor: float
    cancels: bool
    rest: float
    examples: int
    seed: int

    def errors(self, path: "Path") -> float:
        """The power of two of the gradient with respect to the output."""
        return math.log2(self.bound) + self.excess - path.inputs * self.inputs - path.factors * self.factor


@dataclass(frozen=True)
class Path:
    """A layer, the options of its private step, and how often inputs and factors enter its gradient as factors."""

    layer: Callable[[], nn.Module]
    options: dict[str, Any]
    inputs: int = 1
    factors: int = 0
    ids: bool = False


def _frozen_weight() -> nn.Module:
    layer = DPLinear(D_IN, D_OUT)
    layer.weight.requires_grad_(False)
    return layer


def _adapter() -> nn.Module:
    return DPLoRALinear(D_IN, D_OUT, r=3, alpha=2)


PATHS = {
    **{
        f"full rank, {method}": Path(lambda: DPLinear(D_IN, D_OUT, bias=False), {"norm_method": method})
        for method in ("direct", "ghost")
    },
    "transposed": Path(lambda: DPLinear(D_IN, D_OUT, fan_in_fan_out=True), {}),
    "bias": Path(_frozen_weight, {}, inputs=0),
    **{
        f"adapter {phases}, {method}": Path(_adapter, {"norm_method": method, "phases": phases}, factors=1)
        for phases in ("A", "B", "AB")
        for method in ("direct", "ghost")
    },
    **{
        f"regulated {phases}": Path(_adapter, {"regulate_noise": True, "phases": phases}, factors=2)
        for phases in ("A", "B")
    },
    **{
        f"core, {method}": Path(lambda: DPLoRAXSLinear(D_IN, D_OUT, r=3, alpha=2), {"norm_method": method}, factors=2)
        for method in ("direct", "ghost")
    },
    **{
        f"tangent, {method}": Path(
            lambda: DPLoRATangentLinear(D_IN, D_OUT, r=3, alpha=2), {"norm_method": method}, factors=1
        )
        for method in ("direct", "ghost")
    },
    "layer norm": Path(lambda: DPLayerNorm(D_IN), {}, inputs=0),
    "lookups": Path(lambda: DPEmbedding(ROWS, D_OUT), {}, inputs=0, ids=True),
}


def drawn(*, largest_batch: int = 1000, largest_tokens: int = 6, hardest: bool = False) -> st.SearchStrategy[Drawn]:
    """Bounds from the least to the largest, and gradients from the least to the largest float32; ``hardest``: the least
    bound alone, and gradients near it."""
    bounds = st.one_of(
        st.just(LEAST_BOUND),
        st.sampled_from([1.0, LARGEST_BOUND]),
        st.floats(-19.9, 19.9).map(lambda power: 10.0**power),
    )
    excess = st.one_of(st.floats(-4, 8), st.floats(-90, 130))
    powers = st.one_of(st.just(0.0), st.floats(-40, 40), st.floats(-149, 127))
    if hardest:
        bounds, excess, powers = st.just(LEAST_BOUND), st.floats(-4, 8), st.sampled_from([0.0, -30.0, 30.0])
    return st.builds(
        Drawn,
        bounds,
        excess,
        st.integers(1, largest_tokens),
        powers,
        powers,
        st.booleans(),
        st.floats(0, 60),
        st.sampled_from([1, 7, largest_batch]),
        st.integers(0, 2**16),
    )


rules = st.sampled_from(RULES)


def _sized(value: Tensor, power: float) -> Tensor:
    return (value.double() * 2.0**power).clamp(-LARGEST, LARGEST).float()


def batch_of(case: Drawn, path: Path) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, ·) or ids (N, T), and the gradient with respect to the output, (N, T, ·)."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = case.tokens
    inputs = torch.randn(tokens, D_IN, generator=generator)
    errors = torch.randn(tokens, D_OUT, generator=generator)
    if case.cancels:
        # One input and one error, with either sign in turn; what is left over is the first token or two.
        inputs, errors = inputs[:1].repeat(tokens, 1), errors[:1].repeat(tokens, 1)
        pairs = (tokens - 1) // 2
        errors[tokens - 2 * pairs :] *= torch.tensor([1.0, -1.0] * pairs).unsqueeze(1) * 2.0**case.rest
    shape = (case.examples, tokens)
    x, g = torch.zeros(*shape, D_IN), torch.zeros(*shape, D_OUT)
    x[0], g[0] = _sized(inputs, case.inputs), _sized(errors, case.errors(path))
    if path.ids:
        ids = torch.zeros(shape, dtype=torch.int64)
        ids[0] = torch.randint(1 if case.cancels else ROWS, (tokens,), generator=generator)
        return ids, g
    return x, g


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def make_model(case: Drawn, path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(case.seed)
    layer = path.layer()
    if isinstance(layer, DPLoRALinear):
        nn.init.normal_(layer.lora_B)
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = _sized(factor.data, case.factor)
    return OneLayer(layer).to(dtype).train()


def record(model: nn.Module, optimizer: PrivateOptimizer, x: Tensor, g: Tensor, backwards: int = 1) -> Any:
    """The finished pass of a loss whose gradient with respect to the model's output is ``g``; of a mean, divided."""
    optimizer.recorder.open(len(x))
    # Not through the model's hooks, whose trials would see other batches too.
    out = model.forward(x)
    g = g[..., : out.shape[-1]] if g.shape[-1] >= out.shape[-1] else torch.nn.functional.pad(g, (0, D_IN - D_OUT))
    if optimizer.loss_reduction == "mean":
        g = g / len(x)
    for _ in range(backwards):
        out.backward(g.to(out.dtype), retain_graph=True)
    return optimizer.recorder.take()


def norm_of_sums(optimizer: PrivateOptimizer, finished: Any) -> float:
    """‖Σᵢ cᵢgᵢ‖ of one pass, in float64 and whatever its size: of one example's contribution if the others are 0."""
    sums = [total(value).double().flatten() for value in optimizer.clip(finished, None).sums.values()]
    return norm(sums)


def norm(parts: Sequence[Tensor]) -> float:
    """Scaled by the largest value: no square leaves the range."""
    whole = torch.cat([part.double().flatten() for part in parts]) if parts else torch.zeros(1, dtype=torch.float64)
    largest = float(whole.abs().max())
    return largest * float((whole / largest).square().sum().sqrt()) if 0 < largest < math.inf else largest


def contribution(
    case: Drawn,
    path: Path,
    rule: str,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
    backwards: int = 1,
    clips: bool = True,
) -> float:
    """The norm of what one example adds to the clipped sum; without ``clips`` at an infinite bound."""
    model = make_model(case, path, dtype)
    optimizer = make_private(
        model,
        batch_size=case.examples,
        max_grad_norm=case.bound if clips else math.inf,
        clipping=rule,
        loss_reduction=reduction,
        **path.options,
    )
    x, g = batch_of(case, path)
    finished = record(model, optimizer, x if path.ids else x.to(dtype), g, backwards)
    return norm_of_sums(optimizer, finished)


@contextlib.contextmanager
def subnormals_read_as_zero(flush: bool) -> Iterator[None]:
    """On this thread, as some processors do on all."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
