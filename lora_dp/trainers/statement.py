"""What a saved model says of its privacy: a section of its card, and the same in ``privacy.json``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dp.atomic_files import write_atomically

STATEMENT = "privacy.json"
_TITLE = "## Differential privacy"
_END = "<!-- end of the privacy statement -->"


def privacy_statement(
    *, ledger: Mapping[str, Any], epsilon: float, delta: float, accountant: str, settings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The guarantee of a run, and what it rests on, as plain numbers and sentences.

    Args:
        ledger: its state.
        epsilon: spent at ``delta``.
        delta: δ.
        accountant: by which ε was computed.
        settings: of each part of the run, as :meth:`~lora_dp.PrivacyArguments.as_dict` gives them.

    >>> from lora_dp import Ledger, PrivacyArguments
    >>> settings = [PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5).as_dict()]
    >>> statement = privacy_statement(
    ...     ledger=Ledger().state_dict(), epsilon=0.0, delta=1e-5, accountant="pld", settings=settings)
    >>> statement["unit"]
    'one training example, added or removed'
    """
    caveats = []
    if not math.isfinite(epsilon):
        caveats.append("There were steps without noise: nothing is promised.")
    if any(part["reproducible_seed"] is not None for part in settings):
        caveats.append("Sampling and noise followed a seed: who guesses it is not kept from anything.")
    if any(part["log_private_loss"] for part in settings):
        caveats.append("Losses of training batches were logged, which ε does not cover.")
    clipped = ", then ".join(dict.fromkeys(f"{part['clipping']} at C = {part['clip_bound']:g}" for part in settings))
    return {
        "unit": "one training example, added or removed",
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": delta,
        "mechanism": f"DP-SGD: gradients of single examples clipped ({clipped}), Gaussian noise",
        "sampling": "Poisson, each example on its own in each step",
        "steps": [
            {name: entry[name] for name in ("count", "noise_multiplier", "sample_rate")} for entry in ledger["entries"]
        ],
        "accountant": accountant,
        "public": "the model as it was at the start (what training on the same data spent before adds to ε), all "
        "settings, the number of training examples, and the evaluation data",
        "caveats": caveats,
        "ledger_digest": ledger["digest"],
    }


def write_statement(folder: Path, statement: Mapping[str, Any]) -> None:
    """Write ``privacy.json``, and the section of README.md in place of an earlier one.

    >>> from lora_dp import Ledger, PrivacyArguments
    >>> settings = [PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5).as_dict()]
    >>> write_statement(Path("."), privacy_statement(
    ...     ledger=Ledger().state_dict(), epsilon=0.0, delta=1e-5, accountant="pld", settings=settings))
    >>> Path("README.md").read_text().splitlines()[0]
    '## Differential privacy'
    """
    write_atomically(folder / STATEMENT, json.dumps(statement, indent=1, ensure_ascii=False) + "\n")
    card = folder / "README.md"
    before, _, rest = (card.read_text(encoding="utf-8") if card.exists() else "").partition(_TITLE)
    after = rest.partition(_END)[2] if rest else ""
    body = before.rstrip() + "\n\n" if before.strip() else ""
    write_atomically(card, body + _section(statement) + after.rstrip() + "\n")


def _section(statement: Mapping[str, Any]) -> str:
    steps = "; ".join(
        f"{entry['count']} at σ = {entry['noise_multiplier']:.4g} and rate {entry['sample_rate']:.4g}"
        for entry in statement["steps"]
    )
    spent = "∞" if statement["epsilon"] is None else f"{statement['epsilon']:.4g}"
    rows = {
        "Unit": statement["unit"],
        "Mechanism": statement["mechanism"],
        "Sampling": statement["sampling"],
        "Steps": steps or "none",
        "Accountant": statement["accountant"],
        "Public": statement["public"],
        "Digest of the ledger": f"`{statement['ledger_digest']}`",
    }
    lines = [
        _TITLE,
        "",
        f"Trained with (ε, δ)-differential privacy: **ε = {spent} at δ = {statement['delta']:g}**.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        *(f"\n{caveat}" for caveat in statement["caveats"]),
        "",
        _END,
    ]
    return "\n".join(lines)
