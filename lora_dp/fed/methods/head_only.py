"""The head alone, on frozen features: the private linear probe, which every method with adapters must beat."""

from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

from lora_dp.fed.methods.base import Method, Phases


class HeadOnly(Method):
    """Clients train the head alone; the server averages it, which is exact. The model has no adapters."""

    name = "head-only"
    learning_rates: ClassVar = {1: 0.1, 3: 0.3, 8: 0.5, inf: 0.3}
    # Noise is averaged before it is used: over examples, clients and rounds.
    recipe: ClassVar[Mapping[str, Any]] = {
        "features": "fitting",
        "feature_blocks": [-3, -2, -1],
        "sums_share": 0.15,
        "balanced": True,
        "rounds": 60,
        "local_steps": 1,
        "batch_size": 1000,
        "clipping": "flat",
        "max_grad_norm": 0.3,
        "server_optimizer": "momentum",
        "averaging": "tail",
    }
    recipe_rates: ClassVar = {1: 2.0, 3: 4.0, 8: 6.0, inf: 6.0}
    has_adapters = False

    def phases(self, round_index: int, turn: int = 0) -> Phases:
        return "AB"
