"""Models as hubs hold them, in bfloat16, trained on texts of all lengths."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.language_models import IGNORED, completions
from tests.trainers.training import N, adapted, private_trainer


def padded_to_the_longest(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.stack(
            [pad(row[name], (0, width - len(row[name])), value=IGNORED if name == "labels" else 0) for row in rows]
        )
        for name in rows[0]
    }


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_text_is_found_to_move_another_one_by_rounding(tmp_path: Path, family: str) -> None:
    model = adapted(family)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    texts = [{name: values[row["attention_mask"].bool()] for name, values in row.items()} for row in completions(N)]
    for number, text in enumerate(texts):  # no two words in a row are one, as padding would be
        text["input_ids"] = 3 + (number + torch.arange(len(text["input_ids"]))) % 30
    trainer = private_trainer(
        tmp_path, model, train_dataset=texts, data_collator=padded_to_the_longest, training={"max_steps": 12}
    )
    trainer.train()
    assert trainer.engine.ledger.steps == 12
