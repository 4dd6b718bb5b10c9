"""What torch draws on a CPU, from ChaCha20 instead, while its generator is in a secret state.

Torch's own kernels do not keep what a secret state gives them. On Intel's processors ``bernoulli_``, and so dropout,
takes one number from the generator and seeds MKL's MCG31 with it: 31 bits for a whole mask, to be tried out one by one.
Elsewhere values come from MT19937, whose output is linear in its state.

The kernels here take a nonce of 87 bits from the generator, and their values from the ChaCha20 stream of a secret key
under that nonce. So they follow the generator's state, as a checkpoint's second forward needs it, and yet nobody who
lacks the key can tell them from independent ones.
"""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_dp.ops.native import native

_LIBRARY = torch.library.Library("aten", "IMPL")
_PARAMETERS = 2**24
# Torch's own kernels draw these, by which a model may mask as well: with those replaced, all that draw on a CPU.
_CHECKED = (
    "random_",
    "random_.from",
    "random_.to",
    "normal_",
    "normal.Tensor_float",
    "normal.Tensor_float_out",
    "normal.float_Tensor",
    "normal.float_Tensor_out",
    "normal.Tensor_Tensor",
    "normal.Tensor_Tensor_out",
    "log_normal_",
    "geometric_",
    "cauchy_",
    "poisson",
    "binomial",
    "_standard_gamma",
    "_sample_dirichlet",
    "multinomial",
    "multinomial.out",
    "randperm.generator_out",
    "rrelu_with_noise",
    "rrelu_with_noise.out",
    "rrelu_with_noise_",
)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Torch's own, for `_bits`: no check, and no way through the dispatcher, for two numbers.
_RANDOM = torch.library.get_kernel("aten::random_", "CPU")
_lock = threading.RLock()


def install(secret_key: Callable[[], int | None], check: Callable[[torch.Generator | None], None]) -> None:
    """Replace torch's kernels for the rest of this process; once.

    Args:
        secret_key: the number of the native library's key to draw under, or None to leave a call to torch.
        check: called before torch's own kernels draw from the generator given, None for the default one; may refuse.
    """
    global _secret_key, _check
    _secret_key, _check = secret_key, check
    if _LIBRARY._op_impls:
        return
    with warnings.catch_warnings():
        # That a kernel is replaced, which torch says once, is meant.
        warnings.simplefilter("ignore", UserWarning)
        for name, draw in (
            ("bernoulli_.float", _bernoulli),
            ("bernoulli_.Tensor", _bernoulli_of),
            ("uniform_", _uniform),
            ("exponential_", _exponential),
        ):
            _LIBRARY.impl(name, _replacing(name, draw), "CPU", with_keyset=True)
        _LIBRARY.impl("bernoulli.out", _bernoulli_out, "CPU")
        for name in _CHECKED:
            _LIBRARY.impl(name, _checking(name), "CPU", with_keyset=True)


def _no_key() -> int | None:
    return None


def _no_check(generator: torch.Generator | None) -> None:
    pass


_secret_key: Callable[[], int | None] = _no_key
_check: Callable[[torch.Generator | None], None] = _no_check


def is_default(generator: torch.Generator | None) -> bool:
    """Whether this is what draws where no generator is given; torch hands a kernel another object for the same."""
    return generator is None or generator._cdata == torch.default_generator._cdata  # type: ignore[attr-defined]


def _replacing(name: str, draw: Callable[..., bool]) -> Callable[..., Tensor]:
    """``draw`` where the default generator is secret; torch's kernel for a generator that the caller gives, and where
    ``draw`` returns False: for what it does not know, or torch has to refuse."""
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, out: Tensor, *given: Any, generator: torch.Generator | None = None) -> Tensor:
        with _lock:  # as torch's: two threads must not take one nonce
            if is_default(generator):
                key = _secret_key()
                if key is not None and draw(key, out, *given):
                    return out
            _check(generator)
            original.call_boxed(keys, out, *given, generator=generator)
            return out

    return kernel


def _checking(name: str) -> Callable[..., Any]:
    """Torch's kernel, asked for only where the state that it draws from may be drawn from."""
    original = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, *given: Any, **named: Any) -> Any:
        _check(next((value for value in (*given, *named.values()) if isinstance(value, torch.Generator)), None))
        return original.call_boxed(keys, *given, **named)

    return kernel


def _bits(key: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Uniform bits, all those of ``dtype`` (int32 or int64), of a stream that the default generator chooses."""
    numbers = torch.empty(2, dtype=torch.int64, device="cpu")
    _RANDOM.call_boxed(_CPU, numbers)
    draw, parameter = numbers.tolist()
    bits = torch.empty(shape, dtype=dtype, device="cpu")
    native.mask_bits(key, parameter % _PARAMETERS, draw, bits.data_ptr(), bits.element_size() * bits.numel())
    return bits


def _bernoulli(key: int, out: Tensor, p: float = 0.5) -> bool:
    if not 0 <= p <= 1:
        return False
    # p in steps of 2^-32; bits are signed, in [-2^31, 2^31).
    threshold = round(p * 2**32) - 2**31
    if threshold == 2**31:
        out.fill_(1)
    else:
        out.copy_(_bits(key, out.shape, torch.int32) < threshold)
    return True


def _bernoulli_of(key: int, out: Tensor, p: Tensor) -> bool:
    if not p.is_floating_point() or p.device.type != "cpu" or not bool(((p >= 0) & (p <= 1)).all()):
        return False
    thresholds = p.double().mul(2.0**32).round_().sub_(2.0**31)
    out.copy_(_bits(key, out.shape, torch.int32) < thresholds)
    return True


def _bernoulli_out(p: Tensor, *, generator: torch.Generator | None = None, out: Tensor) -> Tensor:
    return out.resize_(p.shape).bernoulli_(p, generator=generator)


def _uniform(key: int, out: Tensor, low: float = 0.0, high: float = 1.0) -> bool:
    if not out.is_floating_point() or not low <= high <= low + torch.finfo(out.dtype).max:
        return False
    # As many bits as the dtype has, so that rounding never reaches 1.
    exact = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(out.dtype)
    if exact is None:
        return False
    wide, width = (torch.float64, 64) if out.dtype == torch.float64 else (torch.float32, 32)
    bits = _bits(key, out.shape, torch.int64 if width == 64 else torch.int32)
    unit = bits.bitwise_right_shift_(width - exact).bitwise_and_(2**exact - 1).to(wide).mul_(2.0**-exact)
    out.copy_(unit.mul_(high - low).add_(low))
    return True


def _exponential(key: int, out: Tensor, rate: float = 1.0) -> bool:
    if not out.is_floating_point() or not 0 < rate < float("inf"):
        return False
    # In (0, 1]: never log 0.
    unit = _bits(key, out.shape, torch.int64).bitwise_and_(2**53 - 1).double().add_(1).mul_(2.0**-53)
    out.copy_(unit.log_().div_(-rate))
    return True
