"""Options of the command advise."""

from dataclasses import dataclass


@dataclass
class AdviseConfig:
    """What you have"""

    examples: int = 1000
    """Private examples of each client."""
    clients: int = 5
    """Number of clients; 1 where all data are in one place."""
    epsilon: float = 8.0
    """Budget of every client."""
    delta: float = 1e-5
    """Probability with which that guarantee may fail."""
    classes: int = 2
    """Number of classes."""
    model: str = "default"
    """"default" (the embedded vision transformer), a timm name, a Transformers hub name or folder."""
    feature_blocks: int = 3
    """After how many blocks features are taken, as with --feature-blocks [-3,-2,-1]."""
