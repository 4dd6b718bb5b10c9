"""Transformers' Trainer with private steps: the step, the ledger, what is logged, kept and refused."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed

from lora_dp import IsolationError, LoRAConfig, PrivacyArguments, PrivacyEngine, PrivateTrainer, inject_lora
from lora_dp.losses import causal_lm_loss
from tests.language_models import ATTENTION, causal_lm, completions, one_loss
from tests.support import brute_force, clip_and_sum
from tests.trainers.training import SAVED, N, adapted, arguments, of_trained, private_trainer

ROWS = completions(N)
PRIVACY = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-3)


# The step

EVERYBODY = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "max_steps": 1, "optim": "sgd"}


def moved(folder: Path, model: nn.Module, bound: float, **training: Any) -> dict[str, Tensor]:
    """By one step of SGD at rate 1 in which all of ten examples are, in parts of five or fewer, without noise."""
    before = of_trained(model)
    trainer = private_trainer(
        folder,
        model,
        train_dataset=completions(10),
        privacy={"noise_multiplier": 0.0, "clip_bound": bound},
        training={**EVERYBODY, "learning_rate": 1.0, "lr_scheduler_type": "constant", **training},
    )
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def expected_move(model: nn.Module) -> tuple[dict[str, Tensor], float]:
    """Σᵢ cᵢ gᵢ / 10 by brute force in float64, and the bound, which clips half of the examples."""
    gradients = brute_force(model, one_loss, completions(10), set(of_trained(model)))
    norms = sorted(sum(float(g.square().sum()) for g in each.values()) ** 0.5 for each in gradients)
    return {
        name: total / 10 for name, total in clip_and_sum(gradients, "flat", norms[5], lambda name: name).items()
    }, norms[5]


@pytest.mark.parametrize("sizes", [(5, 2), (10, 1), (1, 10)], ids=["two-parts", "whole", "single"])
def test_a_step_is_that_of_brute_force_whatever_the_parts(tmp_path: Path, sizes: tuple[int, int]) -> None:
    physical, accumulated = sizes
    model = adapted(dtype=torch.float64)
    expected, bound = expected_move(model)
    found = moved(tmp_path, model, bound, per_device_train_batch_size=physical, gradient_accumulation_steps=accumulated)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-6 * bound, msg=name)


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True},
    ],
    ids=["checkpoints", "reentrant", "compiled"],
)
def test_ways_to_compute_it_change_nothing(tmp_path: Path, training: dict[str, Any]) -> None:
    model = adapted()
    expected, bound = expected_move(model)
    found = moved(tmp_path, model, bound, **training)
    for name, change in expected.items():
        torch.testing.assert_close(found[name].double(), change, rtol=1e-3, atol=1e-4 * bound, msg=name)


def test_autocast_to_bfloat16_is_near(tmp_path: Path) -> None:
    model = adapted()
    expected, bound = expected_move(model)
    found = moved(tmp_path, model, bound, bf16=True)
    for name, change in expected.items():
        error = (found[name].double() - change).norm() / change.norm()
        assert 1e-6 < error < 0.1, name


def test_injected_adapters_train_alike(tmp_path: Path) -> None:
    model = inject_lora(causal_lm("llama", torch.float64), LoRAConfig(r=3, target_modules=ATTENTION["llama"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected, bound = expected_move(model)
    found = moved(tmp_path, model, bound)
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-6 * bound, msg=name)


def test_a_loss_of_ones_own_gives_one_number_for_each_example(tmp_path: Path) -> None:
    model = adapted(dtype=torch.float64)
    expected, bound = expected_move(model)
    own = private_trainer(
        tmp_path / "own",
        model,
        train_dataset=completions(10),
        privacy={"noise_multiplier": 0.0, "clip_bound": bound},
        training={**EVERYBODY, "learning_rate": 1.0, "lr_scheduler_type": "constant"},
        compute_loss_func=lambda outputs, labels: causal_lm_loss(outputs.logits, labels),
    )
    before = of_trained(model)
    own.train()
    for name, change in expected.items():
        torch.testing.assert_close(before[name] - of_trained(model)[name], change, rtol=1e-5, atol=1e-6 * bound)
    joined = private_trainer(
        tmp_path / "joined", compute_loss_func=lambda outputs, labels: causal_lm_loss(outputs.logits, labels).mean()
    )
    with pytest.raises(ValueError, match=r"takes the loss of each of the \d+ examples"):
        joined.train()


# Sampling, noise and the ledger


def test_every_draw_is_a_step_also_those_of_nobody(tmp_path: Path) -> None:
    seen: list[int] = []

    class Sizes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen.append(state.global_step)

    trainer = private_trainer(
        tmp_path,
        training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 40},
        callbacks=[Sizes()],
    )
    trainer.train()
    # That none of 40 draws of 1 of 16 is empty has a probability of (1 − (15/16)¹⁶)⁴⁰ < 1e-7.
    assert trainer.state.global_step == trainer.engine.ledger.steps == 40
    assert seen == list(range(1, 41))
    assert trainer.lr_scheduler is not None
    assert trainer.lr_scheduler.last_epoch == 40


def test_a_target_is_kept_and_reached(tmp_path: Path) -> None:
    trainer = private_trainer(tmp_path, privacy={"target_epsilon": 4.0}, training={"max_steps": -1})
    trainer.args.num_train_epochs = 2
    trainer.train()
    assert trainer.engine.ledger.steps == 8
    assert 3.9 < trainer.epsilon() <= 4.0
    assert trainer.epsilon() == trainer.engine.get_epsilon(1e-3)


def test_the_seed_of_the_trainer_decides_neither_batches_nor_noise(tmp_path: Path) -> None:
    ends = []
    for run in range(2):
        model = adapted()
        private_trainer(tmp_path / str(run), model, training={"seed": 7, "data_seed": 7, "max_steps": 2}).train()
        ends.append(torch.cat([p.flatten() for p in of_trained(model).values()]))
    assert not torch.allclose(ends[0], ends[1])


def test_a_reproducible_seed_does_for_research(tmp_path: Path) -> None:
    ends = []
    for run in range(2):
        model = adapted()
        trainer = private_trainer(tmp_path / str(run), model, privacy={"reproducible_seed": 3})
        trainer.train()
        ends.append(torch.cat([p.flatten() for p in of_trained(model).values()]))
    assert torch.equal(ends[0], ends[1])
    trainer.save_model()
    assert "followed a seed" in (tmp_path / "1" / "README.md").read_text()


def test_who_seeds_torch_later_is_refused(tmp_path: Path) -> None:
    class Seeds(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            set_seed(1)

    with pytest.raises(RuntimeError, match="seed"):
        private_trainer(tmp_path, adapted(lora_dropout=0.1), callbacks=[Seeds()]).train()


# What is told


def test_nothing_that_is_read_off_private_batches_is_logged(tmp_path: Path) -> None:
    trainer = private_trainer(
        tmp_path, eval_dataset=completions(4, seed=2), training={"eval_strategy": "steps", "eval_steps": 3, **SAVED}
    )
    result = trainer.train()
    allowed = {"learning_rate", "epsilon", "epoch", "step"}
    for entry in trainer.state.log_history:
        assert entry.keys() <= allowed or all(name.startswith(("eval_", "train_")) for name in entry.keys() - allowed)
        assert not entry.keys() & {"loss", "train_loss", "grad_norm", "total_flos", "num_tokens"}
    spent = [entry["epsilon"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(spent) == 8
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(trainer.epsilon())
    assert result.training_loss != result.training_loss
    assert "train_loss" not in result.metrics
    assert trainer.state.total_flos == 0
    texts = "".join(path.read_text() for path in (tmp_path / "checkpoint-6").glob("*.json"))
    assert '"loss"' not in texts


def test_the_private_loss_is_logged_when_asked_for_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no ε covers it"):
        trainer = private_trainer(tmp_path, privacy={"log_private_loss": True})
    result = trainer.train()
    assert result.training_loss > 0
    logged = [entry["loss"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(logged) == 6
    assert sum(loss > 0 for loss in logged) >= 3  # a draw of nobody, one in a hundred, has none
    trainer.save_model()
    assert "Losses of training batches were logged" in (tmp_path / "README.md").read_text()


def test_tensorboard_is_told_of_epsilon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = private_trainer(tmp_path / "run", training={"report_to": ["tensorboard"]})
    trainer.train()
    read = events.EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    scalars = read.Tags()["scalars"]
    assert "train/epsilon" in scalars
    assert "train/loss" not in scalars
    told = [event.value for event in read.Scalars("train/epsilon")]
    assert told[-1] == pytest.approx(trainer.epsilon(), rel=1e-5)


# Refusals


def test_batches_without_labels_are_told_what_makes_them(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in completions(N)]
    with pytest.raises(ValueError, match=r"DataCollatorForLanguageModeling\(tokenizer, mlm=False\), which makes them"):
        private_trainer(tmp_path, train_dataset=rows).train()


def test_data_of_no_known_length_are_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(completions(N))

    with pytest.raises(ValueError, match="needs to know how many examples there are: load the whole data set"):
        private_trainer(tmp_path, train_dataset=Stream()).train()


def test_a_delta_that_promises_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"delta 0\.1 promises nothing to one of 16 examples"):
        private_trainer(tmp_path, privacy={"target_delta": 0.1}).train()


def test_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="spends ε of its own"):
        private_trainer(tmp_path).hyperparameter_search()


def test_a_balancing_loss_of_experts_is_refused(tmp_path: Path) -> None:
    model = adapted("mixtral")
    model.get_base_model().config.output_router_logits = True
    with pytest.raises(ValueError, match=r"router's balancing loss .*output_router_logits = False"):
        private_trainer(tmp_path, model).train()


def test_privacy_is_to_be_privacy_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="privacy"):
        PrivateTrainer(model=adapted(), args=arguments(tmp_path), privacy={"target_epsilon": 1})


class PlainTrainer(Trainer):
    """Transformers' own, on a private loader and optimizer."""

    loader: Any = None

    def get_train_dataloader(self) -> Any:
        return self.loader


