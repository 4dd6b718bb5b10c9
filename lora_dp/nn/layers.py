"""Private layers: drop-in modules that give per-example gradients while an engine records.

Without an engine each is an ordinary differentiable module.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.argument_checks import check_alpha, check_count, check_flag, check_number
from lora_dp.nn import functional, merged_state
from lora_dp.nn.per_example import PassRecorder, Slot
from lora_dp.nn.regulator import Regulator
from lora_dp.ops.registry import wide_dtype


class PrivateModule(nn.Module):
    """Base of the private layers.

    Attributes:
        recorder: set by the engine; None makes the layer an ordinary one. Not part of the state dict.
    """

    recorder: PassRecorder | None

    def __init__(self) -> None:
        super().__init__()
        self.recorder = None

    def private_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of this very module that a private step can train, by name: those that require grad."""
        return {name: p for name, p in self.named_parameters(recurse=False) if p.requires_grad}

    def _slots(self, *names: str) -> dict[str, Slot | None] | None:
        """The slots of the named parameters, or None when nothing is being recorded."""
        recorder = self.recorder
        if recorder is None:
            return None
        if not recorder.recording:
            if recorder.current is not None and not recorder.suspended:
                recorder.current.reentrant = True
            if self.training and not recorder.suspended and torch.is_grad_enabled():
                raise RuntimeError(
                    f"A private {type(self).__name__} was called outside the model that was made private: call that "
                    "model's own forward (or use torch.no_grad() to evaluate)."
                )
            return None
        slots: dict[str, Slot | None] = {}
        for name in names:
            parameter = self._parameters.get(name)
            slots[name] = None if parameter is None else recorder.slot(parameter)
        return slots


def pass_recorder_of(model: nn.Module) -> PassRecorder | None:
    """The recorder that the private layers of ``model`` have, if any."""
    return next((module.recorder for module in model.modules() if isinstance(module, PrivateModule)), None)


