"""The per-example gradient's kernel against its float64 definition: gradients, their norms and u."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_dp.kernels import example_grad as module
from lora_dp.kernels.example_grad import CONFIGS, ExampleGrad, example_grad
from lora_dp.kernels.launching import DTYPES, Config

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
examples = settings(max_examples=20, deadline=None)
SCALE = 0.37
# Blocks so small that several of the width, of the rank and spans of tokens occur.
SMALL = Config.of(2, 2, CHUNK=16, BLOCK_T=16, BLOCK_R=16, SPAN=16)
WHOLE = Config.of(4, 2, CHUNK=32, BLOCK_T=64, BLOCK_R=64, SPAN=1024)

Draw = Callable[[torch.Size | tuple[int, ...], torch.dtype, torch.device], Tensor]


def contiguous(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def transposed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return contiguous((*shape[:-2], shape[-1], shape[-2]), dtype, device).transpose(-1, -2)


def sliced(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every other column of a wider tensor, beside NaNs that must not enter."""
    storage = torch.full((*shape[:-1], 2 * shape[-1] + 3), float("nan"), dtype=dtype, device=device)
    view = storage[..., 1 : 1 + 2 * shape[-1] : 2]
    return view.copy_(contiguous(shape, dtype, device))


def expanded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return contiguous((1, *shape[1:]), dtype, device).expand(shape)


DRAWS: tuple[Draw, ...] = (contiguous, transposed, sliced, expanded)


