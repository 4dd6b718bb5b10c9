"""Transformers' Trainer with private steps."""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dp.argument_checks import check_kind
from lora_dp.engine.batch_memory import parts_of
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.engine.recorder import recorder_of
from lora_dp.extras import needing
from lora_dp.privacy.accounting import check_promise
from lora_dp.trainers.every_draw import EMPTY, EveryDraw
from lora_dp.trainers.example_losses import ExampleLosses, example_losses_of, split_labels
from lora_dp.trainers.privacy_arguments import PrivacyArguments
from lora_dp.trainers.refused_settings import check_not_overridden, check_refused_settings
from lora_dp.trainers.run_ledger import RunLedger
from lora_dp.trainers.statement import privacy_statement, write_statement

with needing("PrivateTrainer", "trainer"):
    import datasets
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

_LOG = logging.getLogger(__name__)

# Of what the Trainer logs, this is read off private batches.
_PRIVATE_LOGS = ("loss", "train_loss", "grad_norm", "total_flos")


@dataclass(frozen=True)
class _Run:
    of: tuple[Any, ...]
    optimizer: PrivateOptimizer
    draws: EveryDraw
    losses: ExampleLosses


class _StateOfEpoch(TrainerCallback):
    """A resumed epoch has fewer draws than a whole one: where it stands is told by the steps taken."""

    def __init__(self, trainer: "PrivateTrainer"):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / len(self._trainer.get_train_dataloader())