def _adopt(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if parameter is None:
        module.register_parameter(name, None)
    else:
        setattr(module, name, parameter)


def _is_transposed(linear: nn.Module) -> bool:
    return type(linear).__name__ == "Conv1D" and not isinstance(linear, nn.Conv1d)


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an ``nn.Linear`` or of GPT-2's ``Conv1D``.

    Raises:
        TypeError: it is neither.
    """
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not (isinstance(linear, nn.Linear) or _is_transposed(linear)):
        raise TypeError(f"Expected nn.Linear or transformers' Conv1D, got {type(linear).__name__}.")
    out_features, in_features = weight.shape
    return (out_features, in_features) if _is_transposed(linear) else (in_features, out_features)


def _check_sizes(**sizes: object) -> None:
    for name, size in sizes.items():
        check_count(name, size, least=0)


class DPLoRALinear(PrivateModule):
    """Frozen linear layer with a trainable low-rank update: y = x W0ᵀ + b + s · dropout(x) Aᵀ Bᵀ.

    A drop-in for ``nn.Linear`` (Hu et al. 2021, arXiv 2106.09685): ``weight`` and ``bias`` keep their names in the
    state dict, beside ``lora_A`` (r, in) and ``lora_B`` (out, r). A starts Kaiming-uniform, B zero.

    Args:
        in_features: width of the input, d_in.
        out_features: width of the output, d_out.
        bias: whether the frozen layer has a bias.
        r: rank, from 1 to min(d_in, d_out).
        alpha: s = alpha / r, or alpha / √r with ``rslora``; None means alpha = r.
        dropout: probability on the adapter's input, in [0, 1).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        fan_in_fan_out: ``weight`` is stored as (d_in, d_out), as GPT-2's Conv1D does.
        device: of all parameters.
        dtype: of weight and bias. The factors are float32 where it is of half precision, as PEFT's are: bfloat16 has
            8 bits, so that most entries of A would never take a step of 1e-4. Products are in the input's dtype.

    Raises:
        ValueError: rank, alpha or dropout out of range.
        TypeError: one of another type.

    >>> layer = DPLoRALinear(6, 4, r=2)
    >>> layer(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['lora_A', 'lora_B']
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        fan_in_fan_out: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_sizes(in_features=in_features, out_features=out_features)
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        nn.init.uniform_(weight, -bound, bound)
        offset = None
        if bias:
            offset = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
            nn.init.uniform_(offset, -bound, bound)
        self._build(weight, offset, r, alpha, dropout, rslora, fan_in_fan_out)

    def _build(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        r: int,
        alpha: float | None,
        dropout: float,
        rslora: bool,
        fan_in_fan_out: bool,
    ) -> None:
        check_count("r", r, least=None)
        check_alpha(alpha)
        check_number("dropout", dropout)
        check_flag("rslora", rslora)
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        smaller = min(self.in_features, self.out_features)
        if not 0 < r <= smaller:
            raise ValueError(
                f"Rank {r} does not fit a {self.in_features} → {self.out_features} layer: choose r from 1 to {smaller}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        r = int(r)
        self.r, self.alpha, self.dropout, self.rslora = r, float(r if alpha is None else alpha), float(dropout), rslora
        self.scaling = self.alpha / (math.sqrt(r) if rslora else r)
        self.fan_in_fan_out = fan_in_fan_out
        self.merged = False
        # Set by the engine for a step that regulates its noise.
        self.regulator: Regulator | None = None
        self.weight = weight
        _adopt(self, "bias", bias)
        dtype = wide_dtype(weight.dtype)
        self.lora_A = nn.Parameter(weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(weight.new_empty(self.out_features, r, dtype=dtype))
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, r: int, alpha: float | None = None, dropout: float = 0.0, rslora: bool = False
    ) -> Self:
        """Adapt an ``nn.Linear`` or ``Conv1D``: takes over, and freezes, its very weight and bias parameters.

        Raises:
            TypeError: not a linear layer, or as for the class.
            ValueError: as for the class.
        """
        linear_features(linear)
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(linear.weight, linear.bias, r, alpha, dropout, rslora, _is_transposed(linear))  # type: ignore[arg-type]
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """A Kaiming-uniform, B zero: the adapted layer equals the frozen one."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @torch.no_grad()
    def set_rank(self, r: int, alpha: float) -> None:
        """Change rank and alpha in place: the parameters stay the same objects; new values are to be loaded next.

        Raises:
            ValueError: a rank that does not fit the layer, or the adapter is merged.
            TypeError: no rank, or alpha that is no number.
        """
        check_count("r", r, least=None)
        check_number("alpha", alpha)
        if not 0 < r <= min(self.in_features, self.out_features):
            raise ValueError(f"Rank {r} does not fit a {self.in_features} → {self.out_features} layer.")
        if self.merged:
            raise ValueError("A merged adapter cannot change its rank: call unmerge() first.")
        self.alpha = float(alpha)
        self.scaling = self.alpha / (math.sqrt(r) if self.rslora else r)
        if r == self.r:
            return
        self.r = r
        self.lora_A.data = self.lora_A.data.new_zeros(r, self.in_features)
        self.lora_B.data = self.lora_B.data.new_zeros(self.out_features, r)

    def forward(self, x: Tensor) -> Tensor:
        slots = self._slots("lora_A", "lora_B", "bias")
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.merged:
            if slots is not None:
                raise RuntimeError("A merged adapter cannot be trained: call unmerge() first.")
            return functional.linear(x, weight, self.bias)
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if slots is not None and self.regulator is not None:
            lora_A, lora_B = self.regulator.reparametrised(lora_A.detach(), lora_B.detach())
        if not (self.dropout and self.training):
            return functional.lora_linear(x, weight, self.bias, lora_A, lora_B, self.scaling, slots=slots)
        base = functional.linear(
            x, weight, self.bias, slots=None if slots is None else {"weight": None, "bias": slots["bias"]}
        )
        adapter_slots = None if slots is None else {**slots, "bias": None}
        dropped = F.dropout(x, self.dropout)
        return base + functional.lora_linear(dropped, None, None, lora_A, lora_B, self.scaling, slots=adapter_slots)

    @torch.no_grad()
    def weight_with(self, sign: int) -> Tensor:
        """``weight`` plus or minus s · B A, added in float32 or better, in the weight's dtype."""
        wide = wide_dtype(self.weight.dtype)
        update = (self.lora_B.to(wide) @ self.lora_A.to(wide)).mul_(sign * self.scaling)
        return (self.weight.to(wide) + (update.t() if self.fan_in_fan_out else update)).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s · B A into ``weight``; the forward is then a single product. Nothing happens if already merged.

        The state dict is then that of a plain layer. The sum is rounded once, to the weight's dtype.
        """
        if not self.merged:
            self.weight.copy_(self.weight_with(1))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s · B A out of ``weight`` again, up to the rounding of its dtype."""
        if self.merged:
            self.weight.copy_(self.weight_with(-1))
            self.merged = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            merged_state.leave_plain(destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        refusal = merged_state.refusal(self, state_dict, prefix, local_metadata)
        if refusal:
            error_msgs.append(refusal)
            return
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        weight = state_dict.get(f"{prefix}weight")
        if merged_state.holds_factors(state_dict, prefix) and weight is not None and weight.shape == self.weight.shape:
            self.merged = False
        missing_keys += [key for key in missing if not (self.merged and merged_state.is_factor(key))]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, alpha={self.alpha:g}"
            + (", rslora=True" if self.rslora else "")
            + (f", dropout={self.dropout:g}" if self.dropout else "")
            + (", merged" if self.merged else "")
        )


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
        _check_sizes(in_features=in_features, out_features=out_features)
        plain = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        stored = plain.weight.detach().t().contiguous() if fan_in_fan_out else plain.weight.detach()
        self._build(nn.Parameter(stored), plain.bias, fan_in_fan_out)

    def _build(self, weight: nn.Parameter, bias: nn.Parameter | None, fan_in_fan_out: bool) -> None:
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        self.fan_in_fan_out = fan_in_fan_out
        self.weight = weight
        _adopt(self, "bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Module) -> Self:
        """Take over the very parameters of an ``nn.Linear`` or ``Conv1D``, with their ``requires_grad``.

        Raises:
            TypeError: not a linear layer.
        """
        linear_features(linear)
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(linear.weight, linear.bias, _is_transposed(linear))  # type: ignore[arg-type]
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.weight, self.bias, fan_in_fan_out=self.fan_in_fan_out, slots=self._slots("weight", "bias")
        )

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
        _adopt(self, "weight", norm.weight)
        _adopt(self, "bias", norm.bias)

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> Self:
        """Take over the very parameters of an ``nn.LayerNorm``, with their ``requires_grad``.

        Raises:
            ValueError: it normalises over more than the last dimension.
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
        _check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
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
        """
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        layer._build(table)
        return layer.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:
        slots = self._slots("weight")
        rows = functional.embedding(ids, self.weight, self.padding_idx, slot=None if slots is None else slots["weight"])
        return rows.to(self._rows.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
