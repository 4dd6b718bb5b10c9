"""Methods as their authors released them: without a guarantee, and said to be."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import factor
from tests.fed.small import PLAIN, Adapted, make_examples, make_federation


def test_la_lora_as_released_clips_the_batch_at_the_median_norm(monkeypatch):
    """One step without noise moves every tensor by at most the median of the tensors' norms."""
    training = replace(PLAIN, learning_rate=1.0, local_steps=1)
    monkeypatch.setattr("lora_dp.fed.rounds.as_released.claimed_noise_multiplier", lambda *_: 0.0)
    federation = make_federation("la-lora", training, sizes=(12,), mechanism="as-released")
    for name in ("1.lora_B", "3.lora_B"):  # A has a gradient only beside a B
        federation.server.state[name] = torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    start = dict(federation.server.state)
    federation.run_round()
    model, batch = Adapted(), make_examples(12, 0).batch(range(12))
    model.load_state_dict(start, strict=False)
    torch.nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and factor(n) != "B"}
    bound = min(statistics.median(float(g.norm()) for g in gradients.values()), 0.4)
    for name, gradient in gradients.items():
        expected = gradient * min(1, bound / gradient.norm().clamp(min=1e-30)) + 0.001 * start[name]
        torch.testing.assert_close(start[name] - federation.server.state[name], expected, rtol=1e-9, atol=1e-12)
    assert federation.account.worst_epsilon() == math.inf


def test_la_lora_as_released_filters_in_a_step_of_its_own(monkeypatch):
    monkeypatch.setattr("lora_dp.fed.rounds.as_released.claimed_noise_multiplier", lambda *_: 0.0)
    training = replace(PLAIN, learning_rate=1.0, lr_ratio=2.0, local_steps=2)
    moved = []
    for filters in ({}, {"low_pass": "gaussian", "low_pass_strength": 0.0}):
        federation = make_federation("la-lora", replace(training, **filters), sizes=(12,), mechanism="as-released")
        start = federation.server.state["1.lora_B"]
        federation.run_round()
        moved.append(federation.server.state["1.lora_B"] - start)
    # A first, whose gradient is zero beside B = 0; then B, by lr · 2, and once more by lr where a filter lets all pass.
    torch.testing.assert_close(moved[1], 1.5 * moved[0], rtol=2e-2, atol=1e-6)
    assert moved[0].any()


def test_deer_as_released_clips_each_tensor_by_itself(monkeypatch):
    monkeypatch.setattr("lora_dp.fed.rounds.as_released.claimed_noise_multiplier", lambda *_: 0.0)
    training = replace(PLAIN, learning_rate=5.0)
    federation = make_federation("deer", training, sizes=(12,), mechanism="as-released", max_update_norm=0.05)
    start = dict(federation.server.state)
    result = federation.run_round()
    for name in ("1.lora_B", "3.lora_B", "1.lora_A", "3.lora_A"):
        assert float((federation.server.state[name] - start[name]).norm()) == pytest.approx(0.05, rel=1e-6)
    assert result.epsilon == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("method", ["la-lora", "deer"])
def test_what_is_as_released_says_so_everywhere(tmp_path, method, capsys):
    from lora_dp.fed.launch import run

    outcome = run(
        RunConfig.from_flat(
            {
                "method": method,
                "mechanism": "as-released",
                "clients": 2,
                "rounds": 1,
                "local_steps": 2,
                "accountant": "rdp",
                "device": "cpu",
                "output": tmp_path / "run",
            }
        )
    )
    assert outcome.summary["worst_epsilon"] is None
    assert "no privacy guarantee (ε = ∞)" in outcome.summary["guarantee"]
    printed = capsys.readouterr().out
    assert "no privacy guarantee (ε = ∞)" in printed and "set as if for ε = 8" in printed
    assert "worst ε ∞" in printed.replace("   ", " ")
    account = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert account["worst_epsilon"] is None and account["mechanism"] == "as-released"
    assert account["guarantee"] == outcome.summary["guarantee"]
    assert all(entry["epsilon"] is None for entry in account["clients"])