class PrivateTrainer(Trainer):
    """Transformers' ``Trainer`` whose steps are differentially private.

    The model has private layers (:func:`lora_dp.inject_lora`), or is PEFT's ``PeftModel``, which becomes private in
    place. All else is as in ``Trainer``, but for what would break the guarantee:

    - ``per_device_train_batch_size`` · ``gradient_accumulation_steps`` is the *expected* size of a batch.
    - No gradient of a batch is clipped, no loss divided by the tokens of a batch, no random state seeded or stored.
    - The training loss, the norm of gradients and what counts tokens are not logged. ``epsilon`` is.
    - Training stops when the budget is spent.
    - ``output_dir/privacy_ledger.json`` has every step before it is taken. A resumed run goes on from it.
    - A saved model has a privacy statement in its card, and in ``privacy.json``.

    Args:
        privacy: ε or σ, δ, and the rest of :class:`lora_dp.PrivacyArguments`.
        args, kwargs: ``Trainer``'s. A ``compute_loss_func(outputs, labels)`` returns one loss for each example, (N,).

    Attributes:
        engine: the :class:`lora_dp.PrivacyEngine` with the ledger.

    Raises:
        ValueError: a setting that private training cannot keep, with what to do.
        TypeError: ``privacy`` is no PrivacyArguments.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
    >>> gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8))
    >>> model = get_peft_model(gpt, LoraConfig(task_type="CAUSAL_LM"))
    >>> texts = [torch.randint(32, (8,)) for _ in range(16)]
    >>> trainer = PrivateTrainer(
    ...     model=model,
    ...     args=TrainingArguments("out", per_device_train_batch_size=4, max_steps=3, report_to="none", use_cpu=True,
    ...                            disable_tqdm=True),
    ...     train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
    ...     privacy=PrivacyArguments(target_epsilon=8, target_delta=1e-3))
    >>> _ = trainer.train()
    {'train_runtime': ..., 'epsilon': '7...'...}
    >>> round(trainer.epsilon(), 1), trainer.engine.ledger.steps
    (8.0, 3)
    """

    unsupported: ClassVar[dict[str, str]] = {
        "auto_find_batch_size": "a batch that does not fit would be drawn again",
        "neftune_noise_alpha": "its noise is scaled by the width of the batch",
        "fsdp": "private training runs in one process",
        "deepspeed": "private training runs in one process",
        "use_liger_kernel": "its fused loss joins the tokens of a batch",
    }

    def __init__(self, *args: Any, privacy: PrivacyArguments, **kwargs: Any):
        check_kind("privacy", privacy, PrivacyArguments, "PrivacyArguments(target_epsilon=…, target_delta=…)")
        self.privacy = privacy
        self.engine = PrivacyEngine(privacy.accountant, reproducible_seed=privacy.reproducible_seed)
        self._spent = RunLedger(self.engine, privacy)
        self._run: _Run | None = None
        self._steps_into_epoch = 0
        self._physical_batch_size: int | None = None
        check_not_overridden(type(self), PrivateTrainer)
        super().__init__(*args, **kwargs)
        self._given_losses = self.compute_loss_func
        if self._given_losses is not None:
            self.compute_loss_func = self._mean_loss  # what evaluation calls
        check_refused_settings(self.args, self.data_collator, self.unsupported)
        self.add_callback(_StateOfEpoch(self))
        if privacy.log_private_loss:
            warnings.warn("The training loss is logged, as log_private_loss says: no ε covers it.", stacklevel=2)

    # Set-up

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @contextmanager
    def _logical_batches(self) -> Iterator[None]:
        """Inside, the Trainer sees one batch a step, of the size that is expected."""
        args = self.args
        given = args.per_device_train_batch_size, args.gradient_accumulation_steps, self._train_batch_size
        self._physical_batch_size = given[0]
        args.per_device_train_batch_size = self._train_batch_size = given[0] * given[1]
        args.gradient_accumulation_steps = 1
        try:
            yield
        finally:
            args.per_device_train_batch_size, args.gradient_accumulation_steps, self._train_batch_size = given
            self._physical_batch_size = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; ``training_loss`` of what it returns is NaN, unless ``log_private_loss`` is set.

        Raises:
            ValueError: ``output_dir`` holds the ledger of another run, or a checkpoint has none; nothing was loaded.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(str(self._output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in '{self._output_dir}': train without resuming.")
        if resume_from_checkpoint:
            self._spent.take_up(Path(str(resume_from_checkpoint)))  # before its weights are
        else:
            self._spent.check_new(self._output_dir)
        try:
            with self._logical_batches():
                result = super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self._forget_run()  # a batch that was drawn and not stepped can be stepped no more
            raise
        if self.privacy.log_private_loss:
            return result
        metrics = {name: value for name, value in result.metrics.items() if name not in _PRIVATE_LOGS}
        return result._replace(training_loss=math.nan, metrics=metrics)

    def _forget_run(self) -> None:
        """Let the next training be made private anew, by the same engine and on the same optimizer."""
        if self._run is not None:
            self.optimizer = self._run.optimizer.original_optimizer
            self._run = None

    def get_train_dataloader(self) -> EveryDraw:  # type: ignore[override]
        """The private batches; the first call makes the model and the optimizer private.

        Raises:
            ValueError, TypeError: as of :meth:`lora_dp.PrivacyEngine.make_private`.
        """
        of = (self.model, self.train_dataset, self.data_collator)
        if self._run is not None and any(now is not then for now, then in zip(of, self._run.of, strict=True)):
            if self._run.of[0] is self.model:
                self._forget_run()
            self._run = None
        if self._run is None:
            self._run = self._make_private(of)
            self.optimizer = self._run.optimizer
        return self._run.draws

    def _make_private(self, of: tuple[Any, ...]) -> _Run:
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset: give one.")
        recorder = recorder_of(self._model)
        released = None if recorder is None else recorder.released
        if released is not None and not self.engine.history.holds(released.runs):
            raise ValueError(
                f"The model has {released.ledger.steps} private steps of another engine, which ε here would leave out: "
                "load them by trainer.engine.load_state_dict(engine.state_dict()), or begin with a new model."
            )
        losses = self._own_losses or example_losses_of(self._model, self.args.label_smoothing_factor)
        privacy, args = self.privacy, self.args
        options: dict[str, Any] = {
            "model": self._model,
            "optimizer": self.create_optimizer(),
            "data_loader": self._plain_loader(),
            "max_grad_norm": privacy.clip_bound,
            "clipping": privacy.clipping,
            "phases": privacy.phases,
        }
        if privacy.noise_multiplier is not None:
            made = self.engine.make_private(**options, noise_multiplier=privacy.noise_multiplier)
        else:
            assert privacy.target_epsilon is not None
            length: dict[str, Any] = (
                {"steps": args.max_steps} if args.max_steps > 0 else {"epochs": args.num_train_epochs}
            )
            made = self.engine.make_private_with_epsilon(
                **options, target_epsilon=privacy.target_epsilon, target_delta=privacy.delta, **length
            )
        _, optimizer, loader = made
        check_promise(privacy.delta, len(loader.dataset), "examples")
        return _Run(of, optimizer, EveryDraw(loader, optimizer, self._stop), losses)

    def _plain_loader(self) -> DataLoader[Any]:
        dataset: Any = self.train_dataset
        collate, args = self.data_collator, self.args
        if not isinstance(dataset, Sized):
            raise ValueError("Poisson sampling needs to know how many examples there are: load the whole data set.")
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return DataLoader(
            dataset,
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            shuffle=True,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    @property
    def _own_losses(self) -> ExampleLosses | None:
        given = self._given_losses
        return None if given is None else lambda outputs, labels: given(outputs, labels.get("labels", labels))

    def _mean_loss(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        assert self._given_losses is not None
        losses: Tensor = self._given_losses(outputs, labels)
        return losses.mean()

    def _stop(self) -> None:
        _LOG.warning("The privacy budget is spent: training stops, and the model is kept as it is.")
        self.control.should_training_stop = True

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._spent.begin(self._output_dir)
        return prepared

    # The loop

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, self._steps_into_epoch = super()._init_training_state(*args, **kwargs)
        return epochs, 0  # nothing is to be skipped: each draw is a fresh one

    def _run_epoch(self, *, train_dataloader: EveryDraw, **kwargs: Any) -> None:  # type: ignore[override]
        into, self._steps_into_epoch = self._steps_into_epoch, 0
        super()._run_epoch(train_dataloader=train_dataloader.after(into), **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """One draw; its tokens are not counted, since no loss may be divided by what a batch holds."""
        batch = next(epoch_iterator, None)
        return [] if batch is None else [batch], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one draw, in parts of ``per_device_train_batch_size`` examples.

        Returns:
            The mean loss of its examples where ``log_private_loss`` is set, else 0.
        """
        if inputs is EMPTY:
            # The loader has taken this step: Accelerate's optimizer takes none while gradients are not in sync.
            self.accelerator.gradient_state._set_sync_gradients(False)
            return torch.zeros((), device=self.args.device)
        assert self._run is not None and self._physical_batch_size is not None
        optimizer = self._run.optimizer
        model.train()
        inputs = self._prepare_inputs(inputs)
        parts = list(parts_of(inputs, self._physical_batch_size))
        total, seen = torch.zeros((), device=self.args.device), 0
        for number, part in enumerate(parts):
            if number:
                optimizer.step()
            if number < len(parts) - 1:
                optimizer.signal_skip_step()
            with self.compute_loss_context_manager():
                losses = self.compute_example_losses(model, part)
            optimizer.backward(losses)
            if self.privacy.log_private_loss:
                total, seen = total + losses.detach().sum(), seen + len(losses)
        return total / max(seen, 1)

    def compute_example_losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of each example, (N,), from a forward of ``model``: override it for a loss of your own."""
        assert self._run is not None
        rest, labels = split_labels(inputs, self.label_names)
        if not labels and self._own_losses is None:
            raise ValueError(
                "A batch has no labels: give the data a column labels, or for a language model the data collator "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False), which makes them."
            )
        base = self.accelerator.unwrap_model(model)
        if "labels" in labels and hasattr(base, "prepare_decoder_input_ids_from_labels"):
            rest.setdefault("decoder_input_ids", base.prepare_decoder_input_ids_from_labels(labels=labels["labels"]))
        if "attention_mask" in inputs:
            labels["attention_mask"] = inputs["attention_mask"]
        return self._run.losses(model(**rest), labels)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Every example was clipped by itself."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """The norm of a private gradient is not looked at."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: it would count the tokens of private batches."""
        return 0

    # What is told, and kept

    def epsilon(self) -> float:
        """ε spent so far, at ``target_delta``."""
        return self.engine.ledger.epsilon(self.privacy.delta, self.engine.accountant)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with ``epsilon``, and without what is read off private batches."""
        if not self.privacy.log_private_loss:
            logs = {name: value for name, value in logs.items() if name not in _PRIVATE_LOGS}
        if not any(name.startswith(("eval_", "test_")) for name in logs):
            logs = {**logs, "epsilon": self.epsilon()}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._spent.save(Path(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        """Random states are as secret as the noise: none is written."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """None is read: a state that is known would make masks known."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        args = self.args
        shown = args.per_device_train_batch_size, args.gradient_accumulation_steps
        if self._physical_batch_size is not None:  # while training, args tell the logical batch
            args.per_device_train_batch_size = self._physical_batch_size
            args.gradient_accumulation_steps = shown[0] // self._physical_batch_size
        try:
            super()._save(output_dir, state_dict)
        finally:
            args.per_device_train_batch_size, args.gradient_accumulation_steps = shown
        self._write_statement(Path(output_dir or self._output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the privacy statement."""
        super().create_model_card(*args, **kwargs)
        self._write_statement(self._output_dir)

    def _write_statement(self, folder: Path) -> None:
        if not self.engine.ledger.steps:
            return  # nothing was trained here, of which there would be something to state
        statement = privacy_statement(
            ledger=self.engine.ledger.state_dict(),
            epsilon=self.epsilon(),
            delta=self.privacy.delta,
            accountant=self.privacy.accountant,
            settings=self._spent.settings or [self.privacy.as_dict()],
        )
        write_statement(folder, statement)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: each trial would spend ε of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "Each trial of a search trains on the private data and spends ε of its own: train once for each setting, "
            "and sum ε over the runs."
        )
