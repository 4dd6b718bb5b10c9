"""Nothing that leaves depends on one example but through the noise: masks, perturbations, sizes, times."""

import contextlib
import json
from dataclasses import fields
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lora_dp.engine.engine import PrivacyEngine
from lora_dp.fed.config import RunConfig
from lora_dp.fed.launch import run
from lora_dp.fed.methods import LALoRA, Method, WeightedAverage
from lora_dp.fed.methods.deer import DEeR
from lora_dp.fed.methods.flat_lora import FlatLoRA
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.messages import Task, Update
from lora_dp.privacy.sampling import PoissonSampler
from tests.fed.small import make_federation

TINY = {
    "clients": 2,
    "rounds": 2,
    "local_steps": 1,
    "batch_size": 16,
    "accountant": "rdp",
    "device": "cpu",
    "validation_fraction": 0.05,
}
WHOLE = {"unit": "client", "delta": 0.01}


def seeds_of_turns(monkeypatch: pytest.MonkeyPatch, reproducible: bool) -> list[int]:
    """torch's seed in two trainings of the same client and round."""
    seen: list[int] = []
    federation = make_federation("dp-lora", reproducible=reproducible)
    step = type(federation.method).local_step

    def watched(self: Method, *args: Any) -> Any:
        seen.append(torch.initial_seed())
        return step(self, *args)

    monkeypatch.setattr(type(federation.method), "local_step", watched)
    task = Task(0, 0, 2, federation.server.state)
    for _ in range(2):
        federation.trainer.train(1, federation.engine.parts[1], task)
    return seen


@pytest.mark.slow
def test_dropout_masks_are_as_secret_as_the_noise(monkeypatch):
    secret = set(seeds_of_turns(monkeypatch, reproducible=False))
    assert len(secret) == 2
    known = seeds_of_turns(monkeypatch, reproducible=True)
    assert len(set(known)) == 1 and known[0] not in secret


@pytest.mark.parametrize(
    "dropping, reproducible, reseeded",
    [(nn.Dropout(0.1), None, True), (nn.Dropout(0.0), None, True), (nn.Dropout(0.1), 7, False), (None, None, True)],
)
def test_an_engine_of_its_own_hides_the_masks_too(dropping, reproducible, reseeded):
    from lora_dp import LoRAConfig, inject_lora

    layers = [nn.Linear(4, 4)] + ([dropping] if dropping is not None else []) + [nn.Linear(4, 2)]
    model = inject_lora(nn.Sequential(*layers), LoRAConfig(r=1, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        PrivacyEngine(reproducible_seed=reproducible).make_private(
            model=model,
            optimizer=torch.optim.SGD(trained, 0.1),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            data_loader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(8, 4)), batch_size=4),
        )
        assert (torch.initial_seed() != 3) == reseeded


