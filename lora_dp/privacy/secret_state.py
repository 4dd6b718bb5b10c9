"""torch's random generators in a state that nobody can guess, for masks that must be as secret as the noise.

Rows of a batch have their dropout by their place in it. To whoever knew the masks, one example more would shift those
of all behind it: by 15 C, say, where the noise hides 1 C. A seed does not keep masks secret: of the 64 bits that
``torch.manual_seed`` takes, the CPU's generator uses 32, which are soon tried out.

So :func:`renew` sets whole states, drawn from the operating system:

- CPU: the 624 words of MT19937. Masks are then drawn by :mod:`lora_dp.privacy.cpu_draws`, from ChaCha20.
- CUDA: the 64 bits of Philox's key and 60 of its counter, on every device.
- other devices: their own seed of 64 bits.
- Python's ``random`` and NumPy's, by which some models mask spans of their input, and data sets change examples: from
  512 bits each, anew before every batch is fetched and in every pass. So it does not matter who seeds them in between.

From a generator's state the last draws can be told, and by Philox's all of them; and checkpoints hold it, such as those
of Transformers and Accelerate. So all but other devices' get a new state as a pass begins, and another once it is over.

A generator's seed is part of its state and says whether the state is still ours: it is 64 random bits that stand in
a set. Whoever seeds a generator again, or restores a state from elsewhere, replaces them; one who restores a state of
ours, as checkpoints and ``torch.random.fork_rng`` do, puts them back.

A model may seed, draw and restore within its forward, and leave nothing to see afterwards. So while a forward of
training runs, each draw on the CPU asks for a state of ours (:func:`forward_begins`). Not seen: the same on a
CUDA device, NumPy or ``random`` seeded inside the forward, and seeds that a data set or a collate function sets for
draws of its own and takes back.
"""

import functools
import random
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_dp.privacy import cpu_draws
from lora_dp.privacy.randomness import SecureSource

_RESEEDED = (
    "torch's generators were seeded after make_private, so whoever knows that seed knows the dropout masks, and how "
    "the data set changes examples: seed before make_private, or call engine.renew_randomness() after whatever seeds "
    "(Transformers' Trainer and set_seed do)."
)
_SEEDED_INSIDE = (
    "The model seeds a generator inside its forward and draws from it, so its masks are public: draw from torch's "
    "default generator, without torch.manual_seed, set_rng_state or a torch.Generator of the model's own."
)

_SEEDED_IN_FETCH = (
    "The data set or the collate function seeds torch's generators, so whoever knows that seed knows how examples are "
    "changed: draw from torch's default generator without seeding it."
)

# In bytes: seed, two counters of 4, the next word's place; then the words, each in 8.
_WORDS, _WORDS_BEGIN = 624, 24
_STATE_SIZE = 5056

# The seeds that stand in states of ours.
_seeds: set[int] = set()
# Those that were last given to CUDA, where they are keys: a state of any of them may be restored.
_cuda_seeds: deque[int] = deque(maxlen=4096)
# Whether those of CUDA were set, which waits until CUDA is in use.
_cuda_renewed = False


class _Forwards(threading.local):
    """The private training forwards that run in this thread, by their optimizer."""

    def __init__(self) -> None:
        # Weak: one that was interrupted from the keyboard ends with its optimizer, or with the model's next forward.
        self.running: weakref.WeakSet[Any] = weakref.WeakSet()


_forwards = _Forwards()


@functools.cache
def _source() -> SecureSource:
    """Holds the key under which masks are drawn: its own, not an engine's."""
    return SecureSource()


def _secret_key() -> int | None:
    if torch.default_generator.initial_seed() not in _seeds:
        return None
    return _source().next_draw().key  # a forked process has another


def renew() -> None:
    """Draw a new secret state for every generator that masks may come from."""
    cpu_draws.install(_secret_key, _check_draw)
    _draw_by_aten_when_compiled()
    # Every device: those that are named below get more than this.
    torch.manual_seed(secrets.randbits(64))
    _renew_cpu(_new_seed())
    if torch.cuda.is_initialized():
        _renew_cuda()
    _renew_pythons_and_numpys()


def begin_pass(optimizer: object, *, capturing: bool = False) -> None:
    """Refuse a training pass whose masks could be guessed, and give it a state of its own on the CPU, on CUDA, in
    Python's ``random`` and in NumPy.

    The new state keeps passes apart that begin in one state, as inside ``torch.random.fork_rng``.

    Args:
        optimizer: the private one that takes the pass; nothing happens where its source of randomness is seeded.
        capturing: inside the capture of a CUDA graph, which takes no new state on CUDA.

    Raises:
        RuntimeError: a generator was seeded since :func:`renew`.
    """
    forward_ends(optimizer)  # one that was interrupted
    if _is_secret(optimizer):
        _begin_anew(capturing)


def begin_fetch(source: object) -> None:
    """The same before a batch is fetched in this process: examples may be changed at random as they are read.

    Args:
        source: of the loader's randomness; nothing happens where it is seeded.

    Raises:
        RuntimeError: a generator of torch's was seeded since :func:`renew`.
    """
    if getattr(source, "secure", False):
        _begin_anew()


def _begin_anew(capturing: bool = False) -> None:
    _check(_RESEEDED)
    _renew_cpu(torch.default_generator.initial_seed())
    if torch.cuda.is_initialized() and not capturing:
        _renew_cuda()
    _renew_pythons_and_numpys()


def forward_begins(optimizer: object) -> None:
    """From here to :func:`forward_ends` a draw on the CPU, in this thread, from a state that is not ours raises
    RuntimeError: from the default generator after a seed, or from one that is the model's own.

    Args:
        optimizer: the private one that takes the pass; nothing happens where its source of randomness is seeded.
    """
    if _is_secret(optimizer):
        _forwards.running.add(optimizer)


