"""The privacy statement: in place of an earlier one, whatever else the card holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_dp import Ledger, PrivacyArguments
from lora_dp.privacy.accounting import PoissonGaussian
from lora_dp.trainers.statement import privacy_statement, write_statement


def statement(steps: int, noise: float = 1.5, **changed: Any) -> dict[str, Any]:
    ledger = Ledger()
    ledger.append(PoissonGaussian(noise, 0.01), steps)
    plain = PrivacyArguments(noise_multiplier=1.5, target_delta=1e-5, clip_bound=0.5)
    return privacy_statement(
        ledger=ledger.state_dict(),
        epsilon=ledger.epsilon(1e-5),
        delta=1e-5,
        accountant="pld",
        settings=[plain.as_dict(), replace(plain, **changed).as_dict()],
    )


def test_it_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags: [a]\n---\n# Mine\n")
    write_statement(tmp_path, statement(10))
    card.write_text(card.read_text() + "\n## Later\n\nwords\n")
    write_statement(tmp_path, statement(20))
    text = card.read_text()
    assert text.startswith("---\ntags: [a]\n---\n# Mine\n\n## Differential privacy\n")
    assert text.count("## Differential privacy") == 1
    assert "20 at σ = 1.5 and rate 0.01" in text
    assert "10 at" not in text
    assert text.endswith("## Later\n\nwords\n")
    assert json.loads((tmp_path / "privacy.json").read_text())["steps"][0]["count"] == 20


def test_what_weakens_the_guarantee_is_said(tmp_path: Path) -> None:
    write_statement(tmp_path, statement(1))
    assert "seed" not in (tmp_path / "README.md").read_text()
    write_statement(tmp_path, statement(1, reproducible_seed=3, log_private_loss=True, clip_bound=2.0))
    text = (tmp_path / "README.md").read_text()
    assert "who guesses it is not kept from anything" in text
    assert "Losses of training batches were logged" in text
    assert "flat at C = 0.5, then flat at C = 2" in text


def test_steps_without_noise_promise_nothing(tmp_path: Path) -> None:
    write_statement(tmp_path, statement(1, noise=0.0))
    assert "**ε = ∞ at δ = 1e-05**" in (tmp_path / "README.md").read_text()
    assert "nothing is promised" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "privacy.json").read_text())["epsilon"] is None
