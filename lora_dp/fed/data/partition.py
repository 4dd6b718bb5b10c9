"""Splits a data set over clients: evenly, or with skewed labels."""

from typing import Literal

import numpy as np

from lora_dp.fed.data.options import DataConfig

MAX_DRAWS = 1000


def partition(
    labels: np.ndarray,
    clients: int,
    scheme: Literal["iid", "dirichlet"] = "iid",
    *,
    alpha: float = 1.0,
    seed: int = 0,
    min_examples: int = 10,
) -> list[np.ndarray]:
    """Indices of each client's examples, shuffled: every example is at exactly one client.

    "iid" deals a random permutation evenly: sizes differ by one at most. "dirichlet" shares out each class
    over the clients in proportions drawn from Dirichlet(alpha, …, alpha) (Yurochkin et al., arXiv 1905.12022;
    Li et al., arXiv 2102.02079): a small alpha skews labels and sizes, a large one tends to "iid". The whole
    partition is drawn again until every client has at least ``min_examples``.

    Args:
        labels: classes, integers (N,).
        alpha: concentration of "dirichlet", > 0; unused by "iid".
        min_examples: fewest examples of a client, at least 1.

    Raises:
        ValueError: fewer examples than clients times min_examples, alpha <= 0, unknown scheme, or no
            partition in 1,000 draws that gives every client enough.
    """
    labels = np.asarray(labels)
    if clients < 1:
        raise ValueError(f"the number of clients is {clients}; it must be at least 1")
    if min_examples < 1:
        raise ValueError(f"min_examples is {min_examples}; it must be at least 1")
    if len(labels) < clients * min_examples:
        raise ValueError(
            f"{len(labels)} examples are too few for {clients} clients of at least {min_examples}: "
            "take fewer clients or a larger data set"
        )
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        return np.array_split(rng.permutation(len(labels)), clients)
    if scheme != "dirichlet":
        raise ValueError(f'partition scheme {scheme!r} is unknown: take "iid" or "dirichlet"')
    if not alpha > 0:
        raise ValueError(f"the Dirichlet alpha is {alpha}; it must be positive")
    for _ in range(MAX_DRAWS):
        parts = _dirichlet(labels, clients, alpha, rng)
        if min(map(len, parts)) >= min_examples:
            return parts
    raise ValueError(
        f"no Dirichlet({alpha}) partition gave {clients} clients {min_examples} examples each in {MAX_DRAWS} "
        "draws: take a larger alpha or fewer clients"
    )


def _dirichlet(labels: np.ndarray, clients: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]


def hold_out(labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the part to train on and of the held-out part, stratified by label, both in order."""
    rng = np.random.default_rng(config.split_seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held_out.extend(members[: round(config.validation_fraction * len(members))])
    if not 0 < len(held_out) < len(labels):
        raise ValueError(f"{len(labels)} examples are too few to hold some out: name a validation_split")
    return np.setdiff1d(np.arange(len(labels)), held_out), np.sort(held_out)
