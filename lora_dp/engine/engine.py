"""PrivacyEngine: the only place where the privacy ideas meet."""

import io
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_dp.argument_checks import Elsewhere, Fixed, check_callable, check_count, check_kind, check_number, check_path
from lora_dp.atomic_files import KeptFile, write_bytes_atomically
from lora_dp.engine.cycle import Cycle
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.foreign_wrappers import check_not_prepared, check_not_wrapped, check_one_process
from lora_dp.engine.logical_batch import LEAVE_OUT, Drawn
from lora_dp.engine.optimizer import PrivateOptimizer, keep_out_of_graphs
from lora_dp.engine.phases import Phases
from lora_dp.engine.recorder import Recorder, recorder_of
from lora_dp.engine.step_options import StepOptions
from lora_dp.engine.validation import attach, batch_size, cover, frozen_norms
from lora_dp.isolation.check import check_isolation
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.isolation.trials import LossFunction, modes_kept
from lora_dp.lora.adapters import made_by_peft, warn_of_half_precision
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.per_example import NormMethod
from lora_dp.opacus_names import OF_ENGINE, OF_MAKE_PRIVATE, OF_NEW_ENGINE, AccountantName, raise_for, tells_users_of
from lora_dp.privacy.accounting import (
    Accountant,
    Ledger,
    PoissonGaussian,
    calibrate_noise_multiplier,
    check_delta,
    check_epsilon,
    check_promise,
)
from lora_dp.privacy.accounting.budget import Budget
from lora_dp.privacy.accounting.history import History, Spent
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping
from lora_dp.privacy.clipping import ClippingName, make_clip_rule
from lora_dp.privacy.correlated_noise import BandedNoise, CorrelatedMechanism
from lora_dp.privacy.filtering import Filter
from lora_dp.privacy.mechanism import Mechanism, make_mechanism
from lora_dp.privacy.randomness import SecureSource, SeededSource
from lora_dp.privacy.secret_state import renew
from lora_dp.privacy.shrinkage import Shrinkage

_OPTION = "call make_private again with another, for the optimizer that it returns"
_LOADER = "call make_private again with a DataLoader of another batch size"


