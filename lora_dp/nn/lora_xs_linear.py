"""The private layer of LoRA-XS: a small trained core between frozen singular vectors of the weight beneath."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_dp.nn import functional
from lora_dp.nn.lora_linear import DPLoRALinear

# Of what is stored: float32 factors, whose product was rounded once.
_TOLERANCE = 1e-4


class DPLoRAXSLinear(DPLoRALinear):
    """Frozen linear layer with a trained core R (r, r): y = x W0ᵀ + b + s · dropout(x) Aᵀ Rᵀ Bᵀ.

    LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604). W0 ≈ U Σ Vᵀ is cut to rank r; ``lora_A`` = Σ Vᵀ and ``lora_B`` = U
    are frozen, as in the paper, and ``lora_R`` alone is trained. r² numbers carry noise, whatever the layer's width.
    W0 has to be public. Where it has a lower rank than r, the columns of R beside a zero of Σ change nothing.

    R starts at zero, where the paper draws it with deviation 1e-5.

    Args:
        in_features, out_features, bias, r, alpha, dropout, rslora, fan_in_fan_out, device, dtype: as
            :class:`~lora_dp.DPLoRALinear`.

    Raises:
        ValueError: as there; or the weight is not finite, or on the meta device.
        TypeError: as there.

    >>> layer = DPLoRAXSLinear(6, 4, r=2)
    >>> [(name, tuple(p.shape)) for name, p in layer.named_parameters() if p.requires_grad]
    [('lora_R', (2, 2))]
    >>> layer(torch.ones(3, 6)).shape
    torch.Size([3, 4])
    """

    frozen_names = ("weight", "lora_A", "lora_B")

    def _make_factors(self, dtype: torch.dtype) -> None:
        super()._make_factors(dtype)
        self.lora_A.requires_grad_(False)
        self.lora_B.requires_grad_(False)
        self.lora_R = nn.Parameter(self.weight.new_empty(self.r, self.r, dtype=dtype))

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """A and B from the weight as it is now, R zero: the adapted layer equals the frozen one.

        >>> layer.reset_lora_parameters()
        >>> bool(layer.lora_R.any())
        False
        """
        left, right = singular_factors(self.weight.t() if self.fan_in_fan_out else self.weight, self.r)
        self.lora_A.copy_(right)
        self.lora_B.copy_(left)
        nn.init.zeros_(self.lora_R)

    def set_rank(self, r: int, alpha: float) -> None:
        """Change alpha.

        Raises:
            ValueError: another rank: the weight was decomposed at this one.

        >>> layer.set_rank(2, alpha=4)
        >>> layer.scaling
        2.0
        """
        if r != self.r:
            raise ValueError(f"The weight was decomposed at rank {self.r}, not {r}: inject adapters of that rank.")
        super().set_rank(r, alpha)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B = U·R (d_out, r) and A = Σ·Vᵀ (r, d_in), of LoRA's form s · B A; U·R is rounded once.

        >>> b, a = layer.factors()
        >>> b.shape, a.shape
        (torch.Size([4, 2]), torch.Size([2, 6]))
        """
        return (self.lora_B.double() @ self.lora_R.double()).to(self.lora_B.dtype), self.lora_A

    def core_of(self, lora_B: Tensor) -> Tensor:
        """R of a B = U·R that :meth:`factors` gave, (r, r), to rounding.

        Raises:
            ValueError: B leaves the span of this weight's singular vectors.

        >>> torch.allclose(layer.core_of(layer.factors()[0]), layer.lora_R)
        True
        """
        mine, wide = self.lora_B.detach().double(), lora_B.to(self.lora_B.device).double()
        core = mine.t() @ wide
        if bool((mine @ core - wide).norm() > _TOLERANCE * wide.norm()):
            raise ValueError(
                "The stored B leaves the span of the weight's singular vectors, so that no core gives it: it was made "
                "for another weight, or by plain LoRA. Load it onto the plain model."
            )
        return core.to(self.lora_R.dtype)

    def forward(self, x: Tensor) -> Tensor:
        slots = self._slots("lora_R", "bias")
        weight = self.weight.t() if self.fan_in_fan_out else self.weight
        if self.merged:
            if slots is not None:
                raise RuntimeError("A merged adapter cannot be trained: call unmerge() first.")
            return functional.linear(x, weight, self.bias)
        base_slots = None if slots is None else {"weight": None, "bias": slots["bias"]}
        core_slots = None if slots is None else {"weight": slots["lora_R"], "bias": None}
        base = functional.linear(x, weight, self.bias, slots=base_slots)
        narrow = F.linear(F.dropout(x, self.dropout, self.training), functional.followed(self.lora_A, x))
        turned = functional.linear(narrow, self.lora_R, None, slots=core_slots)
        return base + F.linear(turned, functional.followed(self.lora_B, turned)) * self.scaling


def singular_factors(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """U (d_out, r) and Σ·Vᵀ (r, d_in) of the best approximation U·Σ·Vᵀ of rank r, in float64.

    The singular vectors of the shorter side are eigenvectors of W·Wᵀ (or Wᵀ·W): 0.7 s for a weight of 768 × 768 on a
    busy CPU core, 2.5 s for 1024 × 4096, where a full decomposition took 1 s and 19 s. U is orthonormal to rounding,
    and Σ·Vᵀ = Uᵀ·W exactly so. Each column of U has its largest entry positive: signs do not hang on the machine.

    Args:
        weight: (d_out, d_in).
        r: from 1 to min(d_out, d_in).

    Raises:
        ValueError: the weight is not finite, or on the meta device.

    >>> left, right = singular_factors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> left @ right
    tensor([[0., 0., 0.],
            [0., 3., 0.],
            [0., 0., 2.]], dtype=torch.float64)
    """
    wide = weight.detach().double()
    if wide.is_meta or not wide.isfinite().all():
        raise ValueError("The weight under the adapter is not finite, or not loaded: load the model's weights first.")
    if wide.shape[0] <= wide.shape[1]:
        left = torch.linalg.eigh(wide @ wide.t()).eigenvectors.flip(1)[:, :r]
    else:
        right = torch.linalg.eigh(wide.t() @ wide).eigenvectors.flip(1)[:, :r]
        left = torch.linalg.qr(wide @ right).Q
    left = left * torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    return left, left.t() @ wide
