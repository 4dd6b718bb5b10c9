"""A configuration on disk, and a fiftieth of the noise."""

import pytest
import yaml

from lora_dp.privacy.mechanism import Mechanism


@pytest.fixture
def configuration(tmp_path):
    def write(options):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
        return str(tmp_path)

    return write


@pytest.fixture
def little_noise(monkeypatch):
    """The noise is a fiftieth of what it is accounted for."""
    true = Mechanism.noise_std
    monkeypatch.setattr(Mechanism, "noise_std", lambda self, size: true(self, size) / 50)
