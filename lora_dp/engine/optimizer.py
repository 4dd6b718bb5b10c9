"""The private optimizer: per-example gradients in, one noised step of any ``torch.optim`` optimizer out."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lora_dp.argument_checks import Elsewhere, Fixed, check_count, check_flag, check_kind, check_number
from lora_dp.engine.cycle import Cycle
from lora_dp.engine.foreign_wrappers import check_one_process
from lora_dp.engine.fused_step import find_fused_step
from lora_dp.engine.logical_batch import Clipped, Drawn, LogicalBatch
from lora_dp.engine.pass_clipper import PassClipper
from lora_dp.engine.phases import PhaseCycle, Phases
from lora_dp.engine.recorder import Recorder
from lora_dp.engine.step_options import StepOptions
from lora_dp.engine.told_noise import check_noise_can_be_told, noise_in_gradients, noise_of_batch
from lora_dp.engine.validation import PrivateParameter, check_dtype, check_holds, check_optimizer, unfrozen
from lora_dp.errors import IsolationError
from lora_dp.isolation.loss_checks.backward_calls import backward_unseen
from lora_dp.isolation.loss_checks.graph import LossReduction
from lora_dp.nn.lora_linear import DPLoRALinear
from lora_dp.nn.per_example import Pass
from lora_dp.nn.regulator import Regulator
from lora_dp.opacus_names import OF_OPTIMIZER, raise_for
from lora_dp.ops.native import refuse_capture
from lora_dp.ops.private_update import ExampleSum
from lora_dp.ops.registry import wide_dtype
from lora_dp.optim.known_noise import noise_aware
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from lora_dp.privacy.accounting.budget import Budget
from lora_dp.privacy.accounting.history import History, Run, read_runs
from lora_dp.privacy.adaptive_clipping import QuantileClipping
from lora_dp.privacy.mechanism import Mechanism, total
from lora_dp.privacy.secret_state import end_pass

_LEDGER_STEPS, _LEDGER_RUNS, _CLIP_BOUNDS = "ledger_steps", "ledger_runs", "clip_bounds"
_ACCOUNT = (
    "'{name}' is fixed, for the engine computes ε from what this optimizer writes to it: a saved account is taken up "
    "by engine.load_state_dict."
)
_OPTION = "call make_private again with another"
_EAGER = "what was drawn at random while it was compiled would come back in every step"


def _spent(state: Mapping[str, Any], steps: int) -> tuple[int, list[Run]]:
    """How many private steps a saved state, or group, goes on from (``steps`` if it does not say); of which runs."""
    steps = state.get(_LEDGER_STEPS, steps)
    check_count(_LEDGER_STEPS, steps, least=0)
    saved = state.get(_LEDGER_RUNS)
    return steps, [] if saved is None else read_runs(saved, steps)


class PrivateOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer so that its steps are ĝ = (Σᵢ mᵢcᵢgᵢ + σCz) / L with L the *expected* batch size.

    Made by :meth:`lora_dp.PrivacyEngine.make_private`. Learning-rate schedulers take it as any optimizer; its
    state dict is the wrapped one's with ``steps_taken``. Each step appends its event to the ledger before the noised
    gradient exists; with :class:`lora_dp.BandedNoise` the first of each round does so for all of it.

    The examples of the methods go on from this one:

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from lora_dp import PrivacyEngine
    >>> from lora_dp.losses import classification_loss
    >>> model, engine = DPLoRALinear(4, 3, r=2), PrivacyEngine()
    >>> sgd = torch.optim.SGD([model.lora_A, model.lora_B], lr=0.1)
    >>> data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(3, (64,))), batch_size=16)
    >>> model, optimizer, loader = engine.make_private(
    ...     model=model, optimizer=sgd, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0)
    >>> optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size
    (1.0, 1.0, 16)
    """

    event = Fixed[PoissonGaussian]()
    noise_multiplier = Fixed[float]()
    sample_rate = Fixed[float]()
    expected_batch_size = Fixed[int]()
    loss_reduction = Fixed[LossReduction]()
    views = Fixed[int]()
    mechanism = Fixed[Mechanism]()
    ledger = Fixed[Ledger](_ACCOUNT)
    history = Fixed[History](_ACCOUNT)
    clipping, low_pass = Elsewhere(_OPTION), Elsewhere(_OPTION)
    norm_method, regulate_noise, shrinkage = Elsewhere(_OPTION), Elsewhere(_OPTION), Elsewhere(_OPTION)
    correlated_noise = Elsewhere(_OPTION)
    phases = Elsewhere("call optimizer.set_phases")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        recorder: Recorder,
        parameters: Sequence[PrivateParameter],
        mechanism: Mechanism,
        event: PoissonGaussian,
        history: History,
        expected_batch_size: int,
        options: StepOptions,
        budget: Budget | None,
        adapters: Sequence[DPLoRALinear],
        drawn: Drawn,
        cycle: Cycle,
    ):
        self.original_optimizer = optimizer
        self.mechanism, self.event, self.history, self.ledger = mechanism, event, history, history.ledger
        self.noise_multiplier, self.sample_rate = event.noise_multiplier, event.sample_rate
        self.expected_batch_size = expected_batch_size
        self.steps_taken = 0
        # Of a state of an earlier PrivateOptimizer that was loaded into this one of torch's.
        self._restored, self._restored_runs = max(_spent(group, 0) for group in optimizer.param_groups)
        self._recorder = recorder
        self._covered = {id(p.parameter): p for p in parameters}
        self._dtypes = {id(p.parameter): p.parameter.dtype for p in parameters}
        self._phases = PhaseCycle(options.phases)
        self._options, self.loss_reduction, self.views = options, options.loss_reduction, options.views
        self._budget, self._adapters = budget, adapters
        self.regulators: dict[int, Regulator] = {}
        self._clipper = PassClipper(self._covered, options.loss_reduction)
        self._drawn, self.batch = drawn, LogicalBatch(drawn)
        self._cycle = cycle
        self._moving = mechanism.rule if isinstance(mechanism.rule, QuantileClipping) else None
        if isinstance(optimizer, PrivateOptimizer | torch.optim.LBFGS):
            raise TypeError(
                f"{type(optimizer).__name__} cannot be made private: give a torch.optim optimizer that takes one "
                "gradient a step, and not yet a private one (optimizer.original_optimizer is within)."
            )
        check_optimizer(optimizer, self._covered)
        check_holds(optimizer, [p for p in parameters if p.factor is None or p.factor in self._phases.all_factors])
        check_noise_can_be_told(optimizer, options)
        self.activate()

    @property
    def max_grad_norm(self) -> float:
        """C of the next step, which moves with :class:`lora_dp.AdaptiveClipping` alone.

        >>> optimizer.max_grad_norm
        1.0
        """
        return self.mechanism.rule.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: object) -> NoReturn:
        raise AttributeError(Fixed().refusal.format(name="max_grad_norm"))

    # What torch's schedulers and users see of an optimizer is the wrapped one's.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.original_optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.original_optimizer.state

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        """What ``GradScaler.step`` asks for first.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "GradScaler scales losses before clipping and skips steps by what private gradients hold: leave it out, "
            "and train in bfloat16 (torch.autocast) or float32."
        )

    @property
    def recorder(self) -> Recorder:
        """Where the model's passes are recorded."""
        return self._recorder

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.original_optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, with ``steps_taken`` and what of the ledger :meth:`load_state_dict` checks.

        >>> saved = optimizer.state_dict()
        >>> saved["steps_taken"], saved["param_groups"][0]["lr"]
        (0, 0.1)
        """
        state = self.original_optimizer.state_dict()
        # In the groups, too: torch's optimizers keep it there, where one of them is given this state.
        spent = {_LEDGER_STEPS: self.ledger.steps, _LEDGER_RUNS: [list(run) for run in self.history.runs]}
        groups = [{**group, **spent} for group in state["param_groups"]]
        moved = {} if self._moving is None else {_CLIP_BOUNDS: self._moving.state_dict()}
        return {**state, "param_groups": groups, "steps_taken": self.steps_taken, **spent, **moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, or the state of a plain optimizer over the same parameters.

        Raises:
            ValueError: no state of an optimizer, or of one over other parameters, or its runs cannot be read; or its
                clip bound moved and this one's is fixed.
            TypeError: ``steps_taken`` or ``ledger_steps`` is no whole number.
            RuntimeError: a bound that moves, in the middle of a logical batch.

        >>> saved = optimizer.state_dict()
        >>> saved["param_groups"][0]["lr"] = 0.05
        >>> optimizer.load_state_dict(saved)
        >>> optimizer.param_groups[0]["lr"]
        0.05
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "This is not the state of an optimizer, which has 'state' and 'param_groups': give what "
                "optimizer.state_dict() returned."
            )
        steps_taken = state_dict.get("steps_taken", self.steps_taken)
        # The ledger may have steps of earlier optimizers, too.
        check_count("steps_taken", steps_taken, least=0)
        ledger_steps, runs = _spent(state_dict, steps_taken)
        self._load_bounds(state_dict.get(_CLIP_BOUNDS))
        self.original_optimizer.load_state_dict(state_dict)
        self.steps_taken, self._restored, self._restored_runs = steps_taken, ledger_steps, runs
        if self._recorder.owner is self:
            self.activate()

    def _load_bounds(self, saved: Any) -> None:
        if saved is None:
            return
        if self._moving is None:
            raise ValueError("The saved bound moved, and this one is fixed: give make_private AdaptiveClipping again.")
        self.batch.check_whole()  # what was clipped at one bound must not get the noise of another
        check_kind(_CLIP_BOUNDS, saved, dict, "give what optimizer.state_dict() returned")
        self._moving.load_state_dict(saved)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the parameters must be covered.

        Raises:
            TypeError: no dict.
            ValueError: at the next step, if one is not.

        >>> _, optimizer, _ = engine.make_private(
        ...     model=model, optimizer=torch.optim.SGD([model.lora_B], lr=0.2), data_loader=data,
        ...     noise_multiplier=1.0, max_grad_norm=1.0, phases="B")
        >>> optimizer.add_param_group({"params": [model.lora_A], "lr": 0.1})
        >>> optimizer.set_phases("BA")
        """
        check_kind("param_group", param_group, dict, "with its parameters under 'params'")
        self.original_optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> NoReturn:
        raise_for(self, name, OF_OPTIMIZER)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("A private optimizer cannot be copied or pickled, its noise would repeat: use state_dict().")

    def register_step_pre_hook(self, hook: Any) -> Any:
        """A hook on the wrapped optimizer's step, when ``.grad`` holds the noised gradients.

        >>> handle = optimizer.register_step_pre_hook(lambda *_: print(model.lora_B.grad.shape))
        >>> for x, y in loader.take(1):
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        torch.Size([3, 2])
        """
        return self.original_optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """A hook after the wrapped optimizer's step.

        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> handle = optimizer.register_step_post_hook(lambda *_: schedule.step())  # follows empty batches, too
        >>> for x, y in loader.take(2):
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        >>> optimizer.param_groups[0]["lr"]
        0.025
        """
        return self.original_optimizer.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return (
            f"PrivateOptimizer(noise_multiplier={self.noise_multiplier:g}, "
            f"clipping={self.mechanism.rule}, phases='{self._phases.name}', {self.original_optimizer!r})"
        )

    def activate(self) -> None:
        """Make this optimizer the one for which the model records, where several share one model.

        >>> _, other, other_loader = engine.make_private(
        ...     model=model, optimizer=sgd, data_loader=data, noise_multiplier=2.0, max_grad_norm=1.0)
        >>> optimizer.activate()  # the first again, for the steps that follow
        >>> for x, y in loader.take(1):
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        >>> engine.ledger.entries[0][0].noise_multiplier
        1.0
        """
        if self._recorder.owner is not self:
            self._recorder.discard()  # another's examples must not enter a step of this one
        factors = self._phases.factors(self.steps_taken)
        self._recorder.trained = frozenset(
            key for key, p in self._covered.items() if p.factor is None or p.factor in factors
        )
        if self._moving is not None and not self.batch.examples:
            self._moving.choose("".join(sorted(factors)))
        self._recorder.method, self._recorder.views = self._options.norm_method, self.views
        self._recorder.losses.reduction = self.loss_reduction
        self._recorder.owner, self._recorder.on_pass = self, self._drawn.give
        self._set_regulators()

    def _set_regulators(self) -> None:
        self.regulators = {}
        for layer in self._adapters:
            layer.regulator = None  # whatever another optimizer of this model left there
            if not self._options.regulate_noise:
                continue
            if id(layer.lora_B) in self._recorder.trained:
                self.regulators[id(layer.lora_B)] = layer.regulator = Regulator.beside("B", layer.lora_A)
            elif id(layer.lora_A) in self._recorder.trained:
                self.regulators[id(layer.lora_A)] = layer.regulator = Regulator.beside("A", layer.lora_B)

    def set_phases(self, phases: Phases) -> None:
        """Train these factors from the next step on; a cycle such as "BA" starts where ``steps_taken`` says.

        Raises:
            ValueError: unknown phases, or the wrapped optimizer lacks a parameter of theirs.
            RuntimeError: in the middle of a logical batch.

        >>> optimizer.set_phases("B")
        >>> before = model.lora_A.detach().clone()
        >>> for x, y in loader:
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        >>> torch.equal(model.lora_A, before)
        True
        """
        if self.batch.examples or (self._recorder.owner is self and self._recorder.current is not None):
            raise RuntimeError("Phases cannot change inside a logical batch: take the step first.")
        self._options.check_phases(phases)
        chosen = PhaseCycle(phases)
        check_holds(
            self.original_optimizer,
            [p for p in self._covered.values() if p.factor is None or p.factor in chosen.all_factors],
        )
        self._phases = chosen
        self.activate()

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Let the next :meth:`step` only add its micro-batch to the logical batch: no noise, no update.

        >>> for x, y in loader:
        ...     half = len(x) // 2
        ...     optimizer.signal_skip_step()
        ...     optimizer.backward(classification_loss(model(x[:half]), y[:half]))
        ...     optimizer.step()  # adds the first half
        ...     optimizer.backward(classification_loss(model(x[half:]), y[half:]))
        ...     optimizer.step()  # adds the second, and noise once
        >>> optimizer.steps_taken
        4
        """
        check_flag("do_skip", do_skip)
        self.batch.more_follows = do_skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients that no step has taken; micro-batches already added to the logical batch stay.

        >>> for x, y in loader:
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> model.lora_B.grad is None
        True
        """
        self._recorder.forget_gradients()
        self.original_optimizer.zero_grad(set_to_none)

    def backward(self, losses: Tensor, *, weight: float = 1.0, retain_graph: bool = False) -> None:
        """Differentiate the losses of single examples: the way that no reduction can spoil.

        Args:
            losses: (N,), one for each example of the last forward, from the model's outputs (:mod:`lora_dp.losses`).
                With ``views`` (N·views,), one for each row; an example's loss is the mean over its own.
            weight: a public number by which all are multiplied, such as a schedule's; never read off a batch, not 0.
            retain_graph: as torch's.

        Raises:
            ValueError: another shape, losses that do not come from the model's outputs, or a weight that is 0, infinite
                or NaN.
            TypeError: the weight is no number, but a tensor say.
            RuntimeError: no training forward before, or another optimizer is active.
            IsolationError: an example's loss depends on others.

        >>> for step, (x, y) in enumerate(loader):
        ...     optimizer.backward(classification_loss(model(x), y), weight=1 / (step + 1))
        ...     optimizer.step()
        """
        check_number("weight", weight, "one public number for all examples; weigh each in its own loss")
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"weight must be finite and not 0, got {weight}: leave it out for 1.")
        check_flag("retain_graph", retain_graph)
        finished = self._recorder.current
        if self._recorder.owner is not self or finished is None:
            raise RuntimeError(
                "backward() needs a training forward of the private model before it, with this optimizer active."
            )
        if not isinstance(losses, Tensor) or losses.shape != (finished.rows,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"optimizer.backward takes the loss of each of the {finished.rows} "
                f"{'examples' if finished.views == 1 else 'rows'}, shape ({finished.rows},), got {shape}: use "
                "reduction='none' and join what belongs to one example, or a loss of lora_dp.losses."
            )
        self._recorder.losses.vector(losses, finished.rows)
        finished.summed = True
        backward_unseen(losses.sum() * weight, retain_graph=retain_graph)
        self._recorder.losses.after_backward()

    def step(self, closure: Callable[[], Any] | None = None, *, mask: Tensor | None = None) -> Any:
        """Clip and add the examples of the last pass; unless told to skip, noise the sum and update.

        Args:
            closure: runs forward and backward once, as torch's; its value is returned.
            mask: (N,) bool; an example with False contributes nothing, with all its views: padding up to a fixed batch
                size, or one that is to be left out. An example's entry must depend on that example alone. With
                ``loss_reduction="mean"`` the loss must be the mean over all N, those with False included.

        Raises:
            PrivacyBudgetExceeded: the step would overrun the target ε; nothing has been released.
            RuntimeError: nothing was recorded, another optimizer is active, or the batch is not the one drawn.
            ValueError: a wrong mask, or the wrapped optimizer holds an uncovered parameter.
            TypeError: a mask that is no tensor, or a closure that cannot be called.

        >>> for x, y in loader:
        ...     optimizer.backward(classification_loss(model(x), y))
        ...     optimizer.step(mask=x.isfinite().all(1))  # an example that cannot be used adds nothing
        >>> optimizer.steps_taken
        4
        """
        value = None
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a bool tensor, got a {type(mask).__name__}: torch.tensor makes one.")
        if closure is not None and not callable(closure):
            raise TypeError(f"closure must be a function, got a {type(closure).__name__}: give a mask as mask=….")
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._accumulate(mask)
        if self.batch.more_follows:
            self.batch.more_follows = False
        else:
            self.release()
        return value

    def step_on_empty_batch(self) -> None:
        """The step of a batch in which Poisson sampling drew nobody: noise alone. The private loader takes it itself.

        It is no step for a batch that holds somebody: who left that out for what one example holds would take away what
        all others add, many times C.

        Raises:
            PrivacyBudgetExceeded: as for :meth:`step`.
            RuntimeError: a logical batch is under way, or a batch with examples was drawn and waits for its step.
        """
        self.batch.check_empty()
        self.activate()
        self._release()

    def check_budget(self) -> None:
        """Refuse where the next step would overrun the target ε, before a batch is drawn for it.

        Raises:
            PrivacyBudgetExceeded: it would.

        >>> optimizer.check_budget()  # no target ε was given
        """
        if self._budget is not None and self._cycle.begins:
            self._budget.require_room()

    def _accumulate(self, mask: Tensor | None) -> None:
        if self._recorder.owner is not self:
            raise RuntimeError("Another private optimizer is recording on this model: call activate() before forward.")
        examined = self._recorder.losses.examined
        self._trained()
        finished = self._recorder.take()
        if finished.filled and not examined:
            raise IsolationError(
                "Gradients reached private layers from a loss that was not seen: compute it from what the model "
                "returns (not from a hook's features, say), and differentiate it by backward()."
            )
        n = finished.n
        if mask is not None and (mask.shape != (n,) or mask.dtype != torch.bool):
            raise ValueError(
                f"mask must be a bool tensor of shape ({n},), got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        self.take(self.clip(finished, mask), n, n if mask is None else int(mask.sum()))

    def clip(self, finished: Pass, mask: Tensor | None) -> Clipped:
        """Σᵢ mᵢcᵢgᵢ of one finished pass: private still, to be noised before anyone sees it."""
        return self._clipper.clip_pass(self.mechanism, finished, mask)

    def take(self, clipped: Clipped, examples: int, kept: int) -> None:
        """Add one micro-batch to the logical batch: its sums, its size, and how many of its examples no mask hid."""
        end_pass(self)
        self.batch.add_micro_batch(clipped, examples, kept)

    def release(self) -> None:
        """Noise the logical batch and update; what :meth:`step` does after the last micro-batch.

        Raises:
            PrivacyBudgetExceeded, RuntimeError: as for :meth:`step`.
        """
        self.batch.check_drawn()
        self._release()

    def _trained(self) -> list[PrivateParameter]:
        trained = unfrozen(p for key, p in self._covered.items() if key in self._recorder.trained)
        for p in trained:
            check_dtype(p, self._dtypes[id(p.parameter)], kept=p.parameter in self.original_optimizer.state)
        return trained

    def _release(self) -> None:
        refuse_capture("step", next(iter(self._covered.values())).parameter.device)
        check_one_process()
        trained = self._trained()
        check_optimizer(self.original_optimizer, self._covered)
        if self.ledger.steps < self._restored or not self.history.holds(self._restored_runs):
            raise RuntimeError(
                f"The optimizer has gone on from {self._restored} private steps and the engine's ledger has "
                f"{self.ledger.steps}, perhaps of another run, so that ε would leave out the others: restore it by "
                "engine.load_state_dict(...) with what engine.state_dict() returned."
            )
        count, collected = self.batch.centred_count, self.batch.collect()
        if self._cycle.begins:
            if self._budget is not None:
                self._budget.check()
            self.ledger.append(self.event)
        self._recorder.released = self.history
        sums = [collected.get(id(p.parameter), _zeros_like(p.parameter)) for p in trained]
        # Whatever plain gradient was left on any parameter, frozen ones too, must not move it.
        self.original_optimizer.zero_grad(set_to_none=True)
        step = None
        if not self.regulators and self._options.shrinkage is None:
            step = find_fused_step(self.original_optimizer, trained, sums, self.mechanism, self._options.low_pass)
        if step is None:
            self._step_by_torch(trained, sums)
        else:
            with self.batch.whole_or_lost():
                step(
                    self.original_optimizer,
                    trained,
                    sums,
                    self.mechanism,
                    self._options.low_pass,
                    self.expected_batch_size,
                )
        if self._moving is not None:  # after the step, whose noise is that of the bound before
            with self.batch.whole_or_lost():
                self._moving.follow(count, self.expected_batch_size)
        self.steps_taken += 1
        self._cycle.advance()
        self._recorder.losses.steps += 1
        self.batch.stepped = True
        self.activate()

    def _step_by_torch(self, trained: Sequence[PrivateParameter], sums: Sequence[Tensor | ExampleSum]) -> None:
        with torch.no_grad():
            with self.batch.whole_or_lost():
                released = self.mechanism.release([total(value) for value in sums])
            std = noise_of_batch(trained, self.mechanism, self.expected_batch_size)
            for p, noisy in zip(trained, released, strict=True):
                gradient = noisy.div_(self.expected_batch_size)
                if self._options.shrinkage is not None:
                    gradient = self._options.shrinkage(gradient, std)
                if (regulator := self.regulators.get(id(p.parameter))) is not None:
                    gradient = regulator.restored(gradient)
                if self._options.low_pass is not None and p.factor is not None:
                    gradient = self._options.low_pass(gradient)
                p.parameter.grad = gradient.to(p.parameter)
        if (aware := noise_aware(self.original_optimizer)) is not None:
            aware.set_noise_std(noise_in_gradients(trained, std, self._options.low_pass, self.regulators))
        self.original_optimizer.step()


@functools.cache
def keep_out_of_graphs() -> None:
    """Let no compiled function contain what an optimizer does. Importing the compiler takes a second, so that this is
    for when it is imported anyway."""
    for name in ("backward", "step", "zero_grad"):
        eager = torch.compiler.disable(getattr(PrivateOptimizer, name), reason=_EAGER)
        setattr(PrivateOptimizer, name, eager)


def _zeros_like(parameter: nn.Parameter) -> Tensor:
    return torch.zeros(parameter.shape, dtype=wide_dtype(parameter.dtype), device=parameter.device)
