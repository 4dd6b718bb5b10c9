"""What torch draws on a CPU in a secret state: the right distributions, by ChaCha20 under the secret key."""

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.ops.native import native
from lora_dp.privacy import cpu_draws, secret_state
from tests.sources import forks, in_child
from tests.support import Z_LIMIT

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
P_LEAST = 1e-6


@pytest.fixture(autouse=True)
def secret() -> Iterator[None]:
    with secret_state.secret_generators():
        yield


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.int64, torch.uint8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.937, 1e-3])
def test_bernoulli(dtype: torch.dtype, p: float) -> None:
    n = 200_000
    for out in (
        torch.full((n,), 7).to(dtype).bernoulli_(p),
        torch.zeros(n // 2, 4, dtype=dtype)[:, ::2].bernoulli_(p),
        torch.zeros(n, dtype=dtype).bernoulli_(torch.full((n,), p, dtype=torch.float64)),
    ):
        assert out.dtype == dtype and set(out.double().unique().tolist()) == {0.0, 1.0}
        ones = float(out.double().sum())
        assert abs(ones - n * p) < Z_LIMIT * (n * p * (1 - p)) ** 0.5


def test_bernoulli_of_certain_and_impossible_events() -> None:
    for p in (0.0, 1.0):
        assert bool((torch.full((9999,), 3.0).bernoulli_(p) == p).all())
        assert bool((torch.full((9999,), 3.0).bernoulli_(torch.tensor(p)) == p).all())
    assert torch.zeros(0).bernoulli_(0.5).shape == (0,)
    assert torch.bernoulli(torch.tensor([0.0, 1.0, 1.0])).tolist() == [0, 1, 1]


def test_bernoulli_takes_a_chance_for_each_element() -> None:
    p = torch.tensor([0.02, 0.5, 0.9])
    ones = torch.zeros(100_000, 3).bernoulli_(p).sum(0)
    assert bool(((ones - 1e5 * p).abs() < Z_LIMIT * (1e5 * p * (1 - p)).sqrt()).all())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.zeros(3).bernoulli_(1.5),
        lambda: torch.zeros(3).bernoulli_(-0.1),
        lambda: torch.bernoulli(torch.tensor([0.5, 1.5])),
        lambda: torch.zeros(3).bernoulli_(float("nan")),
        lambda: torch.zeros(3).uniform_(2, 1),
        lambda: torch.zeros(3).exponential_(-1.0),
        lambda: torch.zeros(3).exponential_(0.0),
        lambda: torch.zeros(3).bernoulli_(torch.tensor([0, 1, 1])),
        lambda: torch.empty(3, dtype=torch.float8_e5m2).uniform_(),
        lambda: torch.zeros(1).expand(4).bernoulli_(0.5),
    ],
)
def test_what_torch_refuses_stays_refused(draw: Callable[[], Tensor]) -> None:
    with pytest.raises(RuntimeError):
        draw()


@pytest.mark.parametrize("dtype, digits", [*zip(FLOATS, [24, 53, 11, 8], strict=True)])
def test_uniform(dtype: torch.dtype, digits: int) -> None:
    drawn = torch.rand(100_000, dtype=dtype)
    assert drawn.dtype == dtype and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert bool((drawn.double() * 2**digits == (drawn.double() * 2**digits).round()).all())
    # On a grid of 2^-digits: the middles of its steps are uniform up to half a step.
    middles = drawn.double().numpy() + 2.0**-digits * np.random.default_rng(0).uniform(size=len(drawn))
    assert stats.kstest(middles, "uniform").pvalue > P_LEAST
    moved = torch.empty(100_000, dtype=dtype).uniform_(-3, 5)
    assert float(moved.min()) >= -3 and float(moved.max()) <= 5
    assert abs(float(moved.double().mean()) - 1) < Z_LIMIT * 8 / (12 * 1e5) ** 0.5 + 2.0 ** (3 - digits)


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_exponential(rate: float) -> None:
    drawn = torch.empty(100_000, dtype=torch.float64).exponential_(rate)
    assert float(drawn.min()) > 0
    assert stats.kstest(drawn.numpy(), "expon", args=(0, 1 / rate)).pvalue > P_LEAST
    assert stats.kstest(torch.empty(100_000).exponential_(rate).numpy(), "expon", args=(0, 1 / rate)).pvalue > P_LEAST


def given_bits(monkeypatch: pytest.MonkeyPatch, *words: int) -> None:
    """The stream under the key is these words from now on, of 32 or 64 bits as they are asked for."""

    def mask_bits(key: int, parameter: int, draw: int, pointer: int, size: int) -> None:
        bits = np.array(words, np.int64).astype(np.int32 if size == 4 * len(words) else np.int64)
        ctypes.memmove(pointer, bits.tobytes(), size)

    monkeypatch.setattr(cpu_draws, "native", SimpleNamespace(mask_bits=mask_bits))


