"""Options of a run, by what they are about: the federation, privacy, local optimisation, the run itself."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lora_dp.fed.methods import get_method
from lora_dp.fed.option_types import check_types
from lora_dp.fed.server_options import Averaging, ServerOptimizerName
from lora_dp.privacy.clip_bounds import BOUNDS, LARGEST_BOUND, LEAST_BOUND


def require_that(condition: bool, message: str) -> None:
    """Raises ValueError with that message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass
class FederationConfig:
    """The federation"""

    method: str = "la-lora"
    """How clients train and the server combines: la-lora, dp-lora, ffa-lora, rolora, deer, flora, flexlora, lora-fair,
    rac-lora, galore, fedsvd, lora-xs, prism, fedask, dp-fedadamw, head-only, quiet-lora; or flat-lora:NAME, Flat-LoRA
    over another."""
    method_options: dict[str, Any] = field(default_factory=dict)
    """Options of the method itself, for example --method-options.objective cosine (lora-fair)."""
    clients: int = 5
    """Number of clients that the training data are spread over."""
    clients_per_round: int | None = None
    """Clients drawn at random for each round; by default all take part."""
    rounds: int = 20
    """Rounds of training and averaging."""
    local_steps: int = 10
    """Private optimizer steps that a client takes in a round."""
    batch_size: int = 64
    """Expected size of a Poisson-sampled batch: each of a client's n examples joins with probability batch_size / n."""
    partition: Literal["iid", "dirichlet"] = "iid"
    """How examples are spread: alike everywhere, or with label shares drawn from a Dirichlet distribution."""
    dirichlet_alpha: float = 1.0
    """Concentration of that Dirichlet distribution: the smaller, the more the clients differ."""
    weighting: Literal["examples", "equal"] | None = None
    """Clients' weights in the average: by their number of examples (which is taken to be public), or equal; by default
    examples, and equal where whole clients are protected."""
    ranks: list[int] | dict[str, float] | None = None
    """Ranks of the clients' adapters where they differ: one a client, or shares by rank as in {4: 0.75, 8: 0.25}; for
    flora, flexlora and fedask."""
    min_clients: int = 1
    """Fewest updates a round is combined from (fewer clients drawn need only as many as were drawn); with less, the run
    stops. Not with noise by the server, whose rounds go on with noise alone."""
    client_timeout: float | None = None
    """Seconds after which a client is left out of the round; no limit by default."""
    fault_norm: float = 1000.0
    """Norm above which a client's change, its own noise aside, is taken for an accident, and left out."""
    engine: Literal["local", "flower", "deployed"] = "local"
    """Where clients work: in this process, or in Flower's simulation; deployed is what flwr run makes of it."""

    def __post_init__(self) -> None:
        check_types(self)
        get_method(self.method, self.method_options)
        for name in ("clients", "rounds", "local_steps", "batch_size", "min_clients"):
            value = getattr(self, name)
            require_that(value >= 1, f"{name} must be at least 1, not {value}.")
        if self.clients_per_round is not None:
            require_that(
                1 <= self.clients_per_round <= self.clients,
                f"clients_per_round must be from 1 to the number of clients ({self.clients}), "
                f"not {self.clients_per_round}.",
            )
        require_that(
            self.min_clients <= self.clients,
            f"min_clients must not be above the number of clients ({self.clients}), but it is {self.min_clients}.",
        )
        require_that(self.dirichlet_alpha > 0, f"dirichlet_alpha must be positive, not {self.dirichlet_alpha}.")
        for name in ("client_timeout", "fault_norm"):
            value = getattr(self, name)
            require_that(value is None or value > 0, f"{name} must be positive, not {value}.")
        self._check_ranks()

    def _check_ranks(self) -> None:
        if self.ranks is None:
            return
        require_that(
            get_method(self.method, self.method_options).ranks_may_differ,
            f"{self.method} averages factors, so that all clients need one rank: leave ranks out, or take flora, "
            "flexlora or fedask.",
        )
        if isinstance(self.ranks, dict):
            require_that(
                bool(self.ranks)
                and all(str(r).isdigit() and int(r) >= 1 for r in self.ranks)
                and all(0 < share < math.inf for share in self.ranks.values()),
                f"ranks must give each rank (at least 1) a positive share, not {self.ranks}.",
            )
        else:
            require_that(
                len(self.ranks) == self.clients and min(self.ranks) >= 1,
                f"ranks must be one rank of at least 1 for each of the {self.clients} clients, not {self.ranks}.",
            )

    @property
    def largest_rank(self) -> int | None:
        """Of the ranks that were given."""
        return None if self.ranks is None else max(int(rank) for rank in self.ranks)

    def client_ranks(self, default: int, seed: int) -> list[int]:
        """The rank of each client; shares are dealt out as evenly as numbers allow, in an order that the seed fixes."""
        if self.ranks is None:
            return [default] * self.clients
        if not isinstance(self.ranks, dict):
            return list(self.ranks)
        import numpy as np  # here alone

        ranks = [int(rank) for rank in self.ranks]
        ends = np.cumsum(list(self.ranks.values())) / sum(self.ranks.values())
        places = (np.arange(self.clients) + 0.5) / self.clients
        dealt = np.asarray(ranks)[np.minimum(np.searchsorted(ends, places), len(ranks) - 1)]
        return [int(rank) for rank in np.random.default_rng(seed).permutation(dealt)]

    @property
    def client_rate(self) -> float:
        """Share of the clients that a round draws."""
        return (self.clients_per_round or self.clients) / self.clients

    @property
    def participations(self) -> int:
        """Rounds that each client budgets for: its even share of all places, rounded up."""
        return math.ceil(self.rounds * (self.clients_per_round or self.clients) / self.clients)


