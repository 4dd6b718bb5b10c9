"""A target (ε, δ) that no step may overrun."""

from lora_dp.privacy.accounting.epsilon import Accountant
from lora_dp.privacy.accounting.ledger import Ledger, PrivacyBudgetExceeded
from lora_dp.privacy.accounting.planning import max_steps
from lora_dp.privacy.accounting.steps import PoissonGaussian


class Budget:
    """Raises before the step that would overrun (ε, δ); knows by counting how many steps are left.

    Args:
        ledger: of the steps that were taken.
        event: what each step to come releases.
        epsilon, delta: the most that all steps together may spend.
        accountant: by which ε is computed.
        planned: so many steps from an empty ledger are known to fit.
    """

    def __init__(
        self, ledger: Ledger, event: PoissonGaussian, epsilon: float, delta: float, accountant: Accountant, planned: int
    ):
        self.ledger, self.event, self.epsilon, self.delta, self.accountant = ledger, event, epsilon, delta, accountant
        # The noise was calibrated to ``planned`` steps from an empty ledger: they need no search.
        self._known, self._room = Ledger(), planned

    def check(self) -> None:
        """Make room for one step.

        Raises:
            PrivacyBudgetExceeded: there is none.
        """
        self.require_room()
        self._room -= 1
        self._known.append(self.event)

    def require_room(self) -> None:
        """Refuse where :meth:`check` would, and take nothing.

        Raises:
            PrivacyBudgetExceeded: there is no room for a step.
        """
        if self.ledger.entries != self._known.entries or self._room < 1:
            self._room = max_steps(self.ledger, self.event, self.epsilon, self.delta, self.accountant)
            self._known = Ledger()  # which may be ahead by a step that failed
            self._known.load_state_dict(self.ledger.state_dict())
        if self._room < 1:
            raise PrivacyBudgetExceeded(
                f"The next step would exceed ε = {self.epsilon:g} at δ = {self.delta:g} (spent so far: "
                f"{self.ledger.epsilon(self.delta, self.accountant):.4g} in {self.ledger.steps} steps): stop here, or "
                "plan more steps with a larger noise_multiplier from the start."
            )
