"""Private layers whose parameters are all trained: linear layers, LayerNorm and embeddings."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.nn import functional
from lora_dp.nn.private_module import PrivateModule, adopt, check_sizes, is_transposed, linear_features, plain_linear


class DPLinear(PrivateModule):
    """A full-rank linear layer for private training, such as a classification head: y = x Wᵀ + b.

    Args:
        in_features: d_in.
        out_features: d_out.
        bias: whether there is one.
        fan_in_fan_out: ``weight`` is stored as (d_in, d_out), as GPT-2's Conv1D does.
        device, dtype: of the parameters.

    >>> head = DPLinear(6, 4)
    >>> head(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    >>> [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    ['weight', 'bias']
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        fan_in_fan_out: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        plain = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        stored = plain.weight.detach().t().contiguous() if fan_in_fan_out else plain.weight.detach()
        self._build(nn.Parameter(stored), plain.bias, fan_in_fan_out)

    def _build(self, weight: nn.Parameter, bias: nn.Parameter | None, fan_in_fan_out: bool) -> None:
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight
        adopt(self, "bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """Take over the very parameters of an ``nn.Linear`` or ``Conv1D``, with their ``requires_grad``.

        Raises:
            TypeError: not a linear layer.

        >>> plain = nn.Linear(6, 4)
        >>> DPLinear.from_linear(plain).weight is plain.weight
        True
        """
        linear_features(linear)
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(linear.weight, linear.bias, is_transposed(linear))  # type: ignore[arg-type]
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.weight, self.bias, fan_in_fan_out=self.fan_in_fan_out, slots=self._slots("weight", "bias")
        )

    def plain(self) -> nn.Module:
        """An ``nn.Linear``, or a ``Conv1D``, of these very parameters.

        >>> head.plain().weight is head.weight
        True
        """
        return plain_linear(self.weight, self.bias, self.fan_in_fan_out, self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class DPLayerNorm(PrivateModule):
    """Layer normalisation over the last dimension with privately trainable weight and bias.

    Args:
        normalized_shape: width d of the last dimension.
        eps: added to the variance.
        elementwise_affine: whether there are weight and bias.
        bias: whether there is a bias.
        device, dtype: of the parameters.

    >>> norm = DPLayerNorm(4)
    >>> norm(torch.tensor([[1.0, 1.0, 3.0, 3.0]]))
    tensor([[-1.0000, -1.0000,  1.0000,  1.0000]], grad_fn=...)
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        plain = nn.LayerNorm(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self._build(plain)

    def _build(self, norm: nn.LayerNorm) -> None:
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                f"Only normalisation over the last dimension is private here, got {tuple(norm.normalized_shape)}: "
                "freeze this LayerNorm."
            )
        self.normalized_shape, self.eps = tuple(norm.normalized_shape), norm.eps
        adopt(self, "weight", norm.weight)
        adopt(self, "bias", norm.bias)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> Self:
        """Take over the very parameters of an ``nn.LayerNorm``, with their ``requires_grad``.

        Raises:
            ValueError: it normalises over more than the last dimension.

        >>> plain = nn.LayerNorm(6)
        >>> DPLayerNorm.from_layer_norm(plain).weight is plain.weight
        True
        """
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(norm)
        return layer.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        slots = self._slots("weight", "bias")
        if slots is None or not any(slots.values()):
            weight, bias = (
                None if parameter is None else functional.followed(parameter, x)
                for parameter in (self.weight, self.bias)
            )
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return functional.affine(F.layer_norm(x, self.normalized_shape, eps=self.eps), self.weight, self.bias, slots)

    def plain(self) -> nn.Module:
        """An ``nn.LayerNorm`` of these very parameters.

        >>> norm.plain().weight is norm.weight
        True
        """
        layer = nn.LayerNorm(self.normalized_shape, self.eps, device="meta")
        adopt(layer, "weight", self.weight)
        adopt(layer, "bias", self.bias)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"


class DPEmbedding(PrivateModule):
    """A trainable lookup table: ids (N, ...) → (N, ..., d). Its per-example norms never form (N, rows, d).

    Args:
        num_embeddings: rows of the table.
        embedding_dim: length d of a row.
        padding_idx: a row that gets no gradient.
        device, dtype: of the table.

    >>> table = DPEmbedding(10, 4, padding_idx=0)
    >>> table(torch.tensor([[3, 7, 0]])).shape
    torch.Size([1, 3, 4])
    """

    _rows: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        self._build(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype))

    def _build(self, table: nn.Embedding) -> None:
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
            raise ValueError(
                "An embedding with max_norm, scale_grad_by_freq or sparse gradients mixes examples: freeze it or "
                "switch these off."
            )
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.weight = table.weight
        # Of the rows that it gives: the model's, which the table itself need not have where it is trained.
        self.register_buffer("_rows", table.weight.new_empty(0), persistent=False)

    @classmethod
    def from_embedding(cls, table: nn.Embedding) -> Self:
        """Take over the very weight of an ``nn.Embedding``, with its ``requires_grad``.

        Raises:
            ValueError: it has an option whose gradient mixes examples.

        >>> plain = nn.Embedding(100, 6)
        >>> DPEmbedding.from_embedding(plain).weight is plain.weight
        True
        """
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(table)
        return layer.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        slots = self._slots("weight")
        rows = functional.embedding(ids, self.weight, self.padding_idx, slot=None if slots is None else slots["weight"])
        return rows.to(self._rows.dtype)

    def plain(self) -> nn.Module:
        """An ``nn.Embedding`` of this very table.

        >>> table.plain().weight is table.weight
        True
        """
        layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        layer.weight = self.weight
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
