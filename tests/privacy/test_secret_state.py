"""Torch's generators during private training: whole states that nobody can guess, and none that somebody seeded."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lora_dp.engine.hooks
from lora_dp import DPLinear, PrivacyEngine
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.privacy import secret_state
from lora_dp.privacy.randomness import SecureSource, SeededSource
from tests.privacy.drawing_models import _PUBLIC, SEEDED, Net, private, step
from tests.sources import forks
from tests.support import make_private

pytestmark = pytest.mark.usefixtures("callers_state")


def words() -> np.ndarray:
    return torch.get_rng_state().numpy()[24 : 24 + 8 * 624].view(np.uint64)


def is_of_a_seed() -> bool:
    """Whether the CPU's state is one that ``manual_seed`` makes of the seed in it."""
    return torch.equal(torch.Generator().manual_seed(torch.initial_seed()).get_state(), torch.get_rng_state())


MODULES = [
    lambda: Net(),
    lambda: Net(lambda x: x),
    lambda: nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1).requires_grad_(False), DPLinear(4, 2)),
]


@pytest.mark.parametrize("make", MODULES)
def test_make_private_draws_all_624_words_whatever_the_model_has_in_it(make: Callable[[], nn.Module]) -> None:
    found = []
    for _ in range(2):
        private(make())
        assert not is_of_a_seed()
        found.append(words())
    together = np.concatenate(found)
    assert together.max() < 2**32 and len(np.unique(together)) > 1240  # 1248 random words: one repeats rarely
    bits = np.unpackbits(together.astype(np.uint32).view(np.uint8)).reshape(2, -1)
    assert abs(bits.mean() - 0.5) < 5.4 * 0.5 / bits.size**0.5
    assert abs((bits[0] == bits[1]).mean() - 0.5) < 5.4 * 0.5 / bits[0].size ** 0.5


def test_pythons_and_numpys_generators_are_as_secret() -> None:
    """Some models mask spans of their input by them."""
    found = []
    for _ in range(2):
        private(Net())
        found.append((random.getstate()[1], np.random.get_state()[1].tolist()))
    assert len(set(found[0][0]) & set(found[1][0])) < 5 and len(set(found[0][1]) & set(found[1][1])) < 5
    random.seed(3)
    np.random.seed(3)
    public = random.getstate()[1], np.random.get_state()[1].tolist()
    assert public not in found


def test_a_reproducible_engine_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = Net()
    torch.set_rng_state(before[0])
    optimizer = private(model, seed=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    optimizer_engine = PrivacyEngine(reproducible_seed=1)
    optimizer_engine.renew_randomness()
    assert torch.equal(torch.get_rng_state(), before[0])
    torch.manual_seed(3)
    step(model, optimizer)  # and one may seed when one likes


def _by_transformers() -> None:
    pytest.importorskip("transformers").set_seed(42)


@pytest.mark.parametrize(
    "seed",
    [
        lambda: torch.manual_seed(0),
        lambda: torch.random.seed(),
        _by_transformers,
        lambda: torch.set_rng_state(_PUBLIC),
        lambda: torch.default_generator.manual_seed(7),
    ],
)
def test_a_pass_after_a_seed_is_refused_until_the_state_is_renewed(seed: Callable[[], Any]) -> None:
    model, engine = Net().train(), PrivacyEngine("rdp")
    optimizer = make_private(model, batch_size=4, engine=engine, noise_multiplier=1.0)
    step(model, optimizer)
    seed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=rf"{SEEDED}.*engine\.renew_randomness\(\)"):
            model(torch.ones(4, 4))
    assert engine.ledger.steps == 1
    model.eval()(torch.ones(4, 4))  # draws no masks
    engine.renew_randomness()
    step(model.train(), optimizer)
    assert engine.ledger.steps == 2


@pytest.mark.parametrize("where", ["forward", "before the step"])
def test_a_seed_set_during_the_pass_stops_its_step(where: str) -> None:
    model, engine = Net(lambda x: (torch.manual_seed(0), x)[1] if where == "forward" else x), PrivacyEngine("rdp")
    optimizer = make_private(model.train(), batch_size=4, engine=engine, noise_multiplier=1.0)
    optimizer.batch.expect(4)
    model(torch.ones(4, 4)).square().sum(1).mean().backward()
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=SEEDED):
        optimizer.step()
    assert engine.ledger.steps == 0


