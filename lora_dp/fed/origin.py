"""What tells one run from another: its options, and which examples are where."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from lora_dp.fed.config import RunConfig
from lora_dp.fed.data.content_digest import add_values
from lora_dp.fed.data.examples import Examples

# The server's own business: no release of a client hangs on them, nor does which examples it has.
SERVERS_OWN = frozenset(
    (
        "weighting",
        "balanced",
        "warm_start",
        "server_optimizer",
        "server_lr",
        "averaging",
        "min_clients",
        "client_timeout",
        "fault_norm",
        "evaluate_every",
        "generate",
        "checkpoint_every",
        "output",
        "device",
    )
)


@dataclass(frozen=True)
class Origin:
    """Where the releases of a run come from.

    Attributes:
        options: all that its configuration says but what is the server's own; public, and ready for JSON.
        examples: :func:`examples_digest` of its data; a function of private data, and so as private as they are.
    """

    options: dict[str, Any]
    examples: str


def flat(config: RunConfig) -> dict[str, Any]:
    """All options of a run by their names on the command line."""
    options: dict[str, Any] = {}
    for group in fields(config):
        chosen = getattr(config, group.name)
        options |= {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    options["model"] = options.pop("name")
    return options


def plain_options(config: RunConfig, without: Iterable[str] = SERVERS_OWN) -> dict[str, Any]:
    """All options of a run but those, ready for JSON: the same values in other words are alike."""
    left_out = frozenset(without)
    return {name: _plain(value) for name, value in flat(config).items() if name not in left_out}


def examples_digest(train: Examples, parts: Sequence[np.ndarray | range], validation: Examples) -> str:
    """SHA-256 of all examples as a model is given them, and of whose they are: 64 hexadecimal digits.

    Args:
        train: all private examples.
        parts: indices of each client's; a range where only their number is known.
        validation: those to evaluate on.
    """
    digest = hashlib.sha256()
    for role, examples in (("train", train), ("validation", validation)):
        for name, tensor in examples.content().items():
            add_values(digest, f"{role} {name}", tensor.numpy())
    for part in parts:
        add_values(digest, "part", np.asarray(part))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON has it, equal ones alike: 1.0 is 1, and every name a text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    return value if value is None or isinstance(value, bool | int | str) else str(value)
