"""Losses of single examples: model outputs in, one number for each example out, (N,).

A private step clips each example's gradient by itself, so it needs each example's loss by itself. Hand the vector to
:meth:`lora_dp.PrivateOptimizer.backward`, which joins the examples: nothing here divides by what a batch holds.

    losses = classification_loss(model(x), y)
    optimizer.backward(losses)
    optimizer.step()

Every loss is computed in float32 (float64 for float64 outputs). Labels of −100 are passed over, as in torch and
Transformers; an example in which nothing is labelled has the loss 0. What is no tensor, or of another kind of numbers
than its docstring says, raises TypeError.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.argument_checks import check_number, check_tensors
from lora_dp.ops.registry import wide_dtype

IGNORED = -100
TokenReduction = Literal["mean", "sum"]


def classification_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each example.

    Args:
        logits: (N, K), any floating dtype.
        labels: (N,) int64 classes, or −100; or (N, K) probabilities.
        label_smoothing: in [0, 1), as torch's.

    Returns:
        (N,), float32 or float64.

    Raises:
        ValueError: shapes that do not belong together, or a label_smoothing out of range.

    >>> classification_loss(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
    tensor([0.6931, 0.6931, 0.0000])
    """
    check_tensors("classification_loss", logits=logits, labels=labels)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}: 0 switches it off.")
    if logits.dim() != 2 or labels.shape not in (logits.shape[:1], logits.shape):
        raise ValueError(
            f"classification_loss takes logits (N, K) with labels (N,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}: for labels of tokens use masked_lm_loss."
        )
    _check_floating("logits", logits)
    if labels.dim() == 2:
        _check_floating("labels (N, K), which are probabilities,", labels)
    else:
        _check_whole("labels", labels)
    return F.cross_entropy(
        _wide(logits), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )


def masked_lm_loss(logits: Tensor, labels: Tensor, *, reduction: TokenReduction = "mean") -> Tensor:
    """Cross entropy over each example's own labelled tokens: masked language models, token classification.

    Args:
        logits: (N, T, V), any floating dtype.
        labels: (N, T) int64, −100 where a token counts for nothing.
        reduction: "mean" over the example's own labelled tokens, or their "sum".

    Returns:
        (N,), float32 or float64.

    Raises:
        ValueError: shapes that do not belong together, or another reduction.

    >>> masked_lm_loss(torch.zeros(2, 3, 2), torch.tensor([[0, 1, 1], [1, -100, -100]]))
    tensor([0.6931, 0.6931])
    """
    check_tensors("masked_lm_loss", logits=logits, labels=labels)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"Token losses take logits (N, T, V) and labels (N, T), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Unknown reduction '{reduction}': choose 'mean' or 'sum' over an example's own tokens.")
    _check_floating("logits", logits)
    _check_whole("labels", labels)
    losses = F.cross_entropy(_wide(logits).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none").sum(1)
    if reduction == "sum":
        return losses
    # Its own tokens alone: the count of the batch would tie every example to the lengths of the others.
    return losses / (labels != IGNORED).sum(1).clamp(min=1)


def causal_lm_loss(logits: Tensor, labels: Tensor, *, reduction: TokenReduction = "mean") -> Tensor:
    """Next-token cross entropy of each example; labels are the input's tokens, shifted in here as Transformers does.

    Args:
        logits: (N, T, V), any floating dtype.
        labels: (N, T) int64, −100 for padding and prompts.
        reduction: "mean" over the example's own labelled tokens, or their "sum".

    Returns:
        (N,), float32 or float64.

    Raises:
        ValueError: shapes that do not belong together, or another reduction.

    >>> causal_lm_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), reduction="sum")
    tensor([1.3863])
    """
    check_tensors("causal_lm_loss", logits=logits, labels=labels)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"Token losses take logits (N, T, V) and labels (N, T), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    return masked_lm_loss(logits[:, :-1], labels[:, 1:], reduction=reduction)


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each example, the mean over its own outputs.

    Args:
        predictions: (N,) or (N, D, …), any floating dtype.
        targets: the same shape.

    Returns:
        (N,), float32 or float64.

    Raises:
        ValueError: the shapes differ, which would be broadcast across examples.

    >>> regression_loss(torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
    tensor([1., 2.])
    """
    check_tensors("regression_loss", predictions=predictions, targets=targets)
    if predictions.shape != targets.shape or predictions.dim() == 0:
        raise ValueError(
            f"regression_loss takes predictions and targets of one shape (N, …), got {tuple(predictions.shape)} and "
            f"{tuple(targets.shape)}: squeeze or reshape one of them."
        )
    _check_floating("predictions", predictions)
    if targets.dtype == torch.bool or targets.is_complex():
        raise TypeError(f"targets must be real numbers, got {targets.dtype}: targets.float() makes them.")
    errors = (_wide(predictions) - targets).square()
    return errors if errors.dim() == 1 else errors.flatten(1).mean(1)


def question_answering_loss(
    start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor, attention_mask: Tensor
) -> Tensor:
    """Extractive question answering: the mean cross entropy of where the answer starts and ends.

    Tokens of padding are no candidates: otherwise the width of the batch would enter every example's loss. A position
    outside an example's own tokens (an answer that was cut off) counts for nothing.

    Args:
        start_logits, end_logits: (N, T), any floating dtype.
        start_positions, end_positions: (N,) int64.
        attention_mask: (N, T), 0 or False for padding.

    Returns:
        (N,), float32 or float64.

    Raises:
        ValueError: shapes that do not belong together.

    >>> mask = torch.tensor([[1, 1, 1, 0]])
    >>> question_answering_loss(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0]), torch.tensor([9]), mask)
    tensor([0.5493])
    """
    check_tensors(
        "question_answering_loss",
        start_logits=start_logits,
        end_logits=end_logits,
        start_positions=start_positions,
        end_positions=end_positions,
        attention_mask=attention_mask,
    )
    shape = start_logits.shape
    if (
        len(shape) != 2
        or end_logits.shape != shape
        or attention_mask.shape != shape
        or not (start_positions.shape == end_positions.shape == shape[:1])
    ):
        raise ValueError(
            "question_answering_loss takes logits and mask (N, T) and positions (N,), got "
            f"{tuple(shape)}, {tuple(end_logits.shape)}, {tuple(attention_mask.shape)}, "
            f"{tuple(start_positions.shape)} and {tuple(end_positions.shape)}."
        )
    for name, logits, positions in (("start", start_logits, start_positions), ("end", end_logits, end_positions)):
        _check_floating(f"{name}_logits", logits)
        _check_whole(f"{name}_positions", positions)
    own = attention_mask.bool()
    return (_position_loss(start_logits, start_positions, own) + _position_loss(end_logits, end_positions, own)) / 2


def feature_sums_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus what an example's class and all classes together score: (N,), linear in the sums.

    Args:
        scores: (N, K + 1) of :class:`lora_dp.nn.feature_sums.FeatureSums`.
        labels: (N,) int64 classes; an example with −100 adds nothing.

    Raises:
        TypeError, ValueError: no tensors; shapes that do not belong together.

    >>> feature_sums_loss(torch.tensor([[1.0, 2.0, 0.5], [1.0, 2.0, 0.5]]), torch.tensor([1, -100]))
    tensor([-2.5000,  0.0000])
    """
    check_tensors("feature_sums_loss", scores=scores, labels=labels)
    if scores.dim() != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"feature_sums_loss takes scores (N, K + 1) and labels (N,), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}."
        )
    _check_floating("scores", scores)
    _check_whole("labels", labels)
    own = F.nll_loss(scores[:, :-1], labels, ignore_index=IGNORED, reduction="none")
    return own - scores[:, -1] * (labels != IGNORED)


def _check_floating(name: str, given: Tensor) -> None:
    if not given.is_floating_point():
        raise TypeError(f"{name} must be floating-point numbers, got {given.dtype}: .float() makes them.")


def _check_whole(name: str, given: Tensor) -> None:
    if given.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {given.dtype}: .long() makes them.")


def _position_loss(logits: Tensor, positions: Tensor, own: Tensor) -> Tensor:
    inside = (positions >= 0) & (positions < logits.shape[1])
    safe = positions.clamp(0, logits.shape[1] - 1)
    inside &= own.gather(1, safe.unsqueeze(1)).squeeze(1)
    candidates = _wide(logits).masked_fill(~own, torch.finfo(wide_dtype(logits.dtype)).min)
    return F.cross_entropy(candidates, torch.where(inside, safe, IGNORED), ignore_index=IGNORED, reduction="none")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor.dtype))