def test_the_plain_trainer_on_private_parts_is_refused(tmp_path: Path) -> None:
    """Its loss is divided by the tokens of the batch."""
    model, engine = adapted(), PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        data_loader=torch.utils.data.DataLoader(completions(N), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    trainer = PlainTrainer(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=1), optimizers=(optimizer, None)
    )
    trainer.loader = loader
    with pytest.raises((IsolationError, RuntimeError)):
        trainer.train()
    assert engine.ledger.steps == 0


def test_evaluation_between_steps_is_transformers_own(tmp_path: Path) -> None:
    trainer = private_trainer(tmp_path, eval_dataset=completions(8, seed=3))
    before = trainer.evaluate()
    trainer.train()
    assert before["eval_loss"] > 0
    assert trainer.evaluate()["eval_loss"] > 0


# After mistakes


def test_a_checkpoint_without_a_ledger_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    plain = Trainer(
        model=adapted(), args=arguments(tmp_path / "plain", save_strategy="steps", save_steps=3), train_dataset=ROWS
    )
    plain.train()
    model = adapted()
    before = of_trained(model)
    trainer = private_trainer(tmp_path / "private", model)
    with pytest.raises(ValueError, match="has no privacy_ledger.json"):
        trainer.train(str(tmp_path / "plain" / "checkpoint-3"))
    assert all(torch.equal(before[name], weight) for name, weight in of_trained(model).items())


