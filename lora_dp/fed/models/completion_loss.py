"""The loss of a causal language model on completions, without keeping a score for every token of the vocabulary."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.isolation.trials import modes_kept
from lora_dp.losses import causal_lm_loss
from lora_dp.ops.registry import wide_dtype

# Where learned tokens are picked out. Elsewhere the host would wait for their number.
_SELECT_ON = ("cpu",)


class CompletionLoss(nn.Module):
    """A causal language model that returns the loss of each example in place of its scores.

    Scores are (N, T, vocabulary): for 64 texts of 128 tokens and 50,000 words 1.6 GB, most of it for prompts and
    padding, which nothing is learned from. So the output layer is given the learned tokens of one example at a time,
    and in training its gradient is computed at once (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989). This takes an
    output layer that is frozen, and a model that returns what this layer does. Any other computes its scores.

    Args:
        model: Transformers', with adapters.

    >>> import transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = CompletionLoss(transformers.LlamaForCausalLM(config).requires_grad_(False))
    >>> model(torch.tensor([[-100, 7, 2]]), input_ids=torch.tensor([[5, 7, 2]])).shape
    torch.Size([1])
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._head: nn.Linear | None = _plain_head(model)

    def forward(self, targets: Tensor, *, counted: bool = False, **inputs: Tensor) -> Tensor:
        """Mean cross-entropy (N,) over each example's own learned tokens, in nats; 0 where nothing is learned.

        Args:
            targets: (N, T) int64, the input's tokens, −100 where nothing is learned.
            counted: return (N, 3) instead, float64: the sum over these tokens, how many they are, and how many of them
                are the likeliest.
            inputs: of the model.
        """
        if self._head is None:
            scores = self.model(**inputs).logits
            return _counts(scores, targets) if counted else causal_lm_loss(scores, targets)
        hidden: Tensor = self.model.base_model(**inputs).last_hidden_state
        weight, kind = self._head.weight, hidden.device.type
        if torch.is_autocast_enabled(kind):  # once, and not for each example
            weight = weight.to(torch.get_autocast_dtype(kind))
        return torch.stack(
            [
                self._of_one(states[:-1], following[1:], weight, counted)
                for states, following in zip(hidden, targets, strict=True)
            ]
        )

    def _of_one(self, states: Tensor, following: Tensor, weight: Tensor, counted: bool) -> Tensor:
        """Of one example: (T, d) and (T,), where each state is to tell the token beside it."""
        assert self._head is not None
        bias = self._head.bias
        learned = following >= 0
        if states.device.type in _SELECT_ON:
            states, following, learned = states[learned], following[learned], learned[learned]
        if counted:
            return _counts(F.linear(states, weight, bias), following, learned)
        shares = learned.double() / learned.sum().clamp(min=1)
        if self.training and torch.is_grad_enabled():
            loss: Tensor = _LinearCrossEntropy.apply(states, weight, bias, following.clamp(min=0), shares)
            return loss
        scores = F.linear(states, weight, bias)
        nats = F.cross_entropy(scores.to(wide_dtype(scores.dtype)), following, reduction="none")
        return (nats * shares.to(nats.dtype)).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ shares · cross-entropy of a frozen linear layer's scores; the gradient is there when forward returns."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, following: Tensor, shares: Tensor
    ) -> Tensor:
        scores = F.linear(states, weight, bias)
        logs = scores.log_softmax(-1, wide_dtype(scores.dtype))
        shares = shares.to(logs.dtype)
        nats = -logs.gather(1, following.unsqueeze(1)).squeeze(1)
        change = logs.exp_()
        change.scatter_add_(1, following.unsqueeze(1), torch.full_like(nats, -1.0).unsqueeze(1))
        ctx.save_for_backward((change * shares.unsqueeze(1)).to(weight.dtype) @ weight)
        return (nats * shares).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (change,) = ctx.saved_tensors
        return change * grad.to(change.dtype), None, None, None, None


def _counts(scores: Tensor, targets: Tensor, learned: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropy, number of learned tokens, and how many of them are the likeliest, float64.

    Args:
        scores: (N, T, vocabulary) with targets (N, T), which are shifted; or those of one example, (T, vocabulary).
        targets: tokens.
        learned: which of one example's count.
    """
    if learned is None:
        return torch.stack([_counts(*one, one[1] >= 0) for one in zip(scores[:, :-1], targets[:, 1:], strict=True)])
    nats = F.cross_entropy(scores.double(), targets, reduction="none")
    right = scores.argmax(-1) == targets
    return torch.stack([(nats * learned).sum(), learned.sum().double(), (right & learned).sum().double()])


@torch.no_grad()
def _plain_head(model: Any) -> nn.Linear | None:
    """The frozen linear layer whose output on the last hidden states is what a model returns; None for any other.

    Some models scale or cap these scores.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head.bias is not None and head.bias.requires_grad:
        return None
    device = head.weight.device
    tokens = torch.arange(1, 9, device=device).unsqueeze(0) % head.out_features
    with modes_kept(model):
        model.eval()
        try:
            whole = model(input_ids=tokens).logits
            alone = head(model.base_model(input_ids=tokens).last_hidden_state)
        except (AttributeError, TypeError):
            return None
    return head if whole.shape == alone.shape and torch.allclose(whole, alone, rtol=1e-4, atol=1e-5) else None