def check_found(
    found: ExampleGrad, wide: Tensor, skinny: Tensor, factor: Tensor | None, keep: bool = True, wide_first: bool = True
) -> None:
    n, tokens, width = wide.shape
    r = skinny.shape[2]
    gradients = SCALE * torch.einsum("ntw,ntr->nwr" if wide_first else "ntw,ntr->nrw", wide.double(), skinny.double())
    sq_norms = gradients.square().sum((1, 2))
    if keep:
        assert found.gradients.shape == ((n, width, r) if wide_first else (n, r, width))
        assert found.gradients.dtype == torch.float32 and found.gradients.is_contiguous()
        assert (found.gradients.double() - gradients).norm() <= 1e-6 * gradients.norm()
        sq_norms = found.gradients.double().square().sum((1, 2))
    else:
        assert found.gradients is None
    assert found.sq_norms.shape == (n,) and found.sq_norms.dtype == torch.float64
    # Of what was stored, in float64; of what was not, with the rounding of the gradients themselves.
    torch.testing.assert_close(found.sq_norms, sq_norms, rtol=1e-13 if keep else 1e-6, atol=0)
    if factor is None:
        assert found.u is None
        return
    assert found.u.shape == (n, tokens, r) and found.u.dtype == wide.dtype and found.u.is_contiguous()
    u = wide.double() @ factor.double()
    # Rounded once to a half type, in the interpreter of Triton 3.6 towards zero; to float32 at every addition.
    roundings = 8 if wide.dtype == torch.float32 else 1
    assert (found.u.double() - u).norm() <= roundings * torch.finfo(wide.dtype).eps * u.norm()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernels leave unwritten shows as NaN."""
    empty = torch.empty

    def nan_empty(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(module.torch, "empty", nan_empty)


shapes = {"n": st.integers(1, 3), "tokens": st.integers(1, 40), "width": st.integers(1, 70), "r": st.integers(1, 36)}


@examples
@given(
    **shapes,
    dtype=st.sampled_from(DTYPES),
    draws=st.tuples(*[st.sampled_from(DRAWS)] * 3),
    config=st.sampled_from([None, SMALL]),
    with_u=st.booleans(),
    keep=st.booleans(),
    wide_first=st.booleans(),
)
def test_gradients_norms_and_u(device, n, tokens, width, r, dtype, draws, config, with_u, keep, wide_first):
    torch.manual_seed(0)
    wide, skinny = draws[0]((n, tokens, width), dtype, device), draws[1]((n, tokens, r), dtype, device)
    factor = draws[2]((width, r), dtype, device) if with_u else None
    found = example_grad(wide, skinny, SCALE, factor=factor, keep=keep, wide_first=wide_first, config=config)
    check_found(found, wide, skinny, factor, keep, wide_first)


@pytest.mark.parametrize("r", [5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration(device, name, dtype, r):
    wide, skinny = contiguous((1, 19, 130), dtype, device), contiguous((1, 19, r), dtype, device)
    factor = contiguous((130, r), dtype, device)
    check_found(example_grad(wide, skinny, SCALE, factor=factor, config=CONFIGS[name]), wide, skinny, factor)


@pytest.mark.parametrize("r", [1, 16, 100, 256])
def test_ranks(device, r):
    wide, skinny, factor = (contiguous(shape, torch.bfloat16, device) for shape in [(2, 3, 40), (2, 3, r), (40, r)])
    check_found(example_grad(wide, skinny, SCALE, factor=factor), wide, skinny, factor)


@pytest.mark.parametrize("shape", [(3, 16, 128), (9, 2, 30), (1, 600, 20), (1, 33, 800)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_chosen_by_shape(device, dtype, shape):
    """Few examples and many, long and wide."""
    wide, skinny = contiguous(shape, dtype, device), contiguous((*shape[:2], 8), dtype, device)
    factor = contiguous((shape[2], 8), dtype, device)
    with mock.patch.object(module, "multiprocessors", lambda device: 6):
        check_found(example_grad(wide, skinny, SCALE, factor=factor), wide, skinny, factor)
        check_found(example_grad(wide, skinny, SCALE, wide_first=False), wide, skinny, None, wide_first=False)


@pytest.mark.parametrize("wide_first", [True, False])
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_blocks_and_splits_give_the_same(device, wide_first, multiprocessors):
    """Small whole numbers add up exactly in any order."""
    torch.manual_seed(0)
    wide, skinny, factor = (
        torch.randint(-3, 4, shape).to(device, torch.float32) for shape in [(2, 60, 70), (2, 60, 20), (70, 20)]
    )
    whole = example_grad(wide, skinny, 0.5, factor=factor, wide_first=wide_first, config=WHOLE)
    with mock.patch.object(module, "multiprocessors", lambda device: multiprocessors):
        parts = example_grad(wide, skinny, 0.5, factor=factor, wide_first=wide_first, config=SMALL)
    assert all(torch.equal(mine, its) for mine, its in zip(parts, whole, strict=True))
    assert torch.equal(whole.u, wide @ factor)


def test_the_same_inputs_give_the_same_bits(device):
    wide, skinny, factor = (contiguous(shape, torch.bfloat16, device) for shape in [(1, 60, 40), (1, 60, 20), (40, 20)])
    first, second = (example_grad(wide, skinny, SCALE, factor=factor, config=SMALL) for _ in range(2))
    assert all(torch.equal(mine, its) for mine, its in zip(first, second, strict=True))
    kept, norm_only = (example_grad(wide, skinny, SCALE, keep=keep, config=SMALL) for keep in (True, False))
    assert torch.equal(kept.sq_norms, norm_only.sq_norms)


def test_windows_of_an_image(device):
    """A (N · windows, tokens, d) activation as (N, windows · tokens, d), and its transpose, without a copy."""
    activation = torch.randn(2 * 4, 9, 24, device=device)
    wide, skinny = activation.view(2, 36, 24), torch.randn(8, 9, 6, device=device).view(2, 36, 6)
    check_found(example_grad(wide, skinny, SCALE), wide, skinny, None)
    wide = activation.view(2, 4, 9, 24)[:, 1]
    check_found(example_grad(wide, skinny[:, :9], SCALE, config=SMALL), wide, skinny[:, :9], None)


@pytest.mark.parametrize("config", [None, SMALL])
@pytest.mark.parametrize("where", ["wide", "skinny"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_example_keeps_to_itself(device, bad, where, config):
    wide, skinny, factor = (contiguous(shape, torch.float32, device) for shape in [(3, 20, 40), (3, 20, 5), (40, 5)])
    (wide if where == "wide" else skinny)[1, -1, -1] = bad
    found = example_grad(wide, skinny, SCALE, factor=factor, config=config)
    assert torch.isfinite(found.sq_norms).tolist() == [True, False, True]
    rest = [0, 2]
    check_found(ExampleGrad(*[tensor[rest].contiguous() for tensor in found]), wide[rest], skinny[rest], factor)
    finite = torch.isfinite(found.u).all(2)
    assert finite.sum() == (59 if where == "wide" else 60)


def test_half_types_add_up_in_float32(device):
    """4,096 ones: a half-precision accumulator stops at 256 (bfloat16) or 2,048 (float16)."""
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(1, 1, 1, dtype=dtype, device=device).expand(1, 4096, 1)
        found = example_grad(ones, ones, 1.0, config=Config.of(1, 1, CHUNK=16, BLOCK_T=1024, BLOCK_R=16, SPAN=4096))
        assert found.gradients.item() == 4096 and found.sq_norms.item() == 4096**2


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("keep", [True, False])
def test_nothing_gives_zeros(device, shape, keep):
    wide, skinny = torch.empty(shape, device=device), torch.empty((*shape[:2], 2), device=device)
    factor = torch.ones(3, 2, device=device)
    found = example_grad(wide, skinny, 1.0, factor=factor, keep=keep)
    assert found.sq_norms.tolist() == [0.0] * shape[0] and found.u.shape == (*shape[:2], 2)
    if keep:
        assert torch.equal(found.gradients, torch.zeros(shape[0], 3, 2, device=device))


def test_faults_are_named(device):
    wide, skinny = torch.zeros(2, 3, 8, device=device), torch.zeros(2, 3, 4, device=device)
    with pytest.raises(ValueError, match=r"example_grad: skinny must have the shape \(2, 3, any\), got \(2, 4, 4\)"):
        example_grad(wide, torch.zeros(2, 4, 4, device=device), 1.0)
    with pytest.raises(ValueError, match=r"example_grad: factor must have the shape \(8, 4\), got \(4, 8\)"):
        example_grad(wide, skinny, 1.0, factor=torch.zeros(4, 8, device=device))
    with pytest.raises(ValueError, match="example_grad: the rank must be from 1 to 256, got 257"):
        example_grad(wide, torch.zeros(2, 3, 257, device=device), 1.0)
    with pytest.raises(TypeError, match="example_grad: skinny must be float32, got bfloat16"):
        example_grad(wide, skinny.bfloat16(), 1.0)
    with pytest.raises(TypeError, match="example_grad: wide must be float32 or bfloat16 or float16, got float64"):
        example_grad(wide.double(), skinny.double(), 1.0)
    with pytest.raises(ValueError, match="example_grad: wide must be on"):
        example_grad(wide.to("meta"), skinny.to("meta"), 1.0)
    with pytest.raises(ValueError, match="example_grad: factor must be on"):
        example_grad(wide, skinny, 1.0, factor=torch.zeros(8, 4, device="meta"))