def test_a_perturbation_does_not_tell_how_many_batches_before_it_were_empty(monkeypatch):
    """By step and public seed alone: it would else be a message about who was drawn, on the sums of all that follow."""
    found: list[dict[int, torch.Tensor]] = []
    local_step = FlatLoRA.local_step

    def watched(self: FlatLoRA, model: nn.Module, step: int, steps: int, generator: torch.Generator) -> Any:
        inner = local_step(self, model, step, steps, generator)

        @contextlib.contextmanager
        def around() -> Any:
            with inner:
                found[-1][step] = next(m.weight.clone() for m in model.modules() if hasattr(m, "lora_A"))
                yield

        return around()

    monkeypatch.setattr(FlatLoRA, "local_step", watched)
    # B is zero in step 0 and noise from then on: compare what a step that begins in the same state is given.
    federation = make_federation("flat-lora:dp-lora", options={"rho": 1.0})
    part, task = federation.engine.parts[1], Task(0, 0, 2, federation.server.state)
    for draws in ([[], [1, 2], [3]], [[], [1], []], [[], [2, 5, 6], [7, 8]]):
        found.append({})
        left = list(draws)
        monkeypatch.setattr(PoissonSampler, "draw", lambda self, left=left: left.pop(0))
        federation.trainer.train(1, part, task)
    # Step 1 follows an empty batch and an unfilled B in all three; the same noise moved the weights before it.
    assert set(found[0]) == {1, 2} and set(found[1]) == {1}
    assert found[0][1].equal(found[1][1]) and found[0][1].equal(found[2][1])
    found.append({})
    left = [[4], [1, 2], []]
    monkeypatch.setattr(PoissonSampler, "draw", lambda self: left.pop(0))
    monkeypatch.setattr(
        "lora_dp.fed.rounds.local_training.LocalTraining.make_optimizer",
        lambda self, model, make: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-300),
    )
    federation.trainer.train(1, part, task)
    still = found[-1]
    found.append({})
    left = [[], [1, 2], []]
    federation.trainer.train(1, part, task)
    assert set(still) == {0, 1} and set(found[-1]) == {1}
    torch.testing.assert_close(still[1], found[-1][1], rtol=1e-12, atol=0)


def test_an_update_is_its_tensors_and_nothing_else():
    """A client's number of examples is not public where whole clients are protected."""
    assert [field.name for field in fields(Update)] == ["tensors"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, WHOLE, {**WHOLE, "noise_by": "client"}])
def test_times_stay_on_the_console(tmp_path, options):
    """They grow with the batches, whose sizes are secret."""
    folder = tmp_path / "run"
    outcome = run(RunConfig.from_flat({**TINY, **options, "output": folder}), Console(quiet=True))
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][1:]
    assert [entry["seconds"] for entry in rounds] == [None, None] and outcome.summary["seconds"] is None


@pytest.mark.slow
def test_the_console_does_not_tell_sizes_where_whole_clients_are_protected(tmp_path, capsys):
    run(RunConfig.from_flat({**TINY, **WHOLE, "output": tmp_path / "run"}), Console(width=200))
    shown = capsys.readouterr().out
    assert "digits: 2 clients," in shown and "examples at" not in shown


@pytest.mark.slow
def test_noise_of_a_clients_own_is_no_accident(tmp_path):
    """Its norm is σ · bound · √(numbers), far above what training moves: 10³ where ε is small."""
    options = {**TINY, "unit": "client", "noise_by": "client", "epsilon": 0.2, "delta": 1e-5, "rounds": 1}
    outcome = run(RunConfig.from_flat({**options, "output": tmp_path / "run"}), Console(quiet=True))
    assert outcome.rounds[-1].participants == [0, 1]
    [norms] = [json.loads(line)["norms"] for line in (tmp_path / "run" / "updates.jsonl").read_text().splitlines()]
    assert min(norms) > 2000


class OwnSum(WeightedAverage):
    pass


class OwnWay(LALoRA):
    def aggregation(self):
        return OwnSum()


class BothAtOnce(DEeR):
    def phases(self, round_index, turn=0):
        return "AB"


@pytest.mark.parametrize(
    "method, options, message",
    [
        (OwnWay(), WHOLE, "combines updates in its own way, but noise by the server is for sums"),
        (BothAtOnce(), {}, "turn 0 of round 1 trains AB: switch regulates_noise off"),
        (BothAtOnce(), WHOLE, "turn 0 of round 1 trains AB: switch regulates_noise off"),
        (LALoRA(), {"delta": 0.9}, "delta 0.9 promises nothing to one of .* examples at a client.*for example 1e-5"),
        (LALoRA(), {"unit": "client", "delta": 0.5}, "delta 0.5 promises nothing to one of 2 clients"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_the_start(monkeypatch, method, options, message):
    monkeypatch.setattr(RunConfig, "method", property(lambda self: method))
    with pytest.raises(ValueError, match=message):
        Federation.from_config(RunConfig.from_flat({**TINY, **options}))
