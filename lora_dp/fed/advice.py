"""What accuracy private training may reach on so much data, judged by what this project has measured."""

import math
from dataclasses import dataclass

from lora_dp.argument_checks import check_count
from lora_dp.fed.advise_options import AdviseConfig
from lora_dp.fed.models.width import width_of
from lora_dp.privacy.accounting.planning import calibrate_noise_multiplier


@dataclass(frozen=True)
class Measured:
    """What a head reached in runs of this project, its mean over their seeds.

    Attributes:
        data: name of the data, and of the model.
        examples: of each client, on average.
        clients: number of clients.
        numbers: that were trained, d·K + K.
        epsilon: of every client, at δ = 1e-5.
        start: accuracy of the majority class, in percent.
        accuracy: with privacy, in percent.
        without: the same training without privacy.
    """

    data: str
    examples: int
    clients: int
    numbers: int
    epsilon: float
    start: float
    accuracy: float
    without: float

    @property
    def noise(self) -> float:
        """As :func:`relative_noise`.

        >>> round(MEASURED[0].noise, 2)
        0.04
        """
        return relative_noise(self.examples, self.clients, self.numbers, self.epsilon, 1e-5)

    @property
    def kept(self) -> float:
        """Part that is left of what training gains without privacy.

        >>> Measured("", 1, 1, 1, 1.0, start=50, accuracy=80, without=90).kept
        0.75
        """
        return (self.accuracy - self.start) / (self.without - self.start)


# docs/how-to/choosing.md has them as a table, and says how they were made.
MEASURED = (
    Measured("PneumoniaMNIST, embedded model", 970, 4, 386, 1.0, 74.2, 91.1, 94.9),
    Measured("PneumoniaMNIST, embedded model", 970, 4, 386, 8.0, 74.2, 94.2, 94.9),
    *(
        Measured("digits, embedded model with a new head", 287, 5, 1930, epsilon, 10.0, accuracy, 99.2)
        for epsilon, accuracy in ((8.0, 97.4), (3.0, 96.6), (1.0, 89.5), (0.3, 55.0), (0.1, 16.4))
    ),
    *(
        Measured("digits, embedded model with a new head", 72, 20, 1930, epsilon, 10.0, accuracy, 99.2)
        for epsilon, accuracy in ((8.0, 95.2), (3.0, 90.2))
    ),
)


@dataclass(frozen=True)
class Advice:
    """What to expect.

    Attributes:
        noise: as :func:`relative_noise`.
        kept: part of the gain without privacy that is likely to be left; None where nothing like it was measured.
        nearest: what was measured at the nearest noise, from the least on.
        examples_needed: of each client, for which nine tenths are likely to be left.
    """

    noise: float
    kept: float | None
    nearest: tuple[Measured, ...]
    examples_needed: int


def relative_noise(examples: int, clients: int, numbers: int, epsilon: float, delta: float) -> float:
    """Length of the noise in one release of a mean over all examples, in units of the clip bound.

    √p·σ/(n√K): σ is the noise multiplier of a single release at this budget. T steps on all examples share the budget,
    so that each has √T times the noise: the sum of them has as much signal over noise as one.

    Args:
        examples: n, of each client.
        clients: K.
        numbers: p, trained.
        epsilon, delta: budget of each client.

    Raises:
        ValueError: a count below 1, or a budget that no noise reaches.
        TypeError: what is no number, or no whole one.

    >>> round(relative_noise(examples=1000, clients=4, numbers=100, epsilon=1.0, delta=1e-5), 4)
    0.0187
    """
    for name, value in (("examples", examples), ("clients", clients), ("numbers", numbers)):
        check_count(name, value)
    sigma = calibrate_noise_multiplier(epsilon, delta, 1.0, 1)
    return math.sqrt(numbers) * sigma / (examples * math.sqrt(clients))


