"""Options of an audit: a word that is none of the choices, or a wrong type, is refused."""

from pathlib import Path

import numpy as np
import pytest

from lora_dp.fed.auditing.options import AuditConfig


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"canaries": "Examples"}, "canaries must be planted or examples, not 'Examples'"),
        ({"test": "two-World"}, "test must be one-run or two-world, not 'two-World'"),
        ({"assume": "Nothing"}, "assume must be nothing, gaussian, independent or independent gaussian, not 'Nothing'"),
        ({"confidence": True}, "confidence must be a number, not True"),
        ({"runs": 8.0}, "runs must be a whole number"),
        ({"target": None}, "target must be a path, not None"),
    ],
)
def test_options_of_an_audit_too(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        AuditConfig(**{"target": "config.yaml", **options})
    assert AuditConfig("config.yaml", confidence=np.float64(0.9)).target == Path("config.yaml")
