"""A tiny run of PrivateTrainer, as the tests of this folder share it."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from lora_dp import PrivacyArguments, PrivateTrainer
from tests.language_models import adapted_causal_lm, completions

N = 16
# Of a run that keeps checkpoints.
SAVED = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A PeftModel of a tiny language model; B is not zero, so that both factors move."""
    return adapted_causal_lm(family, dtype, **options)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Of six steps of 4 of 16 examples, in parts of 2, quiet and on a CPU."""
    chosen = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    return TrainingArguments(str(folder), **chosen)


def private_trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> PrivateTrainer:
    """Options of PrivacyArguments under ``privacy``, of TrainingArguments under ``training``, else of the Trainer."""
    privacy = {"noise_multiplier": 1.0, "target_delta": 1e-3, **options.pop("privacy", {})}
    if "target_epsilon" in privacy:
        del privacy["noise_multiplier"]
    return PrivateTrainer(
        model=adapted() if model is None else model,
        args=arguments(folder, **options.pop("training", {})),
        privacy=PrivacyArguments(**privacy),
        train_dataset=options.pop("train_dataset", completions(N)),
        **options,
    )


class Crash(TrainerCallback):
    """Stops a run after some steps, as an interrupt would."""

    def __init__(self, after: int):
        self._after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._after:
            raise KeyboardInterrupt


def hub_of_folders(monkeypatch: pytest.MonkeyPatch, pushed: Path) -> Path:
    """A hub that is a folder: what would be uploaded is copied there."""

    class Hub:
        def create_repo(self, name: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> None:
            shutil.copytree(folder_path, pushed, ignore=shutil.ignore_patterns(*ignore_patterns))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    return pushed


def of_trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
