"""A linear head on features of unit length, which released statistics centre and scale, and class sums start."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_dp.nn.feature_sums import FeatureMoments, FeatureSums, SumWeights, unit_length
from lora_dp.nn.layers import DPLinear
from lora_dp.nn.private_module import check_sizes
from lora_dp.privacy.shrinkage import JamesStein

BIAS_SHARE = 0.3
MEAN, SCALE, PRIOR = "feature_mean", "feature_scale", "class_prior"
_LEAST_SHARE = 0.02  # of a class: noise must not make it rarer
_LEAST_VARIANCE = 0.1  # of a feature, in units of the mean one
_LEAST_SPREAD = 1e-3  # of all features together: noise may make their mean longer than they are


class FeatureHead(nn.Module):
    """Logits s·(W·(u − mean)·scale + 0.3·b) of features x, with u = x/‖x‖ and s = √(K/2).

    ``linear`` alone is trained. Of its bias 0.3 counts: with all of it, half of what an example may weigh would go to
    the bias, whose noise is the features' too.

    s makes one learning rate fit few classes and many. Of K classes each is told of by one example in K, so that a
    step moves its weights by 1/K as much; noise forbids to make up for all of that.

    ``feature_mean`` and ``feature_scale`` (d,) are buffers, 0 and 1 at first: they are set from public or released
    statistics, never from private examples. So is ``class_prior`` (K,), 0 at first: logarithms of the classes' shares,
    added to the logits in training alone. What is learnt then judges as if classes were equally common (logit
    adjustment, Menon et al. 2021, arXiv 2007.07314).

    Args:
        in_features: d.
        out_features: K, the number of classes.
        device, dtype: of parameters and buffers.

    Attributes:
        logit_scale: s.

    >>> head = FeatureHead(4, 2)
    >>> head(torch.randn(3, 4)).shape
    torch.Size([3, 2])
    >>> [name for name, parameter in head.named_parameters()]
    ['linear.weight', 'linear.bias']
    """

    feature_mean: Tensor
    feature_scale: Tensor
    class_prior: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        self.linear: nn.Module = DPLinear(in_features, out_features, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.logit_scale = math.sqrt(max(out_features, 2) / 2)
        self.register_buffer(MEAN, torch.zeros(in_features, device=device, dtype=dtype))
        self.register_buffer(SCALE, torch.ones(in_features, device=device, dtype=dtype))
        self.register_buffer(PRIOR, torch.zeros(out_features, device=device, dtype=dtype))
        self._sums: FeatureSums | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Logits (…, K) of features (…, d); inside :meth:`summing`, scores (…, K + 1)."""
        units = unit_length(features)
        if self._sums is not None:
            scores: Tensor = self._sums(units)
            return scores
        # Of the same value as s·(W·z + 0.3·b), and the layer sees what its gradient is to be: z, and 0.3 for the bias.
        scores = self.linear((units - self.feature_mean) * self.feature_scale / BIAS_SHARE)
        logits: Tensor = self.logit_scale * BIAS_SHARE * scores
        return logits + self.class_prior if self.training else logits

    def empty_sums(self, weights: SumWeights) -> FeatureSums:
        """Sums of nothing, of this head's sizes, where the head is.

        >>> head.empty_sums(SumWeights()).by_class.weight.shape
        torch.Size([2, 5])
        """
        reference = self.feature_mean
        return FeatureSums(self.in_features, self.out_features, weights, device=reference.device, dtype=reference.dtype)

    @contextmanager
    def summing(self, weights: SumWeights) -> Iterator[FeatureSums]:
        """Inside, the head returns the scores of feature sums, which alone of it are trained.

        >>> with head.summing(SumWeights()) as sums:
        ...     head(torch.randn(3, 4)).shape
        torch.Size([3, 3])
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._sums = self.empty_sums(weights)
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield self._sums
        finally:
            self._sums = None
            for parameter in trained:
                parameter.requires_grad_(True)


def feature_head_of(model: nn.Module) -> tuple[str, FeatureHead] | None:
    """The name and the module of a model's feature head; None if it has none.

    >>> feature_head_of(nn.Sequential(nn.Tanh(), FeatureHead(4, 2)))[0]
    '1'
    """
    return next(((name, m) for name, m in model.named_modules() if isinstance(m, FeatureHead)), None)


def feature_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers by which a model's feature head centres and scales, by name: no step trains them."""
    found = feature_head_of(model)
    return {} if found is None else {f"{found[0]}.{name}": getattr(found[1], name) for name in (MEAN, SCALE, PRIOR)}


