"""Models of texts and of patches, and passes of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp import DPLinear
from tests.models import examples, mlp
from tests.support import make_private

VOCABULARY, LONGEST = 40, 12


class Pooling(nn.Module):
    """Token ids to three classes by a mean over positions: over tokens alone, or (wrongly) over padding too."""

    def __init__(self, masked: bool, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.table = nn.Embedding(VOCABULARY, 6).requires_grad_(False)
        self.inner, self.dropout, self.head = DPLinear(6, 6), nn.Dropout(dropout), DPLinear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.dropout(self.inner(self.table(input_ids)).tanh())
        if not self.masked or attention_mask is None:
            return self.head(hidden.mean(1))
        weights = attention_mask.unsqueeze(-1)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def texts(*lengths: int, width: int | None = None, left: bool = False) -> dict[str, Tensor]:
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    if left:
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def run(model: nn.Module, *batches: dict[str, Any]) -> None:
    """Training forwards on one batch after another, as an engine sees them."""
    optimizer = make_private(model.train(), batch_size=4)
    for batch in batches:
        optimizer.zero_grad()
        optimizer.recorder.discard()
        model(**batch)


# Structures that come later


class Patches(nn.Module):
    """All images' patches in one tensor, as vision-language models have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = DPLinear(6, 6), DPLinear(6, 3)

    def forward(self, input_ids: Tensor, patches: Tensor, counts: Tensor) -> Tensor:
        parts = self.inner(patches).split(counts.prod(1).tolist())
        return self.head(torch.stack([part.mean(0) for part in parts])) + 0 * input_ids[:, :1]


# Other numbers of examples, and numbers as arguments


class Scaled(nn.Module):
    """A loss of its own, divided by a number that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, labels: Tensor, tokens: float | Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / tokens, "logits": logits}


def scaled(n: int, tokens: Any, seed: int = 1) -> dict[str, Any]:
    x, y = examples(n, seed)
    return {"x": x, "labels": y, "tokens": tokens}