@dataclass
class PrivacyConfig:
    """Privacy"""

    epsilon: float | Literal["none", "inf"] | None = 8.0
    """Budget of every client for the whole run; none switches privacy off."""
    delta: float = 1e-5
    """Probability with which that guarantee may fail; well below 1 / (examples of a client), or 1 / clients."""
    unit: Literal["example", "client"] = "example"
    """What may be added or removed without notice: one example of a client, or a client with all its examples."""
    noise_by: Literal["server", "client"] = "server"
    """With the client as unit: the server is trusted with the updates, and adds noise to their sum; or each client adds
    its own."""
    max_grad_norm: float = 1.0
    """Largest norm of one example's gradient after clipping (unit example)."""
    max_update_norm: float = 1.0
    """Largest norm of a client's whole update after clipping (unit client)."""
    clipping: Literal["automatic", "flat", "per_layer", "adaptive"] = "automatic"
    """automatic: normalise every example's gradient; flat: shrink the long ones; per_layer: shrink layer by layer;
    adaptive: as flat, at a bound that follows a quantile of the norms from max_grad_norm on, anew in each turn."""
    clip_quantile: float = 0.5
    """With clipping adaptive: the part of a client's examples that should lie within the bound."""
    sums_share: float = 0.0
    """Part of the budget for one release of class sums and moments of the features before the first round, which start
    and scale the head; 0 for none, 0.1 is usual. With features fitting, for a new head alone."""
    accountant: Literal["pld", "rdp"] = "pld"
    """How steps are composed: privacy loss distributions (tight), or Rényi (faster)."""
    mechanism: Literal["sound", "as-released"] = "sound"
    """as-released does what the authors' code of la-lora or deer does, which guarantees nothing (ε = ∞)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.epsilon in ("none", "inf", math.inf):
            self.epsilon = None
        if self.epsilon is not None:
            require_that(float(self.epsilon) > 0, f"epsilon must be positive (or none), not {self.epsilon}.")
        require_that(0 < self.delta < 1, f"delta must lie between 0 and 1, not {self.delta}: try 1e-5.")
        for name in ("max_grad_norm", "max_update_norm"):
            bound = getattr(self, name)
            require_that(0 < bound < math.inf, f"{name} must be positive and finite, not {bound}.")
            require_that(
                LEAST_BOUND <= bound <= LARGEST_BOUND,
                f"{name} must lie within {BOUNDS}, not {bound}: 1.0 is a usual start.",
            )
        require_that(
            0 <= self.sums_share < 1, f"sums_share must be from 0 to below 1, not {self.sums_share}: 0.1 is usual."
        )
        require_that(
            not (self.sums_share and self.mechanism == "as-released"),
            "sums_share has no meaning with mechanism as-released, whose noise is not accounted: leave it out.",
        )
        by_client = {"noise_by": "server", "max_update_norm": 1.0}
        by_example = {"max_grad_norm": 1.0, "clipping": "automatic", "clip_quantile": 0.5}
        require_that(
            0 < self.clip_quantile < 1, f"clip_quantile must lie between 0 and 1, not {self.clip_quantile}: try 0.5."
        )
        if self.mechanism == "as-released":  # DEeR's bounds whole updates, LA-LoRA's reads its bound off the data
            idle, where = {**by_example, "noise_by": "server"}, "mechanism as-released"
        else:
            idle, where = (by_client if self.unit == "example" else by_example), f"unit {self.unit}"
        for name, usual in idle.items():
            require_that(getattr(self, name) == usual, f"{name} has no effect with {where}: leave it out.")
        require_that(
            self.clipping == "adaptive" or self.clip_quantile == 0.5,
            f"clip_quantile has no effect with clipping {self.clipping}: choose adaptive.",
        )
        require_that(
            self.mechanism == "sound" or self.epsilon is not None,
            "mechanism as-released needs the epsilon that its noise is set for: leave epsilon none out.",
        )
        require_that(
            self.mechanism == "sound" or self.unit == "example",
            "mechanism as-released has no unit of privacy, since it guarantees none: leave unit out.",
        )

    @property
    def target(self) -> float | None:
        """The budget, or None without privacy."""
        return None if self.epsilon is None else float(self.epsilon)

    @property
    def kept(self) -> float | None:
        """The budget that the run keeps; None where it guarantees nothing."""
        return self.target if self.mechanism == "sound" else None


@dataclass
class OptimizationConfig:
    """Local optimisation"""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """A client's optimizer; its state starts anew in every round. dp-fedadamw has its own."""
    lr: float | None = None
    """Learning rate of A and the head; by default sgd's was tuned for method and epsilon, adamw's is 0.001."""
    lr_ratio: float | None = None
    """Learning rate of B as a multiple of A's; by default 2 for la-lora, else 1."""
    low_pass: Literal["none", "gaussian", "laplacian"] | None = None
    """Low-pass filter of the noisy adapter gradients, which costs no privacy; by default the method's own."""
    low_pass_strength: float | None = None
    """Strength of that filter; 0 is no filter."""
    balanced: bool = False
    """With sums_share: judge as if classes were equally common, by the class shares that were released."""
    warm_start: bool = False
    """With sums_share: begin with the head of the nearest class mean."""
    views: int = 1
    """Randomly shifted copies of each image in a step, whose gradients are averaged before they are clipped."""
    mirror: bool = False
    """With views: mirror each copy, left for right, by chance; not for digits or letters."""
    server_optimizer: ServerOptimizerName = "average"
    """The server's step from the mean of a round: average takes it as it is, momentum adds 0.9 of the last step, adam
    scales each number, with the known variance of the noise taken out."""
    server_lr: float | None = None
    """Learning rate of that step; by default 1, for adam 0.03."""
    averaging: Averaging = "none"
    """The global model is the average of all rounds of the second half (tail) or of those so far, later ones more
    (ema): noise averages out."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("lr", "lr_ratio", "server_lr"):
            value = getattr(self, name)
            require_that(value is None or value > 0, f"{name} must be positive, not {value}.")
        for name in ("lr", "lr_ratio", "server_lr", "low_pass_strength"):
            require_that(getattr(self, name) != math.inf, f"{name} must be finite, not inf.")
        require_that(self.views >= 1, f"views must be at least 1, not {self.views}.")
        require_that(
            self.views > 1 or not self.mirror, "mirror has no effect without views: set views, for example to 4."
        )
        strength = self.low_pass_strength
        require_that(strength is None or strength >= 0, f"low_pass_strength must not be negative, not {strength}.")
        require_that(
            not (strength and self.low_pass == "none"),
            "low_pass_strength has no effect with low_pass none: choose gaussian or laplacian.",
        )


@dataclass
class RunOptions:
    """The run"""

    seed: int = 0
    """Fixes initialisation, partition and which clients are drawn; batches and noise stay secret and unpredictable."""
    reproducible: bool = False
    """Let batches and noise follow the seed too: for research only, such a run must not be released."""
    evaluate_every: int = 1
    """Rounds from one evaluation on the validation data to the next; the last round is always evaluated."""
    generate: int = 50
    """For causal-lm: so many validation prompts are gone on from, before and after training, and the texts judged by
    BLEU and ROUGE-L; 0 for none."""
    checkpoint_every: int = 1
    """Rounds from one checkpoint to the next, from which resume goes on."""
    output: Path | None = None
    """Folder for the results; by default runs/<time>-<method>-<epsilon>."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, …"""

    def __post_init__(self) -> None:
        check_types(self)
        if self.output is not None:
            self.output = Path(self.output)
        require_that(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, not {self.seed}.")
        require_that(self.generate >= 0, f"generate must not be negative, not {self.generate}: 0 is for none.")
        for name in ("evaluate_every", "checkpoint_every"):
            require_that(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