def test_steps_of_another_engine_are_not_left_out(tmp_path: Path) -> None:
    model = adapted()
    first = private_trainer(tmp_path / "1", model)
    first.train()
    second = private_trainer(tmp_path / "2", model)
    second.save_model()
    assert not (tmp_path / "2" / "privacy.json").exists()
    with pytest.raises(ValueError, match="has 6 private steps of another engine"):
        second.train()
    second.engine.load_state_dict(first.engine.state_dict())
    second.train()
    assert second.engine.ledger.steps == 12


def test_no_run_of_empty_draws_is_told(tmp_path: Path) -> None:
    """One step of the ledger for each step that is logged, though two draws in a row were empty."""
    told: list[tuple[int, int]] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told.append((state.global_step, trainer.engine.ledger.steps))

    trainer = private_trainer(
        tmp_path,
        training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 60},
        callbacks=[Steps()],
    )
    trainer.train()
    assert told == [(step, step) for step in range(1, 61)]


def test_a_budget_that_ends_among_empty_draws_ends_the_run(tmp_path: Path) -> None:
    trainer = private_trainer(
        tmp_path,
        privacy={"target_epsilon": 4.0},
        training={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 10},
    )
    trainer.train()
    trainer.args.max_steps = 40
    trainer.train()  # there is no room for a step more
    assert trainer.engine.ledger.steps == 10
    assert trainer.epsilon() <= 4.0


