"""What a Trainer offers and private training cannot keep: refused at set-up, with what to do."""

from collections.abc import Mapping
from typing import Any

from lora_dp.extras import needing

with needing("PrivateTrainer", "trainer"):
    from transformers import TrainingArguments


def check_unsupported(args: Any, unsupported: Mapping[str, str]) -> None:
    """Refuse what is switched on of the settings that ``unsupported`` names, each with why.

    Raises:
        ValueError: one is.

    >>> check_unsupported(TrainingArguments("out"), {"neftune_noise_alpha": "its noise is scaled by the batch"})
    """
    for name, why in unsupported.items():
        if getattr(args, name, None):
            raise ValueError(f"{name} cannot be used in private training, since {why}: leave it out.")


def check_refused_settings(args: Any, data_collator: Any, unsupported: Mapping[str, str]) -> None:
    """Refuse settings that would tell of a batch, or join its examples.

    Args:
        args: the Trainer's.
        data_collator: that it will use.
        unsupported: of this kind of Trainer, each with why.

    Raises:
        ValueError: one that is set.

    >>> check_refused_settings(TrainingArguments("out", max_grad_norm=0.3, use_cpu=True), None, {})
    Traceback (most recent call last):
    ValueError: max_grad_norm = 0.3 clips the gradient of a whole batch: leave it out, ...
    """
    check_unsupported(args, unsupported)
    if args.max_grad_norm not in (0, TrainingArguments.max_grad_norm):
        raise ValueError(
            f"max_grad_norm = {args.max_grad_norm:g} clips the gradient of a whole batch: leave it out, and give "
            "the bound of each example's as PrivacyArguments(clip_bound=…)."
        )
    if getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False):
        raise ValueError("include_num_input_tokens_seen counts private tokens without noise: leave it out.")
    if not args.skip_memory_metrics:
        raise ValueError("skip_memory_metrics=False tells of the largest private batch: leave it out.")
    if args.fp16:
        raise ValueError("fp16 scales the loss by what gradients hold: choose bf16=True, or float32.")
    if type(data_collator).__name__ == "DataCollatorWithFlattening":
        raise ValueError(
            "DataCollatorWithFlattening joins all texts of a batch in one row, and a clip: give a data collator that "
            "pads, such as DataCollatorForSeq2Seq(tokenizer)."
        )
    if args.n_gpu > 1 or args.world_size > 1:
        raise ValueError(
            "Private training runs in one process on one device: set CUDA_VISIBLE_DEVICES to one, and start it without "
            "torchrun."
        )


def check_not_overridden(kind: type, base: type) -> None:
    """Refuse a Trainer of a user's that overrides how batches are drawn or losses joined.

    Raises:
        TypeError: it does.

    >>> from transformers import Trainer
    >>> check_not_overridden(Trainer, Trainer)
    """
    if getattr(getattr(kind, "compute_loss", None), "__module__", "").partition(".")[0] not in ("transformers", "trl"):
        raise TypeError(
            "compute_loss gives one number for a batch, which training here does not use: override "
            "compute_example_losses(model, inputs), which returns one loss for each example, (N,)."
        )
    if getattr(kind, "get_train_dataloader", None) is not getattr(base, "get_train_dataloader", None):
        raise TypeError(
            "get_train_dataloader cannot be overridden, for ε rests on how batches are drawn: give train_dataset and "
            "data_collator."
        )
