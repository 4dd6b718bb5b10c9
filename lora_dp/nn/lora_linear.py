"""The private layer of LoRA: a frozen linear layer with a trainable product of low rank."""

import math
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.argument_checks import check_alpha, check_count, check_flag, check_number
from lora_dp.nn import functional, merged_state
from lora_dp.nn.adapter_start import InitA, check_init_a
from lora_dp.nn.private_module import PrivateModule, adopt, check_sizes, is_transposed, linear_features, plain_linear
from lora_dp.nn.regulator import Regulator
from lora_dp.ops.registry import wide_dtype


class DPLoRALinear(PrivateModule):
    """Frozen linear layer with a trainable low-rank update: y = x W0ᵀ + b + s · dropout(x) Aᵀ Bᵀ.

    A drop-in for ``nn.Linear`` (Hu et al. 2021, arXiv 2106.09685): ``weight`` and ``bias`` keep their names in the
    state dict, beside ``lora_A`` (r, in) and ``lora_B`` (out, r). A starts at random, B at zero.

    Args:
        in_features: width of the input, d_in.
        out_features: width of the output, d_out.
        bias: whether the frozen layer has a bias.
        r: rank, from 1 to min(d_in, d_out).
        alpha: s = alpha / r, or alpha / √r with ``rslora``; None means alpha = r.
        dropout: probability on the adapter's input, in [0, 1).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
        fan_in_fan_out: ``weight`` is stored as (d_in, d_out), as GPT-2's Conv1D does.
        init_a: how A starts: "kaiming", uniform within ±1/√d_in; or "orthonormal", rows at right angles, each of length
            1/√3. That is a Kaiming row's root mean square: ‖A‖² is r/3 on average, and so are steps of one rate.
        device: of all parameters.
        dtype: of weight and bias. The factors are float32 where it is of half precision, as PEFT's are: bfloat16 has
            8 bits, so that most entries of A would never take a step of 1e-4. Products are in the input's dtype.

    Raises:
        ValueError: rank, alpha or dropout out of range, or no such start.
        TypeError: one of another type.

    >>> layer = DPLoRALinear(6, 4, r=2)
    >>> layer(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    >>> [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    ['lora_A', 'lora_B']
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    # Parameters that no step may train.
    frozen_names: ClassVar[tuple[str, ...]] = ("weight",)

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
        init_a: InitA = "kaiming",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        nn.init.uniform_(weight, -bound, bound)
        offset = None
        if bias:
            offset = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
            nn.init.uniform_(offset, -bound, bound)
        self._build(weight, offset, r, alpha, dropout, rslora, fan_in_fan_out, init_a)

    def _build(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        r: int,
        alpha: float | None,
        dropout: float,
        rslora: bool,
        fan_in_fan_out: bool,
        init_a: InitA,
        any_rank: bool = False,
    ) -> None:
        check_count("r", r, least=None)
        check_alpha(alpha)
        check_number("dropout", dropout)
        check_flag("rslora", rslora)
        check_init_a(init_a)
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        smaller = min(self.in_features, self.out_features)
        if r < 1 or (r > smaller and not any_rank):
            raise ValueError(
                f"Rank {r} does not fit a {self.in_features} → {self.out_features} layer: choose r from 1 to {smaller}."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        r = int(r)
        self.r, self.alpha, self.dropout, self.rslora = r, float(r if alpha is None else alpha), float(dropout), rslora
        self.scaling = self.alpha / (math.sqrt(r) if rslora else r)
        self.fan_in_fan_out, self.init_a = fan_in_fan_out, init_a
        self.merged = False
        # Set by the engine for a step that regulates its noise.
        self.regulator: Regulator | None = None
        self.weight = weight
        adopt(self, "bias", bias)
        self._make_factors(wide_dtype(weight.dtype))
        self.reset_lora_parameters()

    def _make_factors(self, dtype: torch.dtype) -> None:
        self.lora_A = nn.Parameter(self.weight.new_empty(self.r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, self.r, dtype=dtype))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        init_a: InitA = "kaiming",
        any_rank: bool = False,
    ) -> Self:
        """Adapt an ``nn.Linear`` or ``Conv1D``: takes over, and freezes, its very weight and bias parameters.

        With ``any_rank`` a rank above the layer's size is taken, as adapters that others have trained may have.

        Raises:
            TypeError: not a linear layer, or as for the class.
            ValueError: as for the class.

        >>> plain = nn.Linear(6, 4)
        >>> adapted = DPLoRALinear.from_linear(plain, r=2)
        >>> adapted.weight is plain.weight, plain.weight.requires_grad
        (True, False)
        """
        linear_features(linear)
        layer = cls.__new__(cls)
        PrivateModule.__init__(layer)
        transposed = is_transposed(linear)
        layer._build(linear.weight, linear.bias, r, alpha, dropout, rslora, transposed, init_a, any_rank)  # type: ignore[arg-type]
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """A as ``init_a`` says, B zero: the adapted layer equals the frozen one.

        >>> layer.reset_lora_parameters()
        >>> bool(layer.lora_A.any()), bool(layer.lora_B.any())
        (True, False)
        """
        if self.init_a == "orthonormal":
            nn.init.orthogonal_(self.lora_A, gain=1 / math.sqrt(3))
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @torch.no_grad()
    def set_rank(self, r: int, alpha: float) -> None:
        """Change rank and alpha in place: the parameters stay the same objects; new values are to be loaded next.

        Raises:
            ValueError: a rank that does not fit the layer, or the adapter is merged.
            TypeError: no rank, or alpha that is no number.

        >>> layer.set_rank(3, alpha=6)
        >>> layer.lora_A.shape, layer.scaling
        (torch.Size([3, 6]), 2.0)
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

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (d_out, r) and A (r, d_in), by which the adapted weight is W0 + s · B A.

        >>> [tuple(factor.shape) for factor in layer.factors()]
        [(4, 2), (2, 6)]
        """
        return self.lora_B, self.lora_A

    @torch.no_grad()
    def weight_with(self, sign: int) -> Tensor:
        """``weight`` plus or minus s · B A, added in float32 or better, in the weight's dtype.

        >>> torch.equal(layer.weight_with(1), layer.weight)  # B is zero
        True
        """
        wide = wide_dtype(self.weight.dtype)
        lora_B, lora_A = self.factors()
        update = (lora_B.to(wide) @ lora_A.to(wide)).mul_(sign * self.scaling)
        return (self.weight.to(wide) + (update.t() if self.fan_in_fan_out else update)).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s · B A into ``weight``; the forward is then a single product. Nothing happens if already merged.

        The state dict is then that of a plain layer. The sum is rounded once, to the weight's dtype.

        >>> x = torch.ones(3, 6)
        >>> _ = nn.init.normal_(layer.lora_B)
        >>> before = layer(x)
        >>> layer.merge()
        >>> torch.allclose(layer(x), before, atol=1e-5), list(layer.state_dict())
        (True, ['weight', 'bias'])
        """
        if not self.merged:
            self.weight.copy_(self.weight_with(1))
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take s · B A out of ``weight`` again, up to the rounding of its dtype.

        >>> layer.merge()
        >>> layer.unmerge()
        >>> list(layer.state_dict())
        ['weight', 'bias', 'lora_A', 'lora_B']
        """
        if self.merged:
            self.weight.copy_(self.weight_with(-1))
            self.merged = False

    def plain(self) -> nn.Module:
        """The layer without its adapter, which is added into the weight first: ``nn.Linear``, or ``Conv1D``.

        >>> type(layer.plain()).__name__
        'Linear'
        """
        self.merge()
        return plain_linear(self.weight, self.bias, self.fan_in_fan_out, self.training)

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
