import pytest
import torch

# The steps here are too small to share: several threads would only wait for each other.
torch.set_num_threads(1)


@pytest.fixture
def none_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is tried in secret."""
    monkeypatch.setattr("lora_dp.engine.hooks.drawn_for_test", lambda: False)


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Plants a bug for one test."""
    return monkeypatch
