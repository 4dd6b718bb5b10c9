"""What an audit plants in a training run: gradients in the private step (white box), or examples in the data (black).

*Gradient canaries* are the strongest examples that the guarantee covers: each has one gradient of its own choosing,
longer than the clip bound (Dirac gradients: Nasr et al. 2021, arXiv 2101.04535, and 2023, arXiv 2302.07956). They enter
beside the real examples as one more micro-batch: a :class:`lora_dp.nn.per_example.Pass` that goes through the
optimizer's own ``clip`` and ``take``, in steps drawn by the engine's own Poisson sampler, before the optimizer's own
``release``. Clipping, summing, noise and the ledger are the engine's; only the model's backward is not involved, which
example canaries test.

The auditor is the adversary that the guarantee speaks of: one who knows every other example's part of each sum, and
sees every noised gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_dp.auditing.bounds import Floats
from lora_dp.engine.data_loader import PrivateDataLoader
from lora_dp.engine.logical_batch import Clipped
from lora_dp.engine.optimizer import PrivateOptimizer
from lora_dp.nn.per_example import Pass, Slot
from lora_dp.privacy.accounting import Ledger
from lora_dp.privacy.clipping import PerLayerClipping
from lora_dp.privacy.correlated_noise import CorrelatedMechanism
from lora_dp.privacy.mechanism import total
from lora_dp.privacy.sampling import PoissonSampler

Coins = NDArray[np.bool_]
# Numbers of canary gradients formed at once.
_CHUNK = 2**24
_MOST_NUMBERS = 2**28


class Played(NamedTuple):
    """One run with canaries: scores (m,), higher where participation is likelier, and what the run claims of itself."""

    scores: Floats
    ledger: Ledger | None


class Canaries(Protocol):
    """What :func:`lora_dp.audit` needs of canaries."""

    @property
    def count(self) -> int:
        """m."""
        ...

    def play(self, train_fn: Callable[..., Any], included: Coins, generator: torch.Generator) -> Played:
        """Train once with those canaries that ``included`` (m,) names, and score them all."""
        ...


@dataclass(frozen=True)
class ExampleCanaries:
    """Black box: examples that are put into the training data or left out, and scored by their loss afterwards.

    The training function is called with the list of those to train on, beside the usual data; what it returns, usually
    the model, is handed to ``loss``. Choose examples that nothing else in the data resembles (noise, wrong labels).

    Attributes:
        examples: of any kind.
        loss: loss(trained, example), lower where the example seems to have been trained on.

    >>> mislabelled = [([0.0, 1.0], 1), ([1.0, 0.0], 0)]
    >>> canaries = ExampleCanaries(mislabelled, loss=lambda model, example: (model(example[0]) - example[1]) ** 2)
    >>> canaries.count
    2
    """

    examples: Sequence[Any]
    loss: Callable[[Any, Any], float]

    @property
    def count(self) -> int:
        return len(self.examples)

    def play(self, train_fn: Callable[..., Any], included: Coins, generator: torch.Generator) -> Played:
        trained = train_fn([example for example, coin in zip(self.examples, included, strict=True) if coin])
        return Played(np.array([-float(self.loss(trained, example)) for example in self.examples]), None)


@dataclass(frozen=True)
class GradientCanaries:
    """White box: gradients planted among the per-example gradients of a :class:`lora_dp.PrivateOptimizer`.

    The training function is called with ``plant`` and calls ``plant(optimizer, loader)`` with what ``make_private``
    returned, before training; what it returns is not used.

    Attributes:
        count: m, how many.
        norm: length of each gradient, in units of the clip bound; above 1, so that clipping is tested.
        direction: "coordinate" (each canary has one number of its own; with per-layer clipping one in every layer) or
            "random" (a random direction; canaries overlap a little, and may outnumber the parameters).

    >>> GradientCanaries(count=500)
    GradientCanaries(count=500, norm=10.0, direction='coordinate')
    """

    count: int = 1000
    norm: float = 10.0
    direction: Literal["coordinate", "random"] = "coordinate"

    def __post_init__(self) -> None:
        if self.count < 1 or not self.norm >= 1:
            raise ValueError(
                f"Gradient canaries need a count of at least 1 and a norm of at least 1 clip bound, not {self.count} "
                f"and {self.norm}."
            )
        if self.direction not in ("coordinate", "random"):
            raise ValueError(f"The direction of gradient canaries is coordinate or random, not {self.direction!r}.")

    def play(self, train_fn: Callable[..., Any], included: Coins, generator: torch.Generator) -> Played:
        planted = PlantedCanaries(self, included, generator)
        train_fn(planted.plant)
        if planted.ledger is None:
            raise RuntimeError(
                "No canary was planted: call plant(optimizer, loader) in the training function, with what make_private "
                "returned."
            )
        if planted.steps != (taken := planted.steps_taken()):
            raise RuntimeError(
                f"The canaries took part in {planted.steps} of {taken} steps, and the audit would be of these alone: "
                "call plant(optimizer, loader) right after every make_private, before the first step."
            )
        return Played(planted.scores.numpy(), planted.ledger)


class PlantedCanaries:
    """Gradient canaries in one run, and what the auditor has seen of them.

    Attributes:
        scores: (m,) float64, the log-likelihood ratio of "took part" against "did not" over the steps so far, for the
            mechanism that the optimizer claims to be: Σₜ log(1 − q + q·e^((xₜ − ½) / σ²)), x the canary's part of the
            noised sum in units of the clip bound.
        ledger: of the optimizer.
        steps: observed.

    >>> from lora_dp import DPLinear, PrivacyEngine
    >>> model = DPLinear(20, 5)
    >>> model, optimizer, loader = PrivacyEngine().make_private(
    ...     model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
    ...     data_loader=torch.utils.data.DataLoader(torch.randn(32, 20), batch_size=32),
    ...     noise_multiplier=1.0, max_grad_norm=1.0)
    >>> planted = PlantedCanaries(GradientCanaries(count=10), np.arange(10) < 5, torch.Generator())
    >>> planted.plant(optimizer, loader)
    >>> for x in loader:
    ...     optimizer.backward(model(x).square().sum(1))
    ...     optimizer.step()
    >>> planted.steps, planted.scores.shape
    (1, torch.Size([10]))
    """

    def __init__(self, canaries: GradientCanaries, included: Coins, generator: torch.Generator):
        self.canaries, self.included, self.generator = canaries, torch.from_numpy(included), generator
        self.scores = torch.zeros(canaries.count, dtype=torch.float64)
        self.ledger: Ledger | None = None
        self.steps = 0
        self._ledgers: list[tuple[Ledger, int]] = []
        self._directions: dict[tuple[str, ...], _Directions] = {}

    def plant(self, optimizer: PrivateOptimizer, loader: PrivateDataLoader) -> None:
        """Let the canaries take part in every later step of ``optimizer``, at the sample rate of ``loader``.

        Raises:
            ValueError: another optimizer with a ledger of its own has these canaries already, or nothing is clipped; or
                its noise is correlated, where a canary would have turns of its own, and rows that share their noise.
        """
        if isinstance(optimizer.mechanism, CorrelatedMechanism):
            raise ValueError("Gradient canaries take each step's noise for its own: audit without correlated_noise.")
        if math.isinf(optimizer.mechanism.rule.sensitivity):
            raise ValueError("max_grad_norm = inf clips nothing and claims nothing: there is no ε to audit.")
        if self.ledger is not None and self.ledger is not optimizer.ledger:
            raise ValueError("Canaries were planted under another ledger: audit one engine at a time.")
        self.ledger = optimizer.ledger
        if not any(known is self.ledger for known, _ in self._ledgers):
            # Steps of another time, before these optimizers, are none of the audit's.
            self._ledgers.append((self.ledger, max(0, self.ledger.steps - optimizer.steps_taken)))
        background: dict[int, Tensor] = {}
        take, release, empty = optimizer.take, optimizer.release, optimizer.step_on_empty_batch

        def take_and_note(clipped: Clipped, examples: int, kept: int) -> None:
            for key, part in clipped.sums.items():
                whole = total(part).double()
                background[key] = background[key] + whole if key in background else whole
            take(clipped, examples, kept)

        def with_canaries(step: Callable[[], None]) -> Callable[[], None]:
            def stepped() -> None:
                optimizer.activate()
                joined = PoissonSampler(self.canaries.count, loader.sample_rate, 1, loader.source).draw()
                regulators = dict(optimizer.regulators)  # those of this step: the next one has others
                directions = self._trained_directions(optimizer)
                for rows in directions.chunks([i for i in joined if self.included[i]]):
                    take(optimizer.clip(_as_pass(rows, directions, optimizer), None), 0, 0)
                known = dict(background)
                background.clear()
                bound = optimizer.mechanism.rule.sensitivity  # of this step: the next one may have another
                step()
                released = []
                for key, parameter in directions.parameters.items():
                    if parameter.grad is None:
                        raise RuntimeError(
                            "The optimizer's step left no gradient to observe: audit on the CPU, or without "
                            "reproducible_seed."
                        )
                    seen = parameter.grad.double() * optimizer.expected_batch_size
                    if (regulator := regulators.get(key)) is not None:
                        seen = regulator.measured(seen)
                    released.append((seen - known[key] if key in known else seen).flatten().cpu())
                self._observe(directions.project(torch.cat(released)) / bound, optimizer)

            return stepped

        optimizer.take = take_and_note  # type: ignore[method-assign]
        optimizer.release = with_canaries(release)  # type: ignore[method-assign]
        optimizer.step_on_empty_batch = with_canaries(empty)  # type: ignore[method-assign]

    def steps_taken(self) -> int:
        """All that the optimizers took under whose ledgers canaries were planted."""
        return sum(ledger.steps - before for ledger, before in self._ledgers)

    def _observe(self, x: Tensor, optimizer: PrivateOptimizer) -> None:
        sigma, rate = optimizer.event.noise_multiplier, torch.tensor(optimizer.event.sample_rate, dtype=torch.float64)
        # Without claimed noise there is no likelihood; the sum separates the coins as well.
        self.scores += x if sigma == 0 else torch.logaddexp(torch.log1p(-rate), rate.log() + (x - 0.5) / sigma**2)
        self.steps += 1

    def _trained_directions(self, optimizer: PrivateOptimizer) -> "_Directions":
        """Directions among the parameters that this step trains: a canary has one for each phase."""
        recorder = optimizer.recorder
        trained = {key: entry for key, entry in recorder.parameters.items() if key in recorder.trained}
        names = tuple(name for name, _ in trained.values())
        if names not in self._directions:
            by_layer = isinstance(optimizer.mechanism.rule, PerLayerClipping)
            self._directions[names] = _Directions(
                self.canaries,
                {key: parameter for key, (_, parameter) in trained.items()},
                [name.rpartition(".")[0] if by_layer else "" for name in names],
                self.generator,
            )
        return self._directions[names]


class _Directions:
    """A unit vector for each canary over some parameters, an equal share of it in every group of them."""

    def __init__(
        self,
        canaries: GradientCanaries,
        parameters: dict[int, nn.Parameter],
        groups: list[str],
        generator: torch.Generator,
    ):
        self.parameters, self.norm = parameters, canaries.norm
        sizes = [parameter.numel() for parameter in parameters.values()]
        self.size, count, names = sum(sizes), canaries.count, sorted(set(groups))
        of_group = torch.repeat_interleave(torch.tensor([names.index(group) for group in groups]), torch.tensor(sizes))
        positions = [torch.nonzero(of_group == number).flatten() for number in range(len(names))]
        self._share = len(names) ** -0.5
        self._dense: Tensor | None = None
        if canaries.direction == "random":
            if count * self.size > _MOST_NUMBERS:
                raise ValueError(
                    f"{count} random directions among {self.size} numbers do not fit into memory: use "
                    "direction='coordinate', or fewer canaries."
                )
            self._dense = torch.zeros(count, self.size)
            for places in positions:
                part = torch.randn(count, places.numel(), generator=generator)
                self._dense[:, places] = part / part.norm(dim=1, keepdim=True) * self._share
            return
        least = min(places.numel() for places in positions)
        if count > least:
            raise ValueError(
                f"{count} canaries of a coordinate each need as many numbers in every clipped part of the model, but "
                f"one has {least}: use fewer canaries or direction='random'."
            )
        # (m, groups): a coordinate in each group, no two canaries sharing one.
        self._places = torch.stack(
            [places[torch.randperm(places.numel(), generator=generator)[:count]] for places in positions], 1
        )

    def chunks(self, chosen: list[int]) -> list[Tensor]:
        """Gradients of the chosen canaries, (k, size) each, as many at once as memory should hold."""
        most = max(1, _CHUNK // self.size)
        return [self._rows(chosen[start : start + most]) for start in range(0, len(chosen), most)]

    def _rows(self, chosen: list[int]) -> Tensor:
        if self._dense is not None:
            return self._dense[chosen]
        rows = torch.zeros(len(chosen), self.size)
        return rows.scatter_(1, self._places[chosen], self._share)

    def project(self, flat: Tensor) -> Tensor:
        """Inner products of ``flat`` (size,) float64 with all directions: (m,) float64."""
        if self._dense is not None:
            return torch.cat([rows.double() @ flat for rows in self._dense.split(max(1, _CHUNK // self.size))])
        return flat[self._places].sum(1) * self._share


def _as_pass(rows: Tensor, directions: _Directions, optimizer: PrivateOptimizer) -> Pass:
    """The canaries' gradients as a finished pass of their own, left in its slots by autograd like any other."""
    k = rows.shape[0]
    length = directions.norm * optimizer.mechanism.rule.max_grad_norm
    if optimizer.loss_reduction == "mean":
        length /= k  # the private step multiplies by the size of the micro-batch
    recorder = optimizer.recorder
    slots = {}
    parts = rows.mul(length).split([parameter.numel() for parameter in directions.parameters.values()], 1)
    for (key, parameter), part in zip(directions.parameters.items(), parts, strict=True):
        slot = slots[key] = Slot(recorder.parameters[key][0], parameter, k, recorder.method)
        gradient = part.reshape(k, *parameter.shape).to(slot.leaf)
        slot.receive_whole(gradient if gradient.dim() > 1 else gradient.unsqueeze(1)).backward(gradient)
    return Pass(k, slots)
