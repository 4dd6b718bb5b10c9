"""CUDA's generators during private training: keys and offsets that nobody can guess, anew in every pass."""

import importlib.util
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.privacy import secret_state
from tests.privacy.drawing_models import SEEDED, Net, private, step

pytestmark = pytest.mark.usefixtures("callers_state")


class _Philox:
    """A CUDA generator's state: key, then offset."""

    def __init__(self) -> None:
        self.state = np.zeros(2, np.uint64)

    def set_state(self, state: Tensor) -> None:
        assert state.dtype == torch.uint8 and state.device.type == "cpu" and state.shape == (16,)
        self.state = state.numpy().view(np.uint64).copy()

    def get_state(self) -> Tensor:
        return torch.from_numpy(self.state.copy().view(np.uint8))

    def manual_seed(self, seed: int) -> None:
        self.state = np.array([seed, 0], np.uint64)

    def initial_seed(self) -> int:
        return int(self.state[0])


def test_every_cuda_generator_gets_a_key_and_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = _Philox(), _Philox()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    monkeypatch.setattr(secret_state, "_cuda_renewed", False)
    found = []
    for _ in range(3):
        secret_state.renew()
        found += [tuple(device.state.tolist()) for device in devices]
    assert len({key for key, _ in found}) == len({offset for _, offset in found}) == 6
    assert all(offset % 4 == 0 and offset < 2**62 for _, offset in found)
    assert max(key for key, _ in found) > 2**60 and max(offset for _, offset in found) > 2**58
    model = Net()
    optimizer = private(model)
    step(model, optimizer)
    devices[1].state[0] = 42
    with pytest.raises(RuntimeError, match=SEEDED):
        step(model, optimizer)


def test_cuda_that_starts_after_make_private_is_set_before_its_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_state, "_cuda_renewed", False)
    model, device = Net(), _Philox()
    optimizer = private(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    step(model, optimizer)
    assert device.state.all()
    device.state[0] = 42
    with pytest.raises(RuntimeError, match=SEEDED):
        step(model, optimizer)


def test_cuda_has_another_key_in_every_pass_and_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Philox's state, in a checkpoint, tells all that is drawn under it."""
    model, device, states = Net(), _Philox(), []
    optimizer = private(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    inside: list[Any] = []
    model.register_forward_hook(lambda *_: inside.append(device.state.tolist()))
    for _ in range(5):
        step(model, optimizer)
        states += [inside[-1], device.state.tolist()]  # trials, before it, have their own
    keys, counters = zip(*states, strict=True)
    assert len(set(keys)) == len(set(counters)) == 10
    device.state[0] = keys[1]  # that of a checkpoint
    step(model, optimizer)


def test_a_capture_takes_no_new_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would refuse; a replay takes what the generator holds by then."""
    optimizer, device = private(Net()), _Philox()
    monkeypatch.setattr(secret_state, "_cuda_renewed", False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    secret_state.begin_pass(optimizer)
    first = device.state.tolist()
    secret_state.begin_pass(optimizer)
    before = device.state.tolist()
    assert before[0] != first[0] and before[1] != first[1]
    secret_state.begin_pass(optimizer, capturing=True)
    assert device.state.tolist() == before
    secret_state.end_pass(optimizer)
    assert device.state[0] != before[0] and device.state[1] != before[1]


def test_the_keys_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_state, "_seeds", set())
    monkeypatch.setattr(secret_state, "_cuda_seeds", deque(maxlen=3))
    device = _Philox()
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    keys = []
    for _ in range(7):
        secret_state._renew_cuda()
        keys.append(int(device.state[0]))
    assert secret_state._seeds == set(keys[-3:])


def test_a_process_that_has_just_begun_has_set_no_cuda_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("lora_dp.privacy.secret_state")
    assert spec is not None and spec.loader is not None
    fresh, device = importlib.util.module_from_spec(spec), _Philox()
    spec.loader.exec_module(fresh)
    optimizer = private(Net())
    try:
        fresh.renew()
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "default_generators", (device,))
        fresh.begin_pass(optimizer)
        assert device.state.all()
    finally:
        monkeypatch.undo()
        secret_state.renew()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_takes_the_state_and_drops_by_it() -> None:
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    model = Net().to(device).train()
    optimizer = private(model)
    masks = [F.dropout(torch.ones(4096, device=device), 0.5) for _ in range(2)]
    assert not torch.equal(*masks) and 1700 < int((masks[0] > 0).sum()) < 2400
    optimizer.batch.expect(4)
    model(torch.ones(4, 4, device=device)).square().sum(1).mean().backward()
    optimizer.step()
    torch.cuda.manual_seed(42)
    with pytest.raises(RuntimeError, match=SEEDED):
        model(torch.ones(4, 4, device=device))
