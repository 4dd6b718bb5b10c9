"""What each participation releases and how much noise that takes: the two units of privacy, and none."""

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from torch import Tensor

from lora_dp.fed.methods import State
from lora_dp.fed.option_types import check_types
from lora_dp.privacy.accounting import Accountant, Ledger, PoissonGaussian, calibrate_noise_multiplier, check_promise
from lora_dp.privacy.adaptive_clipping import AdaptiveClipping
from lora_dp.privacy.clipping import ClippingName, make_clip_rule
from lora_dp.privacy.mechanism import Mechanism
from lora_dp.privacy.randomness import RandomSource

Unit = Literal["example", "client"]
NoiseBy = Literal["client", "server"]
MechanismName = Literal["sound", "as-released"]

# More examples than any client has. A node tells its number, and rates and weights follow from it.
LARGEST_SIZE = 10**8

UNITS = {
    "example": "one example of one client, added or removed",
    "client": "one client with all its examples, added or removed",
}
AS_RELEASED = "no privacy guarantee (ε = ∞): this is what the authors' released code does"


def guarantee(mechanism: MechanismName) -> str | None:
    """What must be said wherever a run's ε is shown; None where the ε speaks for itself."""
    return AS_RELEASED if mechanism == "as-released" else None


@dataclass(frozen=True)
class PrivacyPlan:
    """The privacy of a whole run; public, and the same for server and clients.

    Attributes:
        epsilon: budget at ``delta``; None without privacy.
        unit: whose presence is hidden: an example's or a client's.
        noise_by: with the client as unit, who adds the noise. The server's hides a client in the sum of all, and the
            secret draw of clients amplifies; a client's own protects it from the server too.
        max_grad_norm: bound of an example's gradient (unit example).
        max_update_norm: bound of a client's whole update (unit client).
        batch_size: expected, at most a client's number of examples.
        steps: private steps of a client in a turn.
        turns: of a round.
        rounds: planned for the run.
        participations: rounds that a client's budget is planned for.
        client_rate: probability with which a client takes part in a round.
        clients: number of clients.
        mechanism: "as-released" for what authors' code does, which guarantees nothing.
        examples: of all clients together; used for the noise of DEeR's released code alone.
        sums_share: part of the budget for one release of feature sums before the first round; 0 for none.
        clip_quantile: of the norms, which the bound follows with clipping "adaptive".

    Raises:
        ValueError: a value of another type or none of the choices, or a private run in which not one party adds noise.
    """

    epsilon: float | None
    delta: float
    accountant: Accountant
    unit: Unit
    noise_by: NoiseBy
    max_grad_norm: float
    max_update_norm: float
    clipping: ClippingName | Literal["adaptive"]
    batch_size: int
    steps: int
    turns: int
    rounds: int
    participations: int
    client_rate: float
    clients: int
    mechanism: MechanismName = "sound"
    examples: int = 0
    sums_share: float = 0.0
    clip_quantile: float = 0.5

    def __post_init__(self) -> None:
        check_types(self)
        adding = self.examples_are_protected + self.client_adds_noise + self.server_adds_noise
        if adding != self.private:  # what claims an ε is noised, once
            raise ValueError(
                f"unit {self.unit} with noise_by {self.noise_by} has {adding} parties that add noise, but a run "
                f"{'with' if self.private else 'without'} privacy has {self.private:d}: correct unit and noise_by."
            )

    def check(self, largest: int) -> None:
        """Raises ValueError where δ promises next to nothing.

        Args:
            largest: number of examples of the client that has most.
        """
        count, what = (largest, "examples at a client") if self.unit == "example" else (self.clients, "clients")
        if self.private:
            check_promise(self.delta, count, what)

    @property
    def private(self) -> bool:
        """Whether the run claims an ε."""
        return self.epsilon is not None and self.mechanism == "sound"

    @property
    def examples_are_protected(self) -> bool:
        """Whether clients train with per-example clipping and noise."""
        return self.private and self.unit == "example"

    @property
    def client_adds_noise(self) -> bool:
        """Whether a client clips and noises its whole update."""
        return self.private and self.unit == "client" and self.noise_by == "client"

    @property
    def server_adds_noise(self) -> bool:
        """Whether the server clips updates and noises their sum. The draw of clients is then secret."""
        return self.private and self.unit == "client" and self.noise_by == "server"

    @property
    def step_clipping(self) -> ClippingName | AdaptiveClipping:
        """How the engine clips each example. A bound that moves begins at ``max_grad_norm`` in each turn, since a
        client keeps nothing between turns: so it moves fast, by up to a factor of e^½ at the median.

        >>> from lora_dp.fed.config import RunConfig
        >>> from lora_dp.fed.rounds.setup import plan_of
        >>> plan_of(RunConfig.from_flat({"clipping": "adaptive", "clip_quantile": 0.7})).step_clipping
        AdaptiveClipping(quantile=0.7, rate=1.0, share=0.01)
        """
        return AdaptiveClipping(self.clip_quantile, rate=1.0) if self.clipping == "adaptive" else self.clipping

    @property
    def releases_per_turn(self) -> int:
        """Events that one turn adds to a client's ledger."""
        return 1 if self.unit == "client" and self.private else self.steps

    @property
    def releases_per_round(self) -> int:
        """Events that one round adds to a client's ledger.

        Under the server's noise it is one: the turns of a round share its draw of clients, so that what amplifies is
        their composition, not each by itself.
        """
        return 1 if self.server_adds_noise else self.turns * self.releases_per_turn

    @property
    def planned_releases(self) -> int:
        """Events that the noise is calibrated for."""
        return (self.rounds if self.server_adds_noise else self.participations) * self.releases_per_round

    def sample_rate(self, examples: int) -> float:
        """Probability of each draw that amplifies: of an example (or a little more), of a client, or 1.

        Numbers of examples are rounded down by up to 2 %, so that clients that are nearly alike share one calibration;
        the rate that is accounted is then as much above the one that is drawn with, and ε is on the safe side.
        """
        if self.server_adds_noise:
            return self.client_rate
        if self.client_adds_noise:
            return 1.0
        size = _rung(examples)
        return min(self.batch_size, size) / size

    def turn_noise_multiplier(self, examples: int) -> float:
        """Deviation over sensitivity of the noise in one turn.

        n Gaussian releases of one draw, each with n^(1/2) times the noise, are one Gaussian release (Dong, Roth and Su
        2019, arXiv 1905.02383, corollary 3.3); drawing clients first amplifies them as that one.
        """
        shared = self.turns if self.server_adds_noise else 1
        return self.event(examples).noise_multiplier * math.sqrt(shared)

    def event(self, examples: int) -> PoissonGaussian:
        """One entry in the ledger of a client with so many examples, its noise calibrated to the budget: a step, a
        client's own release, or with noise by the server all turns of a round.

        Raises:
            ValueError: no noise reaches the budget.
        """
        rate = self.sample_rate(examples)
        if not self.private:
            return PoissonGaussian(0.0, rate)
        assert self.epsilon is not None
        before = Ledger()
        if (sums := self.sums_event) is not None:
            before.append(sums)
        return PoissonGaussian(
            calibrate_noise_multiplier(
                self.epsilon, self.delta, rate, self.planned_releases, self.accountant, spent=before
            ),
            rate,
        )

    @property
    def sums_event(self) -> PoissonGaussian | None:
        """The entry that the release of feature sums is in a client's ledger; None where there is none.

        With the whole budget its noise would be σ; with a part p of it, it is σ/√p: what Gaussian releases compose to
        hangs on the sum of 1/σ².
        """
        if not self.sums_share:
            return None
        if not self.private:
            return PoissonGaussian(0.0, 1.0)
        assert self.epsilon is not None
        alone = calibrate_noise_multiplier(self.epsilon, self.delta, 1.0, 1, self.accountant)
        return PoissonGaussian(alone / math.sqrt(self.sums_share), 1.0)