def test_an_interrupted_trainer_trains_on(tmp_path: Path) -> None:
    interrupted: list[int] = []

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not interrupted:
                interrupted.append(trainer.engine.ledger.steps)
                raise KeyboardInterrupt

    trainer = private_trainer(tmp_path, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.engine.ledger.steps == interrupted[0] + 6


def test_another_data_set_is_trained_on(tmp_path: Path) -> None:
    trainer = private_trainer(tmp_path)
    looked = trainer.get_train_dataloader()
    assert (looked.batch_size, len(looked)) == (4, 4)
    other = completions(32, seed=9)
    trainer.train_dataset = other
    trainer.train()
    assert trainer.get_train_dataloader().dataset is other
    assert trainer.engine.ledger.entries[0][0].sample_rate == 4 / 32


def test_a_loss_of_a_batch_is_refused(tmp_path: Path) -> None:
    class Own(PrivateTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TypeError, match="override compute_example_losses"):
        Own(model=adapted(), args=arguments(tmp_path), privacy=PRIVACY, train_dataset=ROWS)


def test_a_loss_of_ones_own_is_averaged_in_evaluation(tmp_path: Path) -> None:
    trainer = private_trainer(
        tmp_path,
        compute_loss_func=lambda outputs, labels: causal_lm_loss(outputs.logits, labels),
        eval_dataset=completions(8, seed=3),
    )
    reference = private_trainer(tmp_path / "reference", eval_dataset=completions(8, seed=3))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference.evaluate()["eval_loss"], rel=0.3)
    trainer.train()


def test_memory_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="skip_memory_metrics=False tells of the largest private batch"):
        private_trainer(tmp_path, training={"skip_memory_metrics": False})


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_are_told_of_epsilon_offline(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tracker)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": kept,
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": kept,
    }.items():
        monkeypatch.setenv(name, str(value))
    code = f"""
from pathlib import Path
from tests.trainers.training import private_trainer
private_trainer(Path({str(tmp_path / "run")!r}), training={{"report_to": [{tracker!r}], "max_steps": 3}}).train()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    written = b"".join(path.read_bytes() for path in kept.rglob("*") if path.is_file())
    assert b"train/epsilon" in written
    assert b"train/loss" not in written


def test_a_checkpoint_keeps_the_batch_sizes_that_were_given(tmp_path: Path) -> None:
    private_trainer(tmp_path, training=SAVED).train()
    kept = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert (kept.per_device_train_batch_size, kept.gradient_accumulation_steps) == (2, 2)