@pytest.mark.parametrize("dtype, digits", [*zip(FLOATS, [24, 53, 11, 8], strict=True)])
def test_uniform_is_the_first_bits_of_a_word(dtype: torch.dtype, digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    half = -(2**63) if dtype == torch.float64 else -(2**31)
    given_bits(monkeypatch, 0, -1, half)
    assert torch.rand(3, dtype=dtype).tolist() == [0.0, 1 - 2.0**-digits, 0.5]
    assert torch.empty(3, dtype=dtype).uniform_(-3, 5)[::2].tolist() == [-3.0, 1.0]


def test_exponential_is_never_infinite_and_may_be_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    given_bits(monkeypatch, 0, -1, 2**52 - 1)
    drawn = torch.empty(3, dtype=torch.float64).exponential_(2.0)
    expected = torch.tensor([53 * np.log(2) / 2, 0.0, np.log(2) / 2], dtype=torch.float64)
    torch.testing.assert_close(drawn, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.3, (1000 + 0.3) / 2**32, (1000 + 0.7) / 2**32])
def test_bernoulli_is_exact_to_32_bits(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for chance in (torch.tensor(p, dtype=torch.float64), torch.tensor(p)):  # in the float32 that it is given in, too
        threshold = round(float(chance) * 2**32) - 2**31
        given_bits(monkeypatch, threshold - 1, threshold)
        assert torch.zeros(2).bernoulli_(chance.expand(2)).tolist() == [1, 0]
        assert torch.zeros(2).bernoulli_(float(chance)).tolist() == [1, 0]
    given_bits(monkeypatch, -1, 0)
    assert torch.zeros(2).bernoulli_().tolist() == [1, 0]


class _DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape[0], 1, 1) < 0.5)


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), dropout_p=0.5)


def _lora() -> nn.Module:
    layer = DPLoRALinear(8, 8, r=2, dropout=0.5)
    nn.init.ones_(layer.lora_B)
    return layer


def _timm_drop_path() -> nn.Module:
    return pytest.importorskip("timm").layers.DropPath(0.5)


def _torchvision_depth(x: Tensor) -> Tensor:
    return pytest.importorskip("torchvision").ops.stochastic_depth(x, 0.5, "row")


def _gumbel(x: Tensor) -> Tensor:
    return F.gumbel_softmax(x, hard=True)


def _multihead() -> nn.Module:
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return Net()


