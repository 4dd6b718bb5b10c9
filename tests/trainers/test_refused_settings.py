"""Settings of a Trainer that private training cannot keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening

from lora_dp import PrivacyArguments, PrivateTrainer
from tests.language_models import completions
from tests.trainers.training import N, adapted, arguments, private_trainer


@pytest.mark.parametrize(
    "training, words",
    [
        ({"max_grad_norm": 0.3}, r"give the bound of each example's as PrivacyArguments\(clip_bound=…\)"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size cannot be used in private training"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha cannot be used"),
        ({"include_num_input_tokens_seen": True}, "include_num_input_tokens_seen counts private tokens"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is for classification alone"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_break_the_guarantee_are_refused(tmp_path: Path, training: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        private_trainer(tmp_path, training=training).train()


def test_batches_of_ones_own_are_refused(tmp_path: Path) -> None:
    class Own(PrivateTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(completions(N), batch_size=2)

    with pytest.raises(TypeError, match="get_train_dataloader cannot be overridden"):
        Own(model=adapted(), args=arguments(tmp_path), privacy=PrivacyArguments(noise_multiplier=1, target_delta=1e-3))


def test_texts_in_one_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="joins all texts of a batch in one row"):
        private_trainer(tmp_path, data_collator=DataCollatorWithFlattening())


def test_no_clip_of_a_batch_may_be_said(tmp_path: Path) -> None:
    private_trainer(tmp_path, training={"max_grad_norm": 0.0, "max_steps": 1}).train()
