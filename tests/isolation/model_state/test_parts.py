"""Settings of a model by which other code runs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_dp import DPLinear, IsolationError
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.model_state.parts import ModelParts
from tests.support import make_private


class Switched(nn.Module):
    """Centres its batch once a setting says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = DPLinear(6, 8), DPLinear(8, 3)
        self.epoch, self.alpha, self.on, self.kind = 0, 0.0, False, "plain"
        self.cfg = SimpleNamespace(mix=False, depth=3, name="plain", alpha=0.0)
        self.opts: dict[str, Any] = {"mix": False}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        mixes = (
            self.epoch >= 4,
            self.alpha > 0,
            self.on,
            self.kind == "mix",
            self.cfg.mix,
            self.cfg.name == "mix",
            self.cfg.alpha > 0,
            self.opts["mix"],
        )
        return self.head(hidden - hidden.mean(0) if any(mixes) else hidden)


def settings(model: Switched) -> dict[str, Any]:
    return {
        "epoch": lambda: setattr(model, "epoch", 4),
        "alpha": lambda: setattr(model, "alpha", 0.5),
        "switch": lambda: setattr(model, "on", True),
        "word": lambda: setattr(model, "kind", "mix"),
        "switch of a configuration": lambda: setattr(model.cfg, "mix", True),
        "word of a configuration": lambda: setattr(model.cfg, "name", "mix"),
        "number of a configuration": lambda: setattr(model.cfg, "alpha", 0.5),
        "entry of a dict": lambda: model.opts.update(mix=True),
    }


@pytest.mark.parametrize("which", list(settings(Switched())))
def test_mixing_that_a_setting_switches_on_is_refused(which: str) -> None:
    model, x = Switched().train(), torch.randn(8, 6)
    optimizer = make_private(model, batch_size=8)
    for _ in range(3):
        model(x)
        optimizer.zero_grad()
        optimizer.recorder.discard()
    settings(model)[which]()
    with pytest.raises(IsolationError, match="rows of 'inner' that are attributed to other examples"):
        model(x)


def standing(parts: ModelParts) -> Any:
    parts.begin()
    return parts.standing()


def test_a_number_that_moves_makes_no_new_kind_each_time() -> None:
    model = Switched()
    model.alpha, model.epoch = 0.1, 5
    parts = ModelParts(model)
    kinds = {standing(parts)}
    for step in range(1, 100):
        model.alpha, model.epoch = 0.1 + step / 100, 5 + step
        kinds.add(standing(parts))
    assert len(kinds) == 5  # up to 7, 15, 31, 63 and 104
    model.epoch = -5
    assert standing(parts) not in kinds
    model.epoch = 5
    model.alpha = 0.0
    assert standing(parts) not in kinds


def test_settings_of_one_configuration_count_once_and_tables_not_at_all() -> None:
    model = Switched()
    model.inner.cfg = model.cfg
    model.table = {str(number): number for number in range(1000)}
    parts = ModelParts(model)
    before = standing(parts)
    model.table["5"] = 0
    assert standing(parts) == before
    model.table["new"] = True
    assert standing(parts) == before
    for number in range(20):  # a log of what was seen, say
        model.opts[f"step {number}"] = number
    assert standing(parts) == before
    model.cfg.mix = True
    assert standing(parts) != before


def test_a_number_that_becomes_a_tensor_is_another_setting() -> None:
    model = Switched()
    model.alpha = 0.5
    parts = ModelParts(model)
    before = standing(parts)
    model.alpha = torch.ones(3)
    assert standing(parts) != before
    model.alpha = 0.5
    assert standing(parts) == before


def test_a_parameter_that_comes_in_later_is_seen() -> None:
    model = Switched()
    parts = ModelParts(model)
    before = standing(parts)
    model.head.scale = nn.Parameter(torch.ones(3))
    assert standing(parts) != before


class Grows(nn.Module):
    """A table of positions in a buffer, made anew where a text is longer than ever, with its length beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.longest, self.head = 4, DPLinear(1, 3)
        self.table = nn.Buffer(torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        if width > self.longest:
            self.longest, self.table = width, torch.arange(float(width)) / 2
        elif width <= 4 < self.longest:
            self.longest, self.table = 4, torch.arange(4.0)
        return self.head((x * self.table[:width]).sum(1, keepdim=True))


def test_trials_leave_settings_as_they_were() -> None:
    """Else the length says one thing in the next forward, and the table another."""
    model = Grows().train()
    optimizer = make_private(model, batch_size=4)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.recorder.discard()
        model(torch.randn(4, 3))

    step()
    model.eval()(torch.randn(4, 40))
    model.train()
    step()
    assert model.longest == 4 and torch.equal(model.table, torch.arange(4.0))


class Lazy(nn.Module):
    """A table that is made in the first forward, where there was none, or None."""

    def __init__(self) -> None:
        super().__init__()
        self.head = DPLinear(3, 3)
        self.register_buffer("later", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.later is None:
            self.later = torch.arange(3.0)
            self.register_buffer("table", torch.arange(3.0))
        return self.head(x * self.later * self.table)


def test_trials_leave_no_buffer_behind() -> None:
    model = Lazy().train()
    check_isolation(model, (torch.randn(6, 3),), {}, 6)
    assert model.later is None and not hasattr(model, "table")