def advise(examples: int, clients: int, numbers: int, epsilon: float, delta: float = 1e-5) -> Advice:
    """What to expect of a private head on frozen features.

    Between measured points it interpolates over the logarithm of the noise. Below the least noise that was measured it
    takes that point's; above the largest it expects nothing.

    Args:
        examples, clients, numbers, epsilon, delta: as :func:`relative_noise`.

    Raises:
        ValueError, TypeError: as there.

    >>> advice = advise(examples=1000, clients=4, numbers=386, epsilon=1.0)
    >>> 0.5 < advice.kept <= 1
    True
    """
    noise = relative_noise(examples, clients, numbers, epsilon, delta)
    points = sorted(MEASURED, key=lambda point: point.noise)
    nearest = sorted(points, key=lambda point: abs(math.log(point.noise / noise)))[:3]
    enough = max((point.noise for point in points if point.kept >= 0.9), default=points[0].noise)
    needed = math.ceil(examples * noise / enough)
    return Advice(noise, _interpolated(points, noise), tuple(sorted(nearest, key=lambda p: p.noise)), needed)


def _interpolated(points: list[Measured], noise: float) -> float | None:
    if noise > points[-1].noise:
        return None
    if noise <= points[0].noise:
        return points[0].kept
    above = next(place for place, point in enumerate(points) if point.noise >= noise)
    low, high = points[above - 1], points[above]
    if low.noise == high.noise:
        return (low.kept + high.kept) / 2
    share = math.log(noise / low.noise) / math.log(high.noise / low.noise)
    return low.kept + share * (high.kept - low.kept)


def command(examples: int, clients: int, epsilon: float, model: str) -> str:
    """The command to begin with.

    >>> command(1000, clients=4, epsilon=1.0, model="default")
    'lora-dp --method head-only --clients 4 --epsilon 1 --batch-size 1000'
    """
    named = "" if model == AdviseConfig.model else f" --model {model}"
    return f"lora-dp --method head-only{named} --clients {clients} --epsilon {epsilon:g} --batch-size {examples}"


def in_words(chosen: AdviseConfig) -> str:
    """Advice as the command prints it.

    >>> print(in_words(AdviseConfig(examples=20, clients=1, epsilon=0.5, classes=10)))  # doctest: +ELLIPSIS
    A head of 1930 numbers on default, 20 examples at each of 1 client, ε = 0.5 at δ = 1e-05:
    ...
    """
    numbers = chosen.classes * (width_of(chosen.model) * chosen.feature_blocks + 1)
    given = (chosen.examples, chosen.clients, numbers, chosen.epsilon, chosen.delta)
    advice = advise(*given)
    place = f"{chosen.clients} client{'s' if chosen.clients > 1 else ''}"
    lines = [
        f"A head of {numbers} numbers on {chosen.model}, {chosen.examples} examples at each of {place}, "
        f"ε = {chosen.epsilon:g} at δ = {chosen.delta:g}:",
        f"noise of {advice.noise:.3f} in all that is released, where one example weighs at most 1.",
        "",
        "Measured nearest to that:",
    ]
    lines += [
        f"  {point.noise:.3f}  {point.data}, ε = {point.epsilon:g}: {point.accuracy:.1f} %, without privacy "
        f"{point.without:.1f} %, majority class {point.start:.1f} %"
        for point in advice.nearest
    ]
    lines.append("")
    if advice.kept is None:
        lines.append("That is more noise than anything learnt under here: expect nothing.")
    else:
        lines.append(f"Expect about {100 * advice.kept:.0f} % of what the same training gains without privacy.")
    if advice.kept is None or advice.kept < 0.9:
        lines.append(
            f"Nine tenths would take {advice.examples_needed} examples a client, a larger ε, or fewer classes."
        )
        if chosen.model != AdviseConfig.model:
            lines.append(
                "If it takes texts, let it begin with texts about the classes, which cost no ε: --class-texts."
            )
    lines.append(f"Begin with: {command(chosen.examples, chosen.clients, chosen.epsilon, chosen.model)}")
    return "\n".join(lines)
