"""The private layer of PRISM: trained coordinates of the tangent space at a frozen product of low rank."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.nn import functional
from lora_dp.nn.lora_linear import DPLoRALinear

# Of what is stored: float32 factors, whose entries were rounded once.
_TOLERANCE = 1e-4


class DPLoRATangentLinear(DPLoRALinear):
    """Frozen linear layer whose adapter moves in a tangent space: y = x W0ᵀ + b + s · dropout(x) (B A + dW)ᵀ.

    PRISM (Wang and Zhang 2026, arXiv 2606.00944). ``lora_A`` (r, d_in) has orthonormal rows, ``lora_B`` (d_out, r)
    orthogonal columns, and both are frozen: B A = U Σ Vᵀ. Matrices of rank r near it move by

        dW = dB · A + U · dA · (I − AᵀA),    U the columns of B at unit length.

    ``lora_dB`` (d_out, r) and ``lora_dA`` (r, d_in) alone are trained. They are coordinates in an orthonormal basis:
    the gradient of both together has the length of s times the weight's gradient, projected onto the tangent space. So
    clipping of examples, and noise of one size, are those of dW, whatever pair of factors gave the product. dA's part
    along A's rows has no gradient, and changes nothing.

    Where a column of B is zero, as at the start, so is that of U: there is no direction yet in which dA could move.

    Args:
        in_features, out_features, bias, r, alpha, dropout, rslora, fan_in_fan_out, device, dtype: as
            :class:`~lora_dp.DPLoRALinear`.

    Raises:
        ValueError, TypeError: as there.

    >>> layer = DPLoRATangentLinear(6, 4, r=2)
    >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters() if p.requires_grad]
    [('lora_dA', (2, 6)), ('lora_dB', (4, 2))]
    >>> layer(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    """

    frozen_names = ("weight", "lora_A", "lora_B")

    def _make_factors(self, dtype: torch.dtype) -> None:
        super()._make_factors(dtype)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)
        self.lora_dA = nn.Parameter(torch.empty_like(self.lora_A))
        self.lora_dB = nn.Parameter(torch.empty_like(self.lora_B))

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Random orthonormal rows of A, all else zero: the adapted layer equals the frozen one.

        >>> layer.reset_lora_parameters()
        >>> torch.allclose(layer.lora_A @ layer.lora_A.t(), torch.eye(2), atol=1e-6), bool(layer.lora_B.any())
        (True, False)
        """
        nn.init.orthogonal_(self.lora_A)
        for zero in (self.lora_B, self.lora_dA, self.lora_dB):
            nn.init.zeros_(zero)

    @torch.no_grad()
    def set_rank(self, r: int, alpha: float) -> None:
        """Change rank and alpha in place; new values are to be loaded next.

        Raises:
            ValueError, TypeError: as :meth:`lora_dp.DPLoRALinear.set_rank`.

        >>> layer.set_rank(3, alpha=6)
        >>> layer.lora_dA.shape, layer.scaling
        (torch.Size([3, 6]), 2.0)
        """
        super().set_rank(r, alpha)
        self.lora_dA.data = torch.zeros_like(self.lora_A)
        self.lora_dB.data = torch.zeros_like(self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (d_out, k) and A (k, d_in), of LoRA's form s · B A: k is r where the coordinates are zero, else 2r.

        >>> [tuple(factor.shape) for factor in layer.factors()]
        [(4, 2), (2, 6)]
        """
        if not (self.lora_dA.any() or self.lora_dB.any()):
            return self.lora_B, self.lora_A
        across = self.lora_dA - (self.lora_dA @ self.lora_A.t()) @ self.lora_A
        return torch.cat([self.lora_B + self.lora_dB, unit_columns(self.lora_B)], 1), torch.cat([self.lora_A, across])

    def forward(self, x: Tensor) -> Tensor:
        slots = self._slots("lora_dA", "lora_dB", "bias")
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.merged:
            if slots is not None:
                raise RuntimeError("A merged adapter cannot be trained: call unmerge() first.")
            return functional.linear(x, weight, self.bias)
        base_slots = slots_A = slots_B = None
        if slots is not None:
            base_slots = {"weight": None, "bias": slots["bias"]}
            slots_A, slots_B = ({"weight": slots[name], "bias": None} for name in ("lora_dA", "lora_dB"))
        base = functional.linear(x, weight, self.bias, slots=base_slots)
        dropped, rows = F.dropout(x, self.dropout, self.training), functional.followed(self.lora_A, x)
        along = F.linear(dropped, rows)
        across = functional.linear(dropped - F.linear(along, rows.t()), self.lora_dA, None, slots=slots_A)
        moved = functional.linear(along, self.lora_dB, None, slots=slots_B)
        moved = moved + F.linear(across, functional.followed(unit_columns(self.lora_B), across))
        return base + (moved + F.linear(along, functional.followed(self.lora_B, along))) * self.scaling


def unit_columns(matrix: Tensor) -> Tensor:
    """Each column at unit length; zero ones stay so.

    >>> unit_columns(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor([[0.6000, 0.0000],
            [0.8000, 0.0000]])
    """
    lengths = matrix.detach().norm(dim=0)
    return matrix / lengths.where(lengths > 0, torch.inf)


def check_tangent_point(lora_A: Tensor, lora_B: Tensor) -> None:
    """Refuse factors that are no point of a tangent space: A (r, d_in) and B (d_out, r).

    Raises:
        ValueError: A's rows are not orthonormal, or B's columns not orthogonal, to rounding.

    >>> check_tangent_point(torch.ones(2, 6), torch.zeros(4, 2))
    Traceback (most recent call last):
    ValueError: The stored factors are not orthogonal, as plain LoRA's are not: load them onto the plain model.
    """
    columns = unit_columns(lora_B.double())
    for gram in (lora_A.double() @ lora_A.double().t(), columns.t() @ columns):
        wanted = gram.diagonal().round().clamp(max=1).diag()
        if bool((gram - wanted).abs().max() > _TOLERANCE):
            raise ValueError(
                "The stored factors are not orthogonal, as plain LoRA's are not: load them onto the plain model."
            )
