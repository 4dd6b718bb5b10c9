"""The loss of each example, by what a Transformers model is for."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.extras import needing
from lora_dp.isolation.trials import modes_kept
from lora_dp.losses import causal_lm_loss, classification_loss, masked_lm_loss, question_answering_loss, regression_loss

with needing("PrivateTrainer", "trainer"):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ExampleLosses = Callable[[Any, Mapping[str, Tensor]], Tensor]

_LABELS = ("labels", "start_positions", "end_positions")


def example_losses_of(model: nn.Module, label_smoothing: float = 0.0) -> ExampleLosses:
    """What computes the losses (N,) of a batch from the model's outputs and the batch's labels.

    The tokens of an example are averaged over its own labelled ones, never over those of its batch.

    Args:
        model: of Transformers, within PEFT's or alone.
        label_smoothing: of classification.

    Raises:
        ValueError: a model for another task, a balancing loss of a mixture of experts, or smoothing of another loss.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    >>> example_losses_of(model).__name__
    '_causal_lm'
    """
    within: Any = getattr(model, "get_base_model", None)
    base = model if within is None else within()
    config = getattr(base, "config", None)
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "The router's balancing loss (output_router_logits) joins the tokens of all examples, so that no gradient "
            "belongs to one: set model.config.output_router_logits = False (TRL: SFTConfig(router_aux_loss_coef=0.0))."
        )
    kind = getattr(base, "loss_type", None)
    if type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # GPT2LMHeadModel, too, has no loss type of its own; Bart's decoder is given labels that are shifted already.
        kind = "ForCausalLM" if _shifts_labels(base) else "ForMaskedLM"
    if getattr(config, "is_encoder_decoder", False) and kind != "ForSequenceClassification":
        kind = "ForMaskedLM"  # its decoder is given the labels shifted already
    found = _BY_LOSS_TYPE.get(str(kind))
    if found is None:
        raise ValueError(
            f"The losses of single examples are not known for a {type(base).__name__}: give "
            "compute_loss_func=lambda outputs, labels: …, which returns one loss for each example, shape (N,)."
        )
    if found is _classification:
        return lambda outputs, labels: _classification(outputs, labels, config, label_smoothing)
    if label_smoothing:
        raise ValueError("label_smoothing_factor is for classification alone: leave it out.")
    return found


def split_labels(inputs: Mapping[str, Any], label_names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch without its labels, and the labels: the model must not compute a loss of its own of them.

    >>> split_labels({"input_ids": 1, "labels": 2}, ["labels"])
    ({'input_ids': 1}, {'labels': 2})
    """
    names = {*label_names, *_LABELS}
    return (
        {name: value for name, value in inputs.items() if name not in names},
        {name: value for name, value in inputs.items() if name in names},
    )


@torch.no_grad()
def _shifts_labels(model: nn.Module) -> bool:
    """Whether a language model's own loss is that of the next tokens, told by a made-up text.

    Raises:
        ValueError: it is neither that nor the loss of the tokens as they stand.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[5, 3, 7, 4, 6]], device=device)
    with modes_kept(model):
        outputs: Any = model.eval()(input_ids=ids, labels=ids)
    own = float(outputs.loss)
    next_tokens, same = (float(loss(outputs.logits, ids)) for loss in (causal_lm_loss, masked_lm_loss))
    if min(abs(own - next_tokens), abs(own - same)) > 0.02 * abs(own):
        raise ValueError(
            f"The loss of a {type(model).__name__} is not that of the next tokens: give compute_loss_func=lambda "
            "outputs, labels: …, which returns one loss for each example, shape (N,)."
        )
    return abs(own - next_tokens) <= abs(own - same)


def _causal_lm(outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
    return causal_lm_loss(outputs.logits, labels["labels"])


def _tokens(outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
    return masked_lm_loss(outputs.logits, labels["labels"])


def _answers(outputs: Any, labels: Mapping[str, Tensor]) -> Tensor:
    return question_answering_loss(
        outputs.start_logits,
        outputs.end_logits,
        labels["start_positions"],
        labels["end_positions"],
        labels["attention_mask"],
    )


def _classification(outputs: Any, labels: Mapping[str, Tensor], config: Any, label_smoothing: float) -> Tensor:
    logits, given = outputs.logits, labels["labels"]
    problem = getattr(config, "problem_type", None)
    if label_smoothing and (problem not in (None, "single_label_classification") or given.is_floating_point()):
        raise ValueError("label_smoothing_factor is for one class an example: leave it out.")
    if problem == "regression" or (problem is None and logits.shape[-1] == 1):
        return regression_loss(logits.squeeze(-1) if logits.shape[-1] == 1 else logits, given.to(logits.dtype))
    if problem == "multi_label_classification" or (problem is None and given.is_floating_point()):
        return F.binary_cross_entropy_with_logits(logits.float(), given.float(), reduction="none").mean(1)
    return classification_loss(logits, given, label_smoothing=label_smoothing)


_BY_LOSS_TYPE: dict[str, Callable[..., Tensor]] = {
    "ForCausalLM": _causal_lm,
    "ForMaskedLM": _tokens,
    "ForTokenClassification": _tokens,
    "ForSequenceClassification": _classification,
    "ForImageClassification": _classification,
    "ForQuestionAnswering": _answers,
}
