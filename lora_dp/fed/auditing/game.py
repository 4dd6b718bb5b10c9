"""What all audits of a federation share: the opened run, started afresh for each training, and the claim it makes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lora_dp.fed.config import RunConfig
from lora_dp.fed.methods import State
from lora_dp.fed.rounds.federation import Federation
from lora_dp.fed.rounds.head_start import start_head
from lora_dp.fed.rounds.ledgers import Account
from lora_dp.fed.rounds.local_training import SUM_WEIGHTS, summed_head
from lora_dp.fed.rounds.messages import Task
from lora_dp.fed.rounds.setup import Job
from lora_dp.nn.feature_sums import FeatureSums
from lora_dp.privacy.accounting import Ledger, PrivacyBudgetExceeded


@dataclass
class Game:
    """An opened run that is trained as often as an audit asks.

    Attributes:
        config, job: of the run; its batches, noise and dropout are secret, whatever the configuration says.
        client: whose examples are audited (unit example).
        on_step: called after each local step, for a progress bar.
        ledger: what the last training adds up to, by the federation's own account.
    """

    config: RunConfig
    job: Job
    client: int
    on_step: Callable[[], None] = lambda: None
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self._start = self.job.trainer.workspace.state()

    def fresh(self) -> None:
        """Puts the model back to where every training begins."""
        self.job.trainer.workspace.load(self._start)

    def train(self, federation: Federation, clients: Sequence[int]) -> None:
        """The feature sums, if planned, and all rounds of a federation; and the largest ledger of these clients."""
        if federation.plan.sums_event is not None:
            start_head(federation, self.on_step)
        while federation.rounds_done < self.config.federation.rounds:
            try:
                federation.run_round(on_step=self.on_step, evaluate=False)
            except PrivacyBudgetExceeded:
                break
        self.ledger = largest_ledger(federation.account, clients)[1]

    def claim(self, delta: float) -> float:
        """ε that the last training claims at this δ."""
        return self.ledger.epsilon(delta, self.job.trainer.plan.accountant)


def largest_ledger(account: Account, clients: Sequence[int]) -> tuple[int, Ledger]:
    """Whose of these clients' ledgers claims the largest ε, and it."""
    found: dict[tuple[float, float, int], int] = {}
    for client in clients:
        event = account.event(client)
        found.setdefault((event.noise_multiplier, event.sample_rate, account.releases(client)), client)
    ledgers = {client: account.ledger(client) for client in found.values()}
    largest = max(ledgers, key=lambda client: ledgers[client].epsilon(account.plan.delta, "rdp"))
    return largest, ledgers[largest]


def most_exposed(config: RunConfig, job: Job) -> int:
    """The client that claims the largest ε when all rounds are done; who is drawn for which round is public."""
    federation = Federation.of_job(config, job)
    if federation.plan.sums_event is not None:
        federation.account.add_sums(range(federation.clients))
    for _ in range(config.federation.rounds):
        try:
            federation.account.add_round(federation.draw())
        except PrivacyBudgetExceeded:
            break
        federation.rounds_done += 1
    return largest_ledger(federation.account, range(federation.clients))[0]


def unchanged(job: Job, task: Task) -> State:
    """What a client sends that has changed nothing, or whose feature sums are zero."""
    if task.sums:
        return dict(no_sums(job).named_parameters())
    return {
        name: task.state[name]
        for name in job.trainer.workspace.names
        if job.trainer.method.trains(name, task.round, task.turn)
    }


def no_sums(job: Job) -> FeatureSums:
    """Feature sums of no examples, frozen, of the sizes that clients release.

    Raises:
        ValueError: the model has no feature head.
    """
    return summed_head(job.trainer.workspace.whole)[1].empty_sums(SUM_WEIGHTS).requires_grad_(False)
