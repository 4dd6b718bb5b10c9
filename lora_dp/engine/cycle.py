"""Whose turn it is: the loader draws from the group that the optimizer's next step is counted for."""


class Cycle:
    """Counts the steps of one private run, from its ``make_private`` on.

    Nothing sets it back, a state that is loaded neither: correlated noise goes on from step to step.

    Args:
        groups: b, of examples, whose turns go round; 1 where each step draws from all.

    Attributes:
        step: number of the next step, from 0.

    >>> cycle = Cycle(groups=2)
    >>> cycle.begins
    True
    >>> cycle.advance()
    >>> cycle.begins
    False
    """

    def __init__(self, groups: int = 1):
        self.groups, self.step = groups, 0

    @property
    def begins(self) -> bool:
        """Whether the next step is the first of a round, which the ledger counts: an example has one turn in it."""
        return self.step % self.groups == 0

    def advance(self) -> None:
        """A step was taken."""
        self.step += 1

    def check(self, step: int) -> None:
        """Refuse a batch that was drawn for another step than the next: of a group whose turn it is not.

        Args:
            step: number of the step that it was drawn for.

        Raises:
            RuntimeError: another step has been taken beside the loader's.
        """
        if self.groups > 1 and step != self.step:
            raise RuntimeError(
                "With correlated noise each step draws from the group whose turn it is, and a step was taken beside "
                "those of this iteration: begin a new iteration of the private loader, and take no steps by hand."
            )