def started_head(head: FeatureHead, released: FeatureMoments, *, balanced: bool, warm: bool) -> dict[str, Tensor]:
    """Values for the head's tensors, by name, from released sums: post-processing, which costs no privacy.

    Mean and variances of the features are shrunk as far as their noise asks for
    (:class:`lora_dp.privacy.shrinkage.JamesStein`): under much noise the mean is 0 and all variances are alike.
    Features are scaled to length 1 in the mean.

    Args:
        head: to be started; it is not changed.
        released: sums over its features.
        balanced: add the classes' shares in training, so that the head judges as if they were equally common.
        warm: begin with the weights of the nearest class mean; else with those that the head has, turned so that
            centred and scaled features give the same logits as before.

    Returns:
        ``feature_mean`` and ``feature_scale`` (d,), ``linear.weight`` (K, d) and ``linear.bias`` (K,); balanced,
        ``class_prior`` (K,); in the dtype of the sums.

    >>> sums = torch.tensor([[0.3, 0.4], [0.2, -0.1]])
    >>> released = FeatureMoments(sums, torch.tensor([0.5, 0.5]), None, None, noise=0.0, weights=SumWeights(0.5, 0, 0))
    >>> started_head(FeatureHead(2, 2), released, balanced=False, warm=True)["linear.weight"]
    tensor([[ 0.2000,  1.0000],
            [-0.2000, -1.0000]])
    """
    d, sums, noise, shrunk = head.in_features, released.class_sums, released.noise, JamesStein()
    shares = torch.full((head.out_features,), 1 / head.out_features, dtype=sums.dtype, device=sums.device)
    if released.shares is not None:
        shares = released.shares + (1 - released.shares.sum()) / len(shares)
        shares = shares.clamp(min=_LEAST_SHARE / len(shares))
        shares = shares / shares.sum()
    mean, mean_noise = sums.sum(0), noise * math.sqrt(len(sums))
    if released.first is not None:
        # Two views of one mean, each by the inverse of its noise's variance.
        own = noise / released.weights.first
        trust = 0.5 if noise == 0 else mean_noise**2 / (mean_noise**2 + own**2)
        mean, mean_noise = mean + trust * (released.first - mean), math.sqrt(1 - trust) * mean_noise
    mean = shrunk(mean, mean_noise)
    scale = torch.full_like(mean, 1.0)
    if released.second is not None:
        variance = released.second - mean.square()
        # Their mean needs no release: features have length 1.
        level = max(1 - float(mean.square().sum()), _LEAST_SPREAD) / d
        variance = level + shrunk(variance - variance.mean(), noise / released.weights.second)
        scale = (variance.clamp(min=_LEAST_VARIANCE * level) * d).rsqrt()
    values = {MEAN: mean, SCALE: scale}
    if balanced:
        values[PRIOR] = shares.log()
    if warm:
        # In scaled features every class has about the variance 1/d in every direction: the nearest class mean.
        # Shrunk before they are scaled: all numbers of one have the same noise there.
        means = sums / shares.unsqueeze(1) - mean
        means = torch.stack([shrunk(m, noise / float(p)) for m, p in zip(means, shares, strict=True)]) * scale
        values["linear.weight"] = means * d / head.logit_scale
        bias = -0.5 * d * means.square().sum(1) + (0 if balanced else shares.log())
        values["linear.bias"] = bias / BIAS_SHARE / head.logit_scale
        return values
    # W·(u − m₀)·scale₀ + 0.3·b₀ in terms of (u − m)·scale.
    weight, bias = (head.linear.get_parameter(name).detach().to(sums) for name in ("weight", "bias"))
    plain = weight * head.feature_scale.to(sums)
    values["linear.weight"] = plain / scale
    values["linear.bias"] = bias + plain @ (mean - head.feature_mean.to(sums)) / BIAS_SHARE
    return values
