"""What a private Trainer saves and pushes: PEFT's adapter, with a privacy statement."""

from pathlib import Path

import peft
import pytest
import torch

from tests.language_models import causal_lm, completions, stacked
from tests.trainers.training import adapted, hub_of_folders, private_trainer


def test_what_is_saved_is_pefts_with_a_statement(tmp_path: Path) -> None:
    model = adapted()
    trainer = private_trainer(tmp_path, model)
    trainer.train()
    trainer.save_model()
    trainer.save_model()  # the statement is there once
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Differential privacy") == 1
    assert f"ε = {trainer.epsilon():.4g} at δ = 0.001" in card
    assert trainer.engine.ledger.state_dict()["digest"] in card
    assert "library_name: peft" in card
    assert not list(tmp_path.rglob("rng_state*"))
    opened = peft.PeftModel.from_pretrained(causal_lm("llama", torch.float32), tmp_path).eval()
    batch = stacked(completions(3))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)


def test_a_model_card_of_the_trainers_has_it_too(tmp_path: Path) -> None:
    trainer = private_trainer(tmp_path)
    trainer.train()
    trainer.create_model_card(model_name="private")
    assert "## Differential privacy" in (tmp_path / "README.md").read_text()


def test_what_is_pushed_to_a_hub_is_the_adapter_with_its_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = hub_of_folders(monkeypatch, tmp_path / "hub")
    model = adapted()
    trainer = private_trainer(tmp_path / "out", model, training={"save_strategy": "steps", "save_steps": 1})
    trainer.train()
    trainer.push_to_hub()
    card = (pushed / "README.md").read_text()
    assert f"ε = {trainer.epsilon():.4g} at δ = 0.001" in card and (pushed / "privacy.json").exists()
    assert list((tmp_path / "out").glob("checkpoint-*")) and not list(pushed.glob("checkpoint-*"))
    assert not list(pushed.rglob("rng_state*")) and not list(pushed.rglob("optimizer*"))
    opened = peft.PeftModel.from_pretrained(causal_lm("llama", torch.float32), pushed).eval()
    batch = stacked(completions(3))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)
