"""The federation: clients fine-tune adapters in private, a server combines what they release.

Clients hold real examples and train adapters on a shared frozen backbone, each under an (ε, δ) of its own. On the
command line it is ``lora-dp``, or ``python -m lora_dp.fed``; in Python:

    from lora_dp.fed import RunConfig, run
    outcome = run(RunConfig.from_flat({"method": "ffa-lora", "epsilon": 3}))
"""

from typing import Any

import lazy_loader

from lora_dp.extras import needing

# The names and their homes are in __init__.pyi; each is imported when it is first asked for.
_imported, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    with needing("lora_dp.fed", "fed"):
        return _imported(name)
