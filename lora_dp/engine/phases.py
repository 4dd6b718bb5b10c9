"""Which of LoRA's factors each step trains."""

from dataclasses import dataclass
from typing import Literal

Phases = Literal["B", "A", "AB", "BA"]

_CYCLES: dict[str, tuple[frozenset[str], ...]] = {
    "B": (frozenset("B"),),
    "A": (frozenset("A"),),
    "AB": (frozenset("AB"),),
    "BA": (frozenset("B"), frozenset("A")),
}


@dataclass(frozen=True)
class PhaseCycle:
    """ "B" or "A": that factor alone; "AB": both in every step; "BA": B, A, B, A, … (arXiv 2602.19926).

    Raises:
        ValueError: another name.
    """

    name: Phases

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _CYCLES:
            raise ValueError(f"Unknown phases '{self.name}': choose one of {', '.join(_CYCLES)}.")

    @property
    def all_factors(self) -> frozenset[str]:
        """The factors that some step trains."""
        return frozenset().union(*_CYCLES[self.name])

    def factors(self, step: int) -> frozenset[str]:
        """The factors, of "A" and "B", that step number ``step`` (from 0) trains."""
        cycle = _CYCLES[self.name]
        return cycle[step % len(cycle)]