def forward_ends(optimizer: object) -> None:
    """The forward that began for this optimizer is over, or never began."""
    if optimizer is not None:
        _forwards.running.discard(optimizer)


def _check_draw(generator: torch.Generator | None) -> None:
    if not _forwards.running:
        return
    if not cpu_draws.is_default(generator) or torch.default_generator.initial_seed() not in _seeds:
        raise RuntimeError(_SEEDED_INSIDE)


def end_pass(optimizer: object) -> None:
    """Refuse a pass during which a generator was seeded, by a module of the model say; what the generators hold from
    here on tells nothing of it.

    Raises:
        RuntimeError: as for :func:`begin_pass`.
    """
    if _is_secret(optimizer):
        _begin_anew()


def _is_secret(optimizer: object) -> bool:
    mechanism = getattr(optimizer, "mechanism", None)
    return bool(getattr(getattr(mechanism, "source", None), "secure", False))


def _check(refusal: str) -> None:
    generators = [torch.default_generator, *_cuda_generators()]
    if any(generator.initial_seed() not in _seeds for generator in generators):
        raise RuntimeError(refusal)


@contextmanager
def secret_generators() -> Iterator[None]:
    """A new secret state inside; afterwards all generators are as they were."""
    global _cuda_renewed
    before, by_python, by_numpy = (set(_seeds), _cuda_renewed), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            renew()
            yield
        finally:
            random.setstate(by_python)
            np.random.set_state(by_numpy)
            _seeds.intersection_update(before[0])
            _cuda_renewed = before[1]


WorkerInit = Callable[[int], Any]


def worker_init(own: WorkerInit | None, source: object) -> WorkerInit | None:
    """The ``worker_init_fn`` of a loader under this source of randomness: a secure one's workers draw in secret too
    (augmentations, say), where torch would seed each with 32 bits. The user's own function comes first."""
    return _SecretWorker(own) if getattr(source, "secure", False) else own


class _SecretWorker:
    """A class: workers may be spawned, and are then handed it pickled."""

    def __init__(self, own: WorkerInit | None):
        self.own = own

    def __call__(self, worker: int) -> None:
        if self.own is not None:
            self.own(worker)
        renew()


Collate = Callable[[Any], Any]


def collation(own: Collate, source: object) -> Collate:
    """The ``collate_fn`` of a loader under this source of randomness: a secure one's begins in a new secret state of
    Python's ``random`` and of NumPy, and leaves one to the next batch of its process, a worker say. Whoever seeds these
    while examples are read, or collated, does so for no later draws. One who seeds torch is refused.
    """
    return _SecretCollation(own) if getattr(source, "secure", False) else own


class _SecretCollation:
    """A class, as :class:`_SecretWorker` is."""

    def __init__(self, own: Collate):
        self.own = own

    def __call__(self, examples: Any) -> Any:
        self._renew()
        batch = self.own(examples)
        self._renew()
        return batch

    @staticmethod
    def _renew() -> None:
        _check(_SEEDED_IN_FETCH)
        _renew_pythons_and_numpys()


def _new_seed() -> int:
    seed = secrets.randbits(64)
    _seeds.add(seed)
    return seed


def _random_words() -> np.ndarray:
    """A state of MT19937: 624 words of the operating system."""
    return np.frombuffer(secrets.token_bytes(4 * _WORDS), np.uint32)


def _renew_pythons_and_numpys() -> None:
    random.seed(secrets.token_bytes(64))
    np.random.seed(np.frombuffer(secrets.token_bytes(64), np.uint32))


def _renew_cpu(seed: int) -> None:
    state = _seeded_layout().clone()
    state[:8] = torch.from_numpy(np.array([seed], np.uint64).view(np.uint8))
    words = state[_WORDS_BEGIN : _WORDS_BEGIN + 8 * _WORDS].view(torch.int64)
    words.copy_(torch.from_numpy(_random_words().astype(np.int64)))
    torch.default_generator.set_state(state)


@functools.cache
def _seeded_layout() -> Tensor:
    """The state of a CPU generator just seeded, with nothing drawn."""
    state = torch.Generator("cpu").manual_seed(0).get_state()
    if state.numel() != _STATE_SIZE:
        raise RuntimeError(
            f"This version of torch keeps its CPU generator in {state.numel()} bytes instead of {_STATE_SIZE}, which "
            "lora_dp cannot fill: use a version that it was tested with, or reproducible_seed for research."
        )
    return state


def _renew_cuda() -> None:
    global _cuda_renewed
    _cuda_renewed = True
    for generator in torch.cuda.default_generators:
        # Philox counts in fours, and 2^62 are left to count on.
        if len(_cuda_seeds) == _cuda_seeds.maxlen:
            _seeds.discard(_cuda_seeds[0])
        _cuda_seeds.append(_new_seed())
        state = np.array([_cuda_seeds[-1], 4 * secrets.randbits(60)], np.uint64)
        generator.set_state(torch.from_numpy(state.view(np.uint8)))


def _cuda_generators() -> tuple[torch.Generator, ...]:
    """Those of CUDA, set once CUDA is in use: a process that may still fork must not start it."""
    if not torch.cuda.is_initialized():
        return ()
    if not _cuda_renewed:
        _renew_cuda()
    return torch.cuda.default_generators


def _draw_by_aten_when_compiled() -> None:
    """Inductor would draw by Philox under one 64-bit seed a graph: compiled models shall call eager ones' kernels."""
    import torch._inductor.config as inductor

    inductor.fallback_random = True