class PrivacyEngine:
    """Makes training differentially private and keeps the account of it.

    Guarantee: with the returned loader and optimizer, the sequence of released updates is (ε, δ)-differentially
    private under adding or removing one example, with (ε, δ) from :meth:`get_epsilon`, as long as sampling and noise
    stay secret (the default; not with ``reproducible_seed``).

    Args:
        accountant: "pld" (tighter) or "rdp", both of Google's dp-accounting.
        reproducible_seed: sampling and noise follow this seed. For research only: a release is then no longer
            protected against whoever can guess the seed. From 0 to 2⁶⁴ − 1.

    Attributes:
        ledger: every step taken so far.
        history: whose steps these are, which a state that is loaded must know of.

    The examples of the methods go on from this one:

    >>> from torch.utils.data import TensorDataset
    >>> from lora_dp.losses import classification_loss
    >>> model = DPLoRALinear(4, 3, r=2)
    >>> sgd = torch.optim.SGD([model.lora_A, model.lora_B], lr=0.1)
    >>> data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), batch_size=16)
    >>> engine = PrivacyEngine()
    >>> model, optimizer, loader = engine.make_private(
    ...     model=model, optimizer=sgd, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0)
    >>> for x, y in loader:  # one pass over the data: four steps
    ...     optimizer.backward(classification_loss(model(x), y))
    ...     optimizer.step()
    >>> engine.ledger.steps, round(engine.get_epsilon(delta=1e-3), 2)
    (4, 2.51)
    """

    ledger = Fixed[Ledger](
        "'ledger' is fixed, for the optimizers of this engine write to it: a saved one is taken up by "
        "engine.load_state_dict, or engine.ledger.load_state_dict."
    )
    history = Fixed[History](
        "'history' is fixed, for it says whose steps there are: a saved one is taken up by engine.load_state_dict."
    )
    source = Fixed[SecureSource | SeededSource](
        "'source' is fixed, for loaders and optimizers of this engine draw from it: make another PrivacyEngine."
    )
    reproducible_seed = Elsewhere("make another PrivacyEngine")
    noise_multiplier, max_grad_norm, clipping = Elsewhere(_OPTION), Elsewhere(_OPTION), Elsewhere(_OPTION)
    sample_rate, expected_batch_size = Elsewhere(_LOADER), Elsewhere(_LOADER)

    @tells_users_of("Opacus", OF_NEW_ENGINE)
    def __init__(self, accountant: Accountant = "pld", *, reproducible_seed: int | None = None):
        if accountant not in ("pld", "rdp"):
            raise ValueError(f"Unknown accountant '{accountant}': choose 'pld' or 'rdp'.")
        if reproducible_seed is not None:
            check_count("reproducible_seed", reproducible_seed, least=0)
            if reproducible_seed >= 2**64:
                raise ValueError(f"reproducible_seed must be below 2**64, got {reproducible_seed}.")
        self.accountant: Accountant = cast(Accountant, AccountantName(accountant))
        self.ledger = Ledger()
        self.history = History(self.ledger)
        self._drawn: list[Drawn] = []
        self.source = SecureSource() if reproducible_seed is None else SeededSource(reproducible_seed)

    @tells_users_of("Opacus", OF_MAKE_PRIVATE)
    def make_private(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        clipping: ClippingName | AdaptiveClipping = "flat",
        phases: Phases = "AB",
        loss_reduction: LossReduction = "mean",
        low_pass: Filter | None = None,
        norm_method: NormMethod = "auto",
        regulate_noise: bool = False,
        shrinkage: Shrinkage | None = None,
        views: int = 1,
        correlated_noise: BandedNoise | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
        """Make one training run private at a given noise.

        Args:
            model: with private layers for everything that is trainable (:func:`lora_dp.inject_lora`); or one with
                PEFT's LoRA, whose layers become private in place (:mod:`lora_dp.lora.peft_layers`).
            optimizer: any of ``torch.optim`` over the model's trainable parameters.
            data_loader: its batch size is the expected batch size; batches are drawn by Poisson sampling.
            noise_multiplier: σ, in units of ``max_grad_norm``.
            max_grad_norm: clip bound C; inf (with σ = 0) means no clipping.
            clipping: "flat", "per_layer" (each layer at C / √layers), "automatic", or
                :class:`lora_dp.AdaptiveClipping`, whose bound follows a quantile of the norms from C on. Its count is
                released with the gradient: σ is of both together.
            phases: which of LoRA's factors each step trains: "B", "A", "AB" (both) or "BA" (alternating).
            loss_reduction: how a loss that is one number joins the examples: "mean" or "sum". Losses (N,) that are
                given to :meth:`PrivateOptimizer.backward` need none.
            low_pass: filter on the noisy gradient of each LoRA factor (:mod:`lora_dp.privacy.filtering`).
            norm_method: how per-example norms are computed; "auto" takes the cheaper.
            regulate_noise: clip and noise each factor's gradient by what it does to the product B·A, so that noise
                does not grow with the frozen factor (DEeR, :mod:`lora_dp.nn.regulator`); not with phases "AB".
            shrinkage: filter that knows the noise, on the noisy gradient of each parameter, before the regulator and
                ``low_pass`` (:mod:`lora_dp.privacy.shrinkage`).
            views: K rows of a batch for each example, all of one after those of another: (N·K, …), as of K augmented
                copies. Their gradients are averaged before the clip (De et al. 2022, arXiv 2204.13650), so that an
                example still moves the sum by at most C. Losses are of rows, (N·K,); a mask is of examples, (N,).
            correlated_noise: noise of b bands that later steps partly take back, and batches of b groups in turn
                (:mod:`lora_dp.privacy.correlated_noise`). The ledger has one entry for each b steps, at b times the
                rate; not with phases "BA", nor with what else knows or changes the noise.

        Masks of dropout and the like must be as secret as the noise: :meth:`renew_randomness` is called here. Who seeds
        torch afterwards must call it again before the next training pass, which else is refused.

        Returns:
            The same model, the private optimizer, and the loader to train on.

        Raises:
            ValueError: the model has a BatchNorm (but for one that is frozen and in eval mode) or an uncovered
                trainable parameter, the optimizer holds such a parameter, the data set is empty, or a number is out of
                range; always by name.
            TypeError: an iterable data set, an argument of another type, or a model that torch.compile has wrapped
                already.
            RuntimeError: torch.distributed runs several processes.

        >>> model, optimizer, loader = engine.make_private(
        ...     model=model, optimizer=sgd, data_loader=data, noise_multiplier=0.8, max_grad_norm=1.0, phases="BA")
        >>> optimizer.sample_rate, optimizer.expected_batch_size, len(loader)
        (0.25, 16, 4)
        """
        options = StepOptions(
            clipping, phases, loss_reduction, low_pass, norm_method, regulate_noise, shrinkage, views, correlated_noise
        )
        return self._make(model, optimizer, data_loader, noise_multiplier, max_grad_norm, options, None)

    @tells_users_of("Opacus", OF_MAKE_PRIVATE)
    def make_private_with_epsilon(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        max_grad_norm: float,
        epochs: float | None = None,
        steps: int | None = None,
        clipping: ClippingName | AdaptiveClipping = "flat",
        phases: Phases = "AB",
        loss_reduction: LossReduction = "mean",
        low_pass: Filter | None = None,
        norm_method: NormMethod = "auto",
        regulate_noise: bool = False,
        shrinkage: Shrinkage | None = None,
        views: int = 1,
        correlated_noise: BandedNoise | None = None,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
        """As :meth:`make_private`, with the noise calibrated so that the whole run keeps (ε, δ).

        Args:
            target_epsilon: ε of the run, what the ledger already holds not included in the calibration but in the
                budget.
            target_delta: δ, well below one over the number of examples.
            epochs: length of the run in passes over the data; give this or ``steps``.
            steps: length of the run in steps.

        Raises:
            ValueError: as above, ε ≤ 0, δ outside (0, 1) or not below 1 / number of examples, or not exactly one of
                epochs and steps.
            PrivacyBudgetExceeded: by the optimizer, before a step that would overrun the target.

        >>> model, optimizer, loader = engine.make_private_with_epsilon(
        ...     model=model, optimizer=sgd, data_loader=data, target_epsilon=8, target_delta=1e-3, epochs=2,
        ...     max_grad_norm=1.0)
        >>> round(optimizer.noise_multiplier, 2)
        0.63
        """
        options = StepOptions(
            clipping, phases, loss_reduction, low_pass, norm_method, regulate_noise, shrinkage, views, correlated_noise
        )
        check_not_prepared(optimizer, data_loader)
        check_number("target_epsilon", target_epsilon)
        check_number("target_delta", target_delta)
        check_epsilon(target_epsilon)
        check_delta(target_delta)
        if (epochs is None) == (steps is None):
            raise ValueError("Give the length of the run either as epochs or as steps.")
        if epochs is not None:
            check_number("epochs", epochs)
            if not math.isfinite(epochs):
                raise ValueError(f"epochs must be finite, got {epochs}: 3 is usual.")
        else:
            check_count("steps", steps, least=None)
        probe = PrivateDataLoader(data_loader, self.source, lambda _: None, lambda: None, cycle=Cycle(options.groups))
        check_promise(target_delta, len(probe.dataset), "examples")
        if steps is None:
            assert epochs is not None
            steps = math.ceil(epochs * probe.steps_per_epoch)
        if steps < 1:
            raise ValueError(f"The run must have at least one step, got {steps}.")
        turns = -(-steps // options.groups)
        noise_multiplier = calibrate_noise_multiplier(
            target_epsilon, target_delta, probe.turn_rate, turns, self.accountant
        )
        budget = (target_epsilon, target_delta, turns)
        return self._make(model, optimizer, data_loader, noise_multiplier, max_grad_norm, options, budget)

    def _make(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        options: StepOptions,
        budget: tuple[float, float, int] | None,
    ) -> tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]:
        check_one_process()
        check_not_prepared(optimizer, data_loader)
        check_kind("model", model, nn.Module, "inject_lora makes one ready")
        check_kind("optimizer", optimizer, torch.optim.Optimizer, "make one of torch.optim over the trained parameters")
        check_number("noise_multiplier", noise_multiplier)
        check_number("max_grad_norm", max_grad_norm, "one bound for all, which clipping='per_layer' shares out")
        if hasattr(model, "_orig_mod"):
            raise TypeError("Give the model itself, not a compiled one: torch.compile what make_private returns.")
        check_not_wrapped(model)
        if made_by_peft(model):
            self._adopt_peft(model, options)
        warn_of_half_precision(model)
        parameters = cover(model)
        mechanism = _mechanism(options, max_grad_norm, noise_multiplier, self.source)
        cycle = Cycle(options.groups)
        loader = PrivateDataLoader(
            data_loader,
            self.source,
            lambda size: private.batch.expect(size),
            lambda: private.step_on_empty_batch(),
            on_begin=lambda: private.batch.begin(),
            on_end=lambda: private.batch.check_stepped(),
            on_varying_width=lambda: private.recorder.expect_padding(),
            cycle=cycle,
        )
        event = PoissonGaussian(noise_multiplier, loader.turn_rate)
        limit = Budget(self.ledger, event, *budget[:2], self.accountant, budget[2]) if budget else None
        # Imports the compiler, as any optimizer has by now: not at the top, for a quick start.
        from lora_dp.engine.hooks import is_watched, watch

        keep_out_of_graphs()
        present = recorder_of(model)
        if present is not None and not is_watched(model):
            raise ValueError(
                "A part of this model, or a module around it, was made private before: call make_private for one and "
                "the same module, the whole of what you train, and begin with a new model."
            )
        recorder, drawn = present or Recorder(), Drawn()
        private = PrivateOptimizer(
            optimizer,
            recorder=recorder,
            parameters=parameters,
            mechanism=mechanism,
            event=event,
            history=self.history,
            expected_batch_size=loader.expected_batch_size,
            options=options,
            budget=limit,
            adapters=[module for module in model.modules() if isinstance(module, DPLoRALinear)],
            drawn=drawn,
            cycle=cycle,
        )
        # Last: a refusal above leaves the model as it was.
        self.renew_randomness()
        if present is None:
            watch(model, recorder)
        attach(model, recorder)
        self._drawn.append(drawn)
        return model, private, loader

    def _adopt_peft(self, model: nn.Module, options: StepOptions) -> None:
        if options.regulate_noise:
            raise ValueError(
                "regulate_noise works with adapters of inject_lora alone: save PEFT's and take them over by "
                "load_adapter(base_model, folder)."
            )
        # Only who has PEFT's adapters has PEFT.
        from lora_dp.lora.peft_layers import adopt_peft_layers

        adopt_peft_layers(model)

    def __getattr__(self, name: str) -> NoReturn:
        raise_for(self, name, OF_ENGINE)

    def renew_randomness(self) -> None:
        """Put torch's random generators, Python's and NumPy's into a new secret state of the operating system's.

        :meth:`make_private` does so. Call it again after whatever seeds torch later on: ``torch.manual_seed``,
        Transformers' ``set_seed`` and ``Trainer``, a random state that is restored from a file. With
        ``reproducible_seed`` nothing happens.

        >>> generator = torch.manual_seed(0)
        >>> engine.renew_randomness()
        >>> torch.initial_seed() == 0
        False
        """
        if self.source.secure:
            renew()

    def get_epsilon(self, delta: float) -> float:
        """ε spent so far at ``delta``; inf once a step without noise was taken.

        Warns where a drawn batch went through the model and waits for its step: left out, it tells what no ε counts.

        Raises:
            ValueError: δ outside (0, 1).
            TypeError: δ is no number.

        >>> round(engine.get_epsilon(delta=1e-3), 2), round(engine.get_epsilon(delta=1e-5), 2)
        (2.51, 4.21)
        """
        check_number("delta", delta)
        self._warn_of_waiting()
        return self.ledger.epsilon(delta, self.accountant)

    def _warn_of_waiting(self) -> None:
        if any(drawn and drawn.given for drawn in self._drawn):
            warnings.warn(
                "A drawn batch went through the model and waits for its step; left out, it would tell of its examples "
                f"what no ε counts: step every batch once, and {LEAVE_OUT}.",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the ledger, and the state of a seeded source (a secure key is never stored).

        Warns as :meth:`get_epsilon`.

        >>> saved = engine.state_dict()
        >>> saved["accountant"], saved["ledger"]["entries"][0]["count"]
        ('pld', 4)
        """
        self._warn_of_waiting()
        return self._state()

    def _state(self) -> dict[str, Any]:
        source = self.source.state_dict() if isinstance(self.source, SeededSource) else None
        return {
            "accountant": str(self.accountant),
            "ledger": self.ledger.state_dict(),
            "runs": [list(run) for run in self.history.runs],
            "source": source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. A secure source goes on with a new key.

        A ledger only grows: what this engine has released since ``state`` was saved was released, and stays.

        Raises:
            ValueError: no state of an engine, a damaged ledger, the state of a reproducible run in an engine that is
                not, or of another accountant, or a ledger that lacks steps of this engine's.

        >>> resumed = PrivacyEngine()
        >>> resumed.load_state_dict(engine.state_dict())
        >>> resumed.get_epsilon(delta=1e-3) == engine.get_epsilon(delta=1e-3)
        True
        """
        if not isinstance(state, dict) or not {"accountant", "ledger", "source"} <= state.keys():
            raise ValueError(
                "This is not the state of an engine, which has 'accountant', 'ledger' and 'source': give what "
                "engine.state_dict() returned."
            )
        if state["accountant"] != self.accountant:
            raise ValueError(
                f"The saved engine used the accountant '{state['accountant']}', this one '{self.accountant}': make "
                "this one as the saved one was."
            )
        loaded = Spent.of(state)
        if not loaded.continues(self.history.spent):
            remedy = (
                "load the model and the optimizer alone, and keep the engine"
                if self.history.holds(loaded.runs)
                else ("load it into a new engine before the first step, and sum ε over both")
            )
            raise ValueError(
                f"The saved ledger lacks steps that this engine has taken, {self.ledger.steps} in all, which cannot be "
                f"taken back: {remedy}."
            )
        if (state["source"] is None) == isinstance(self.source, SeededSource):
            raise ValueError(
                "The saved engine and this one differ in reproducible_seed: make this one as the saved one was."
            )
        self.ledger.load_state_dict(state["ledger"])
        self.history.go_on_from(loaded.runs)
        if self.ledger.on_append is not None:
            self.ledger.on_append()
        if isinstance(self.source, SeededSource):
            self.source.load_state_dict(state["source"])

    def keep_ledger(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a file before each step's noise is drawn, from now on.

        After a crash the file has every step that was released. It is this engine's alone, and the one file: a second
        call goes on in the other. The run that goes on takes it up by
        ``engine.load_state_dict(json.load(open(path)))``, and calls this again.

        Args:
            path: of a JSON file. If it is there already, its steps must be this engine's.

        Raises:
            ValueError: the file holds steps that this engine does not, or no ledger.
            RuntimeError: at a step, if another run has written to the file meanwhile.
            TypeError: no path.

        >>> engine.keep_ledger("privacy_ledger.json")
        >>> for x, y in loader.take(2):
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        >>> resumed = PrivacyEngine()
        >>> resumed.load_state_dict(json.loads(Path("privacy_ledger.json").read_text()))
        >>> resumed.ledger.steps == engine.ledger.steps
        True
        """
        check_path("path", path)
        file = Path(path)
        if file.exists():
            try:
                kept = Spent.of(json.loads(file.read_text(encoding="utf-8")))
            except (LookupError, TypeError, ValueError) as error:
                raise ValueError(f"{os.fspath(path)!r} holds no ledger of an engine: choose another file.") from error
            if not self.history.spent.continues(kept):
                raise ValueError(
                    f"{os.fspath(path)!r} holds {kept.ledger.steps} steps, not all of which this engine knows: go on "
                    "with them by engine.load_state_dict, or choose another file."
                )
        self.ledger.on_append = KeptFile(file, lambda: json.dumps(self._state())).write
        self.ledger.on_append()

    def save_checkpoint(
        self,
        *,
        path: str | os.PathLike[str],
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
    ) -> None:
        """Write a run to one file: weights, the optimizer's state and this engine's, as Opacus' method of this name.

        The file is either the old one or the new one after a crash. Steps after it are known to
        :meth:`keep_ledger`'s file alone.

        Args:
            path: of the file.
            module: the model.
            optimizer: the private optimizer.
            checkpoint_dict: what else is to be in the file, such as a scheduler's state.

        >>> engine.save_checkpoint(path="run.pt", module=model, optimizer=optimizer)
        >>> resumed = PrivacyEngine()
        >>> sorted(resumed.load_checkpoint(path="run.pt", module=model))
        ['engine', 'module', 'optimizer']
        """
        check_path("path", path)
        held = {**(checkpoint_dict or {}), "module": module.state_dict(), "engine": self.state_dict()}
        if optimizer is not None:
            held["optimizer"] = optimizer.state_dict()
        file = io.BytesIO()
        torch.save(held, file)
        write_bytes_atomically(Path(path), file.getvalue())

    def load_checkpoint(
        self, *, path: str | os.PathLike[str], module: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Take up what :meth:`save_checkpoint` wrote: weights, ledger, and the optimizer's state where one is given.

        Returns:
            All that the file holds.

        Raises:
            ValueError: no such file's content, or as of :meth:`load_state_dict`.

        >>> engine.save_checkpoint(path="run.pt", module=model)
        >>> resumed = PrivacyEngine()
        >>> held = resumed.load_checkpoint(path="run.pt", module=model)
        >>> resumed.ledger.steps == engine.ledger.steps
        True
        """
        check_path("path", path)
        held = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(held, dict) or not {"module", "engine"} <= held.keys():
            raise ValueError(f"{os.fspath(path)!r} was not written by engine.save_checkpoint: give one that was.")
        self.load_state_dict(held["engine"])
        module.load_state_dict(held["module"])
        if optimizer is not None:
            optimizer.load_state_dict(held["optimizer"])
        return held

    def check_isolation(self, model: nn.Module, batch: Any, criterion: LossFunction | None = None) -> None:
        """Prove on one batch that no example's rows, outputs or gradients depend on another (see
        :mod:`lora_dp.isolation.check`). Training batches are checked by themselves; a criterion that no check of theirs
        understands can be tested here, and is then taken.

        Args:
            model: with private layers.
            batch: a dict of keyword arguments (with labels, the model's own loss is checked), a tensor, or a pair
                (inputs, targets) with a ``criterion``; at least two examples.
            criterion: loss(model output, targets): a scalar, reduced as make_private was told, or (N,).

        Raises:
            IsolationError: naming the module, or the loss, in which examples meet.
            ValueError: fewer than two examples, or targets without a criterion.
            TypeError: a model, batch or criterion that is none.

        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> engine.check_isolation(model, (x, y), classification_loss)
        >>> def contrastive(outputs, _):  # compares each example with all others of its batch
        ...     return classification_loss(outputs @ outputs.T, torch.arange(len(outputs)))
        >>> engine.check_isolation(model, (x, y), contrastive)
        Traceback (most recent call last):
        lora_dp.errors.IsolationError: ...
        """
        check_kind("model", model, nn.Module, "give the one that is trained")
        if criterion is not None:
            check_callable("criterion", criterion, "output and targets")
        args, kwargs, targets = _call(batch, criterion)
        n = batch_size(args, kwargs)
        if n < 2:
            raise ValueError(f"The isolation check needs a batch of at least two examples, got {n}.")
        with modes_kept(model):
            still = frozen_norms(model)
            if not model.training:
                model.train()
            for norm in still:
                norm.eval()
            recorder = recorder_of(model)
            owned = recorder is not None and recorder.owner is not None
            passed = check_isolation(
                model,
                args,
                kwargs,
                n,
                targets=targets,
                criterion=criterion,
                reduction=recorder.losses.reduction if recorder is not None and owned else None,
            )
            if recorder is not None and passed.criterion is not None:
                recorder.losses.vouched.add(passed.criterion)


def _mechanism(
    options: StepOptions, max_grad_norm: float, noise_multiplier: float, source: SecureSource | SeededSource
) -> Mechanism:
    if options.correlated_noise is None or isinstance(options.clipping, AdaptiveClipping):
        return make_mechanism(options.clipping, max_grad_norm, noise_multiplier, source)
    rule = make_clip_rule(options.clipping, max_grad_norm)
    return CorrelatedMechanism(rule, noise_multiplier, source, options.correlated_noise)


def _call(batch: Any, criterion: LossFunction | None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return (), dict(batch), None
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise TypeError(
            f"batch must be a dict, a tensor or a pair (inputs, targets), got a {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}."
        )
    inputs, targets = batch
    if criterion is None:
        raise ValueError("A batch of inputs and targets needs the criterion that joins them.")
    return ((), dict(inputs), targets) if isinstance(inputs, dict) else ((inputs,), {}, targets)