class _LSTM(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


DROPPING: dict[str, Any] = {
    "F.dropout": lambda x: F.dropout(x, 0.5),
    "in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "F.dropout1d": lambda x: F.dropout1d(x, 0.5),
    "nn.Dropout2d": lambda x: nn.Dropout2d(0.5)(x.unsqueeze(0)),
    "nn.AlphaDropout": nn.AlphaDropout(0.5),
    "nn.FeatureAlphaDropout": nn.FeatureAlphaDropout(0.5),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "sdpa": _attention,
    "multihead": _multihead(),
    "adapter": _lora(),
    "lstm": _LSTM(8, 8, 2, dropout=0.5, batch_first=True),
    "rand": _DropPath(),
    "rand_like": lambda x: x * (torch.rand_like(x) < 0.5),
    "bernoulli": lambda x: x * torch.bernoulli(x * 0 + 0.5),
    "gumbel": _gumbel,
    "timm": lambda x: _timm_drop_path()(x),
    "torchvision": _torchvision_depth,
}


def check_hangs_on_the_key(drop: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator's state is given away: one key brings the same values back, another key others."""
    x, state = torch.randn(64, 12, 8), torch.get_rng_state()

    def values(key: int) -> Tensor:
        torch.set_rng_state(state)
        monkeypatch.setattr(cpu_draws, "_secret_key", lambda: key)
        return drop(x).detach()

    first, second = native.new_key(), native.new_key()
    assert torch.equal(values(first), values(first))
    assert not torch.equal(values(first), values(second))
    native.drop_key(first), native.drop_key(second)


@pytest.mark.parametrize("name", DROPPING)
def test_whatever_drops_draws_under_the_secret_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_hangs_on_the_key(DROPPING[name], monkeypatch)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.empty(99).exponential_(0.2),
        lambda x: torch.empty(99).uniform_(0, torch.finfo(torch.float32).max),
        lambda x: torch.bernoulli(torch.tensor([0, 0.5] * 99)),
        lambda x: torch.bernoulli(torch.tensor([0.5, 1] * 99)),
        lambda x: torch.empty(99, dtype=torch.bool).bernoulli_(0.5),
    ],
)
def test_at_the_edges_too_draws_are_under_the_secret_key(
    draw: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_hangs_on_the_key(draw, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["F.dropout", "rand", "sdpa"])
def test_what_is_compiled_draws_under_the_secret_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    check_hangs_on_the_key(torch.compile(DROPPING[name], fullgraph=True), monkeypatch)
    torch._dynamo.reset()


def test_a_mask_is_the_keystream_of_the_nonce_that_the_generator_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    key, state = native.key_from(bytes(range(32))), torch.get_rng_state()
    monkeypatch.setattr(cpu_draws, "_secret_key", lambda: key)
    mask = torch.zeros(1000).bernoulli_(0.3)
    torch.set_rng_state(state)
    draw, parameter = (int(torch.empty((), dtype=torch.int64).random_()) for _ in range(2))
    nonce = np.array([3 << 24 | parameter % 2**24, draw % 2**32, draw >> 32], np.uint32)
    bits = np.empty(1000, np.int32)
    native.keystream(bytes(range(32)), nonce.tobytes(), 0, bits.ctypes.data, 4000)
    assert mask.tolist() == (bits / 2**32 + 0.5 < 0.3).tolist()
    native.drop_key(key)


def test_calls_in_turn_draw_other_values() -> None:
    masks = torch.stack([torch.zeros(64).bernoulli_(0.5) for _ in range(200)])
    assert len(masks.unique(dim=0)) == 200


def words_taken(draw: Callable[[], Any]) -> int:
    """How many numbers of the generator a call takes, up to 5000."""
    torch.manual_seed(1)
    draw()
    after, number = torch.get_rng_state()[:5016], torch.empty((), dtype=torch.int32)
    torch.manual_seed(1)
    for taken in range(5000):
        if torch.equal(torch.get_rng_state()[:5016], after):
            return taken
        number.random_()
    return 5000


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(1000),
        lambda: torch.randint(9, (1000,)),
        lambda: torch.empty(1000).random_(),
        lambda: torch.randperm(1000),
        lambda: torch.multinomial(torch.ones(1000), 999, replacement=True),
        lambda: torch.empty(1000).cauchy_(),
        lambda: torch.empty(1000).geometric_(0.5),
        lambda: torch.empty(1000).log_normal_(),
        lambda: F.rrelu(-torch.ones(1000), training=True),
        lambda: torch.poisson(torch.ones(1000)),
        lambda: torch.normal(torch.zeros(1000), 1.0),
        lambda: torch._standard_gamma(torch.ones(1000)),
        lambda: torch.binomial(torch.ones(1000) * 9, torch.rand(1000)),
    ],
)
def test_kernels_that_stay_torchs_take_a_word_for_every_value(draw: Callable[[], Any]) -> None:
    """Else one would have to be replaced too: all that it draws would hang on the few bits that it takes."""
    assert words_taken(draw) >= 999


def test_a_public_seed_and_a_generator_of_ones_own_stay_torchs() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        public = [torch.rand(9).tolist() for _ in range(2)]
        torch.manual_seed(5)
        assert [torch.rand(9).tolist() for _ in range(2)] == public
    own = [torch.rand(9, generator=torch.Generator().manual_seed(5)).tolist() for _ in range(2)]
    assert own[0] == own[1] == public[0]
    half = torch.full((64,), 0.5)
    for out in (None, torch.empty(64)):
        mask = [torch.bernoulli(half, generator=torch.Generator().manual_seed(5), out=out).tolist() for _ in range(2)]
        assert mask[0] == mask[1]


@pytest.mark.slow
def test_that_kernels_are_replaced_is_no_warning_to_the_user() -> None:
    code = """import warnings
from lora_dp.privacy import cpu_draws
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        cpu_draws.install(lambda: None, lambda generator: None)
assert not seen, seen
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@forks
def test_a_forked_process_draws_other_masks_from_the_same_state() -> None:
    def mask() -> list[float]:
        return torch.zeros(64).bernoulli_(0.5).tolist()

    state = torch.get_rng_state()
    children = [in_child(mask) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(found) for found in (*children, mask())}) == 3


def test_the_default_generator_given_by_name_is_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    drawn = torch.rand(8, generator=torch.default_generator)
    torch.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(8))
    torch.set_rng_state(state)
    monkeypatch.setattr(cpu_draws, "_secret_key", lambda: None)
    assert not torch.equal(drawn, torch.rand(8))  # torch's own kernel