def check_size(client: int, examples: object) -> None:
    """Refuse a number of examples that no client has, whoever told it.

    Raises:
        ValueError: it is no whole number from 1 to 100 million; naming the client.
    """
    whole = isinstance(examples, Integral) and not isinstance(examples, bool)
    if not (whole and 1 <= examples <= LARGEST_SIZE):  # type: ignore[operator]
        short = isinstance(examples, int | float) and abs(examples) < 10**20
        raise ValueError(
            f"client {client} announces {examples if short else 'another'} as its number of examples, which must be a "
            f"whole number from 1 to {LARGEST_SIZE}: mend its data, or leave it out."
        )


def _rung(examples: int) -> int:
    """The largest step of a ladder with steps of 2 % that is not above this number; below 50 every number is one."""
    if examples <= 50:
        return examples
    step = math.floor(math.log(examples) / math.log(1.02))
    return max(rung for k in (step - 1, step, step + 1) if (rung := math.floor(1.02**k)) <= examples)


def client_mechanism(bound: float, noise_multiplier: float, source: RandomSource) -> Mechanism:
    """The Gaussian mechanism on whole updates, each clipped to ``bound``."""
    return Mechanism(make_clip_rule("flat", bound), noise_multiplier, source)


def clipped(change: State, bound: float) -> dict[str, Tensor] | None:
    """The change of all tensors together scaled to norm ≤ ``bound``, in float64; None if it is not finite."""
    wide = {name: tensor.detach().double() for name, tensor in change.items()}
    norm = math.sqrt(sum(float(tensor.square().sum()) for tensor in wide.values()))
    if not math.isfinite(norm):
        return None
    # A margin of a few roundings, as for examples (lora_dp.privacy.clipping).
    scale = min(1.0, bound * (1 - 2.0**-40) / norm) if norm else 1.0
    return {name: tensor * scale for name, tensor in wide.items()}


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
