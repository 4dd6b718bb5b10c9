"""TRL's SFTTrainer with private steps."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lora_dp.extras import needing
from lora_dp.trainers.private_trainer import PrivateTrainer
from lora_dp.trainers.refused_settings import check_unsupported

with needing("PrivateSFTTrainer", "trl"):
    from trl import SFTTrainer


class PrivateSFTTrainer(PrivateTrainer, SFTTrainer):
    """TRL's ``SFTTrainer`` whose steps are differentially private.

    It is to ``SFTTrainer`` what :class:`lora_dp.PrivateTrainer` is to ``Trainer``. Chat templates, prompts with
    completions, ``assistant_only_loss`` and ``peft_config`` work as they do there. The loss of a text is the mean over
    its own labelled tokens. A row holds one text.

    Args:
        model: a model, or its name.
        args: an ``SFTConfig``.
        privacy: ε or σ, δ, and the rest of :class:`lora_dp.PrivacyArguments`.
        kwargs: ``SFTTrainer``'s.

    Raises:
        ValueError: packing, or another setting that private training cannot keep, with what to do.

    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    >>> from lora_dp import PrivacyArguments
    >>> from trl import SFTConfig
    >>> words = {"<pad>": 0, "name": 1, ":": 2, "Alimentum": 3, "is": 4, "a": 5, "restaurant": 6}
    >>> splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    >>> splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> trainer = PrivateSFTTrainer(
    ...     model=GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=8, n_positions=32)),
    ...     args=SFTConfig("out", max_steps=2, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True),
    ...     train_dataset=Dataset.from_dict({"prompt": ["name : Alimentum"] * 20, "completion": [
    ...         " Alimentum is a restaurant" + " is a restaurant" * (i % 4) for i in range(20)]}),
    ...     processing_class=PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<pad>"),
    ...     peft_config=LoraConfig(task_type="CAUSAL_LM"),
    ...     privacy=PrivacyArguments(target_epsilon=8, target_delta=1e-3))
    >>> trainer.train().global_step
    {'train_runtime': ..., 'epsilon': '7...'...}
    2
    """

    unsupported: ClassVar[dict[str, str]] = {
        **PrivateTrainer.unsupported,
        "packing": "several texts would share a row, and a clip",
        "padding_free": "all texts of a batch would share a row",
    }

    def __init__(self, model: Any, args: Any = None, **kwargs: Any):
        if args is not None:
            check_unsupported(args, self.unsupported)
            if getattr(args, "loss_type", "nll") == "dft":
                raise ValueError("loss_type='dft' is not offered in private training: choose 'nll'.")
        if kwargs.get("formatting_func") is None:
            _check_columns(kwargs.get("train_dataset"), getattr(args, "dataset_text_field", "text"))
        super().__init__(model, args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As :meth:`lora_dp.PrivateTrainer.training_step`, with TRL's offloading of activations."""
        with self.maybe_activation_offload_context:
            return super().training_step(model, inputs, num_items_in_batch)


def _check_columns(data: Any, text: str) -> None:
    columns = getattr(data, "column_names", None)
    known = {text, "messages", "conversations", "completion", "input_ids", "images", "image"}
    if isinstance(columns, list) and not known & set(columns):
        raise ValueError(
            f"The training data have no texts that TRL knows, but {', '.join(columns)}: name their column by "
            "SFTConfig(dataset_text_field=…), or give prompt and completion, or messages."
        )
