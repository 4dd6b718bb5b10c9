"""A client's part of a round: local training on its examples, and what leaves it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.engine.recorder import Recorder
from lora_dp.fed.data.examples import Examples
from lora_dp.fed.methods import LocalTurn, Method, State
from lora_dp.fed.rounds import as_released
from lora_dp.fed.rounds.contained_failures import Failures, GivenUp, accumulate
from lora_dp.fed.rounds.fixed_shapes import OneShape
from lora_dp.fed.rounds.local_training import Kind, LocalSteps, LocalTraining, summing
from lora_dp.fed.rounds.messages import Task, Update, Workspace
from lora_dp.fed.rounds.privacy_plan import PrivacyPlan, client_mechanism, clipped
from lora_dp.fed.rounds.regulators import regulators
from lora_dp.fed.rounds.seeds import Stream, derived_seed
from lora_dp.nn.regulator import Regulator
from lora_dp.privacy.accounting import Ledger, PoissonGaussian
from lora_dp.privacy.filtering import make_filter
from lora_dp.privacy.randomness import RandomSource, SecureSource, SeededSource
from lora_dp.privacy.secret_state import secret_generators


@dataclass(frozen=True)
class Trainer:
    """Does any client's turn on this process's model. It holds nothing of any client: between turns nothing is left.

    Guarantee: with the example as unit, what :meth:`train` returns is the result of noised steps only; with the client
    as unit and noise by clients, it is noised as a whole. Either way all that a client sends in the planned number of
    rounds is (ε, δ) differentially private. Taken to be public: the number of a client's examples (not with the client
    as unit), which rounds it takes part in, and all settings. It holds where training fails on private data too: with
    the example as unit, an example on which it fails contributes nothing; with the client as unit, its change is zero
    before noise is added. The log of this process tells what failed. What an example adds to a sum hangs on it alone to
    the last bit, whatever state the server has sent (:mod:`lora_dp.fed.rounds.fixed_shapes`).

    Attributes:
        workspace: the model.
        seed: public: fixes Flat-LoRA's perturbations by round, client and step.
        reproducible: batches, noise and dropout follow the seed too, for research. Otherwise they are secret: rows of a
            batch have their dropout by their place in it, so that one example more changes the others' masks, which is
            nothing that the noise would hide from whoever knew the masks.
        on_turn: called before the first step of a turn with the client, its private optimizer and its loader; audits
            plant their canaries by it.
    """

    workspace: Workspace
    method: Method
    training: LocalTraining
    plan: PrivacyPlan
    seed: int
    reproducible: bool = False
    on_turn: Callable[[int, PrivateOptimizer, PrivateDataLoader], None] | None = None

    def __post_init__(self) -> None:
        whole_clients = self.plan.private and not self.plan.examples_are_protected
        self.workspace.keep_beside(lambda state: self.method.beside(state, whole_clients))

    def train(self, client: int, examples: Examples, task: Task, on_step: Callable[[], None] = lambda: None) -> Update:
        """One turn of a client.

        Args:
            client: its number.
            examples: its private data, at least one.
            task: what the server asks.
            on_step: called after each batch; what it raises comes out.

        Raises:
            ValueError: a state that does not fit the model.
            RuntimeError: the steps taken are not those that the plan accounts for.
            Exception: of any kind, what training raises in a run without privacy.
        """
        examples.prepare()
        self.workspace.load(task.state, task.rank)
        if task.sums:
            return self._release_sums(client, examples, task, on_step)
        place = (client, task.round, task.turn)
        with self._generators(derived_seed(self.seed, Stream.TRAINING, *place)):
            if self.plan.mechanism == "as-released" and as_released.replaces_training(self.method):
                as_released.train_la_lora(
                    self.workspace.model, self.training, self.plan, self.method, examples, on_step
                )
            else:
                try:
                    self._train_by_engine(examples, task, place, on_step, self._training_steps(examples, task))
                except GivenUp as given_up:
                    Failures.tell_whole(client, task.round, given_up.error)
                    self.workspace.load(task.state, task.rank)  # a change of zero
            trained = self.workspace.state(lambda name: self.method.trains(name, task.round, task.turn))
            if self.plan.mechanism == "as-released" and not as_released.replaces_training(self.method):
                trained = as_released.noised_deer_update(self.plan, self.method, trained, task)
        if self.plan.client_adds_noise:
            event = self.plan.event(len(examples))
            trained = self._noised(trained, task, event, self.plan.max_update_norm, place, Stream.NOISE)
        return Update(trained)

    def _release_sums(self, client: int, examples: Examples, task: Task, on_step: Callable[[], None]) -> Update:
        """Class sums and moments of the features, over the number of examples: one private step from zero."""
        plan, place = self.plan, (client, task.round, task.turn)
        assert plan.sums_event is not None
        with self._generators(derived_seed(self.seed, Stream.SUMS, client)), summing(self.workspace.model) as sums:
            event = plan.sums_event if plan.examples_are_protected else PoissonGaussian(0.0, 1.0)
            rows = min(self.training.batch_size, len(examples))
            try:
                self._train_by_engine(examples, task, place, on_step, LocalSteps.of_sums(event, sums, rows, examples))
            except GivenUp as given_up:
                Failures.tell_whole(client, task.round, given_up.error)
                sums.clear()
            found = {name: parameter.detach().clone() for name, parameter in sums.named_parameters()}
        if plan.client_adds_noise:
            zero = replace(task, state={name: torch.zeros_like(tensor) for name, tensor in found.items()})
            found = self._noised(found, zero, plan.sums_event, sums.sensitivity, place, Stream.SUMS_NOISE)
        return Update(found)

    def _training_steps(self, examples: Examples, task: Task) -> LocalSteps:
        training, plan = self.training, self.plan
        protected = plan.examples_are_protected
        batch_size = min(training.batch_size, len(examples))
        # A cycle of phases goes on through the rounds: with an odd number of local steps too, each factor has its turn.
        first = task.round * training.local_steps

        def make(kind: Kind, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
            turn = LocalTurn(kind, groups, self.workspace.tensors, first, training.local_steps)
            return self.method.optimizer(turn)

        return LocalSteps(
            event=plan.event(len(examples)) if protected else PoissonGaussian(0.0, batch_size / len(examples)),
            batch_size=batch_size,
            rows=batch_size,
            count=training.local_steps,
            first=first,
            bound=plan.max_grad_norm if protected else float("inf"),
            clipping=plan.step_clipping if protected else "flat",
            phases=self.method.phases(task.round, task.turn),
            low_pass=make_filter(training.low_pass, training.low_pass_strength),
            regulate_noise=self.method.regulates_noise and protected,
            optimizer=lambda model: training.make_optimizer(model, make),
            views=training.views,
        )

    def attempt(self, examples: Examples, task: Task) -> None:
        """One step of a client on all of these examples, which are public; afterwards the model is in the task's state.

        Args:
            examples: whose batch is all of them.
            task: what it starts from.

        Raises:
            Exception: of any kind, for which a turn would be given up.
        """
        training = replace(self.training, batch_size=len(examples), local_steps=1)
        place = (0, task.round, task.turn)
        self.workspace.load(task.state, task.rank)
        try:
            with self._generators(derived_seed(self.seed, Stream.TRAINING, *place)):
                trainer = replace(self, training=training, on_turn=None)
                trainer._train_by_engine(examples, task, place, lambda: None, trainer._training_steps(examples, task))
        except GivenUp as given_up:
            raise given_up.error from None
        finally:
            self.workspace.load(task.state, task.rank)

    @contextmanager
    def _generators(self, seed: int) -> Iterator[None]:
        """torch's generators inside: in a new secret state, or of this seed. Afterwards they are as they were."""
        if not self.reproducible:
            with secret_generators():
                yield
            return
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            yield

    def source(self, *place: int) -> RandomSource:
        """Fresh random bits: secret, or of this place in the run."""
        return SeededSource(derived_seed(self.seed, *place)) if self.reproducible else SecureSource()

    def _train_by_engine(
        self,
        examples: Examples,
        task: Task,
        place: tuple[int, int, int],
        on_step: Callable[[], None],
        steps: LocalSteps,
    ) -> None:
        plan, model = self.plan, self.workspace.model
        device = next(model.parameters()).device
        protected = plan.examples_are_protected
        seed = derived_seed(self.seed, Stream.SUMS_NOISE if task.sums else Stream.NOISE, *place)
        engine = PrivacyEngine(plan.accountant, reproducible_seed=seed if self.reproducible else None)
        if not task.sums:
            model.train()
        model, optimizer, batches = engine.make_private(
            model=model,
            optimizer=steps.optimizer(model),
            # Rows alone: what they hold is fetched where a failure is contained.
            data_loader=DataLoader(range(len(examples)), batch_size=steps.batch_size, collate_fn=list),  # type: ignore
            noise_multiplier=steps.event.noise_multiplier,
            max_grad_norm=steps.bound,
            clipping=steps.clipping,
            phases=steps.phases,
            low_pass=steps.low_pass,
            regulate_noise=steps.regulate_noise,
            views=steps.views.count,
        )
        optimizer.steps_taken = steps.first
        optimizer.activate()
        with _tried(optimizer.recorder, plan):
            if self.on_turn is not None:
                self.on_turn(place[0], optimizer, batches)
            failures = Failures()
            shape = OneShape(self.workspace, optimizer, examples, steps, self.training.precision, failures)
            for rows in batches.take(steps.count):
                step, planned = optimizer.steps_taken, plan.rounds * self.training.local_steps

                def backward(rows: Sequence[int], step: int = step, planned: int = planned) -> None:
                    batch = {name: tensor.to(device) for name, tensor in steps.views(examples.batch(rows)).items()}
                    # Of the step alone: how many batches before it were empty is secret.
                    perturbation = torch.Generator().manual_seed(
                        derived_seed(self.seed, Stream.PERTURBATION, *place, step)
                    )
                    with self.method.local_step(model, step, planned, perturbation):
                        optimizer.backward(steps.losses(model, batch, self.training.precision))

                if protected:
                    for part, size in shape.parts(rows):
                        accumulate(optimizer, part, backward, failures, size)
                    optimizer.release()
                else:
                    try:
                        for start in range(0, len(rows), steps.rows):
                            optimizer.signal_skip_step(start + steps.rows < len(rows))
                            backward(rows[start : start + steps.rows])
                            optimizer.step()
                    except Exception as error:
                        if not plan.private:
                            raise
                        raise GivenUp(error) from None
                optimizer.zero_grad()
                on_step()
            failures.tell(place[0], place[1])
        if protected:
            self._check_ledger(engine.ledger, steps.event, steps.count)

    def _check_ledger(self, ledger: Ledger, planned: PoissonGaussian, steps: int) -> None:
        """Raise RuntimeError unless the steps taken are those accounted for, at a rate that is not above theirs."""
        taken = ledger.entries
        if (
            len(taken) != 1
            or taken[0][1] != steps
            or not (
                taken[0][0].noise_multiplier >= planned.noise_multiplier
                and taken[0][0].sample_rate <= planned.sample_rate
            )
        ):
            raise RuntimeError("The steps that were taken are not those that the budget was planned for.")

    def _noised(
        self,
        trained: State,
        task: Task,
        event: PoissonGaussian,
        bound: float,
        place: tuple[int, int, int],
        stream: Stream,
    ) -> State:
        """start + clipped change + noise of this client's own."""
        start = task.state
        rules = {} if task.sums else regulators(self.method, start, task.round, task.turn)
        change = {
            name: rules[name].measured(tensor - start[name]) if name in rules else tensor - start[name]
            for name, tensor in trained.items()
        }
        bounded = clipped(change, bound)
        if bounded is None:
            bounded = {name: torch.zeros_like(tensor) for name, tensor in change.items()}
        mechanism = client_mechanism(bound, event.noise_multiplier, self.source(stream, *place))
        released = dict(zip(bounded, mechanism.release(list(bounded.values())), strict=True))
        return {name: _moved(start[name], released[name], rules.get(name)) for name in released}


@contextmanager
def _tried(recorder: Recorder, plan: PrivacyPlan) -> Iterator[None]:
    """Inside, batches are tried for what the unit of privacy asks for: what meets within a client that is protected as
    a whole, its clipped change bounds. Nothing is remembered of them before or afterwards: what another client's
    batches were must not decide whether this one trains."""
    recorder.sizes_fixed = plan.examples_are_protected
    recorder.per_example = plan.examples_are_protected or not plan.private
    recorder.forget_batches()
    try:
        yield
    finally:
        recorder.sizes_fixed, recorder.per_example = False, True
        recorder.forget_batches()


def _moved(start: Tensor, change: Tensor, regulator: Regulator | None) -> Tensor:
    restored = change if regulator is None else regulator.restored(change)
    return (start.double() + restored).to(start.dtype)