def test_a_fork_or_a_state_put_back_is_no_seed() -> None:
    model = Net()
    optimizer = private(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.rand(3)
    step(model, optimizer)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    step(model, optimizer)


def test_passes_that_begin_in_one_state_have_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    masks: list[Tensor] = []

    def dropped(x: Tensor) -> Tensor:
        masks.append(F.dropout(torch.ones(64), 0.5))
        return x

    model = Net(dropped)
    optimizer = private(model)
    for _ in range(3):
        with torch.random.fork_rng():
            step(model, optimizer)
    assert len(torch.stack(masks[-3:]).unique(dim=0)) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoints_second_forward_draws_the_same_masks(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_dp.engine.hooks, "drawn_for_test", lambda: False)
    masks: list[Tensor] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = DPLinear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            dropped = F.dropout(self.layer(x), 0.5)
            masks.append(dropped.detach() == 0)
            return dropped.tanh()  # whose output is the last that the second forward must find

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Deep()
    optimizer = private(model)
    step(model, optimizer)
    masks.clear()
    optimizer.batch.expect(4)
    loss = model(torch.ones(4, 4)).square().sum(1).mean()
    assert len(masks) == 3
    torch.rand(5)  # something else draws in between
    loss.backward()
    optimizer.step()
    assert len(masks) == 6
    for first, again in zip(masks[:3], reversed(masks[3:]), strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(masks[0], masks[1]) or not torch.equal(masks[1], masks[2])


def test_the_attack_by_the_seed_that_stands_in_the_state_fails() -> None:
    """Masks are not those of the seed in the state, nor of its low 32 bits: what an attacker would try out."""
    masks: list[Tensor] = []
    model = Net(lambda x: (masks.append(F.dropout(torch.ones(256), 0.5)), x)[1])
    optimizer = private(model)
    step(model, optimizer)
    seed = torch.initial_seed()
    for guess in (seed, seed % 2**32):
        with torch.random.fork_rng():
            torch.manual_seed(guess)
            candidates = torch.stack([F.dropout(torch.ones(256), 0.5) for _ in range(50)])
        # 256 fair bits agree in more than 3/4 of places once in 10^15.
        assert float((candidates == masks[-1]).float().mean(1).max()) < 0.75


def test_the_callers_generators_are_put_back() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    outer = set(secret_state._seeds)
    seeds = set()
    for _ in range(2):
        with secret_state.secret_generators():
            assert not is_of_a_seed()
            seeds.add(torch.initial_seed())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert len(seeds) == 2 and secret_state._seeds == outer


def test_a_secret_state_around_another_stays_good() -> None:
    model = Net()
    optimizer = private(model)
    with secret_state.secret_generators():
        other = Net()
        step(other, private(other))
    step(model, optimizer)


class Draws(Dataset[Any]):
    """Of each example: whether torch's state is of the seed in it, and a draw of each generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[bool, float, float, float]:
        return is_of_a_seed(), float(torch.rand(())), random.random(), np.random.rand()


def _seed_publicly(worker: int) -> None:
    torch.manual_seed(worker)
    random.seed(0)
    np.random.seed(0)


@pytest.mark.slow
@forks
@pytest.mark.parametrize("own", [None, _seed_publicly])
def test_workers_of_the_loader_draw_in_secret(own: Callable[[int], None] | None) -> None:
    loader = DataLoader(Draws(), batch_size=8, num_workers=2, worker_init_fn=own)

    def drawn(engine: PrivacyEngine) -> list[tuple[float, ...]]:
        # At rate 1 every batch is everybody; the two batches come from two workers.
        batches = PrivateDataLoader(loader, engine.source, lambda _: None, lambda: None).take(2)
        return [tuple(torch.cat(column).tolist()) for column in zip(*batches, strict=True)]

    seeded, *secret = drawn(PrivacyEngine())
    assert not any(seeded)
    for column in secret:
        assert len(set(column)) == 16
    if own is not None:
        _, *known = drawn(PrivacyEngine(reproducible_seed=1))
        assert known == drawn(PrivacyEngine(reproducible_seed=1))[1:]
        assert all(not set(a) & set(b) for a, b in zip(known, secret, strict=True))


def test_a_workers_own_function_is_called_with_its_number_and_first() -> None:
    seen: list[int] = []
    begin = secret_state.worker_init(lambda worker: (seen.append(worker), _seed_publicly(worker))[0], SecureSource())
    assert begin is not None
    begin(3)
    assert seen == [3] and not is_of_a_seed()


def test_a_torch_whose_states_are_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_state, "_STATE_SIZE", 5064)
    secret_state._seeded_layout.cache_clear()
    with pytest.raises(RuntimeError, match="keeps its CPU generator in 5056 bytes instead of 5064, .*use a version"):
        private(Net())
    monkeypatch.undo()
    private(Net())


class Noisy(nn.Module):
    """Noise of a normal distribution and choices by NumPy and Python, as some models draw them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drawn = DPLinear(4, 3), [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn = drawn(x.shape)
            x = x + self.drawn[0]
        return self.inner(x)


def drawn(shape: Any) -> list[Tensor]:
    return [torch.randn(shape), torch.from_numpy(np.random.normal(size=4)), torch.tensor(random.random())]


def test_a_state_that_is_saved_after_a_step_tells_nothing_of_it() -> None:
    """As rng_state.pth of Transformers: from the words of MT19937, the draws that they gave can be had again."""
    model = Noisy().train()
    optimizer = private(model)
    with torch.random.fork_rng(devices=[]):
        step(model, optimizer)
        saved = torch.get_rng_state()
        header = saved[:24].view(torch.int32)
        header[2], header[4] = 624, 0  # all words are to come
        by_numpy = np.random.get_state(legacy=True)
        np.random.set_state((by_numpy[0], by_numpy[1], 0, 0, 0.0))
        version, words, rest = random.getstate()
        random.setstate((version, (*words[:-1], 0), rest))
        torch.set_rng_state(saved)
        again = drawn((4, 4))
    for told, true in zip(again, model.drawn, strict=True):
        assert not torch.equal(told, true)


def test_devices_of_other_kinds_get_a_seed_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.xpu, "manual_seed_all", seeds.append)
    for _ in range(20):
        secret_state.renew()
    assert len(set(seeds)) == 20 and max(seeds) >= 2**58


def test_a_source_that_is_not_secure_asks_for_nothing() -> None:
    own = secret_state.worker_init(_seed_publicly, SeededSource(1))
    assert own is _seed_publicly and secret_state.worker_init(None, SeededSource(1)) is None
    assert secret_state.worker_init(_seed_publicly, None) is _seed_publicly
    for source in (SeededSource(1), None):
        assert secret_state.collation(_seed_publicly, source) is _seed_publicly
    with torch.random.fork_rng():
        DataLoader(TensorDataset(torch.zeros(3)))
        torch.manual_seed(0)
        secret_state.begin_pass(None)
        secret_state.begin_fetch(None)
