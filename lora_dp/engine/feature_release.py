"""Class sums and moments of features, released once by an engine: a start for a head before any training."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lora_dp.argument_checks import check_count, check_kind, check_tensors
from lora_dp.engine.engine import PrivacyEngine
from lora_dp.losses import IGNORED, feature_sums_loss
from lora_dp.nn.feature_sums import FeatureMoments, FeatureSums, SumWeights, unit_length

_ROWS = 8192


def release_feature_sums(
    engine: PrivacyEngine,
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    noise_multiplier: float,
    weights: SumWeights | None = None,
) -> FeatureMoments:
    """Release sums over all examples, of features scaled to unit length, by one private step of the engine.

    The step is in the engine's ledger before the sums exist. No example is left out by chance, so that nothing is
    amplified. Features must be those of their example alone: of a frozen model in eval mode, not of one whose
    normalisation joins a batch. The number of examples is taken to be public.

    Args:
        engine: whose ledger counts the release.
        features: (N, d), any floating dtype; each row is divided by its length. A row that is not finite adds nothing.
        labels: (N,) int64 classes from 0; −100 for none.
        classes: K, public: not read off the labels.
        noise_multiplier: σ, in units of the sums' sensitivity.
        weights: of counts and moments beside the class sums.

    Returns:
        Means in float64 on the features' device.

    Raises:
        ValueError: shapes that do not belong together, no examples, or a label that is no class.
        TypeError: an argument of another type.

    >>> engine, features = PrivacyEngine(), torch.randn(1000, 8)
    >>> labels = (features[:, 0] > 0).long()
    >>> released = release_feature_sums(engine, features, labels, 2, noise_multiplier=5.0)
    >>> released.class_sums.shape, engine.ledger.entries
    (torch.Size([2, 8]), ((PoissonGaussian(noise_multiplier=5.0, sample_rate=1.0), 1),))
    """
    check_kind("engine", engine, PrivacyEngine, "PrivacyEngine() makes one")
    check_tensors("release_feature_sums", features=features, labels=labels)
    check_count("classes", classes)
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            "release_feature_sums takes features (N, d) and labels (N,) of at least one example, got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if not features.is_floating_point() or labels.dtype != torch.int64:
        raise TypeError(
            f"release_feature_sums takes floating-point features and int64 labels, got {features.dtype} and "
            f"{labels.dtype}: .float() and .long() make them."
        )
    if bool(((labels < 0) & (labels != IGNORED) | (labels >= classes)).any()):
        raise ValueError(f"A label is none of the classes 0 to {classes - 1}: write {IGNORED} where there is none.")
    units = unit_length(features.detach())
    sums = FeatureSums(features.shape[1], classes, weights, device=features.device, dtype=units.dtype)
    model, optimizer, loader = engine.make_private(
        model=sums,
        optimizer=torch.optim.SGD(sums.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(units, labels), batch_size=len(labels)),
        noise_multiplier=noise_multiplier,
        max_grad_norm=sums.sensitivity,
    )
    for rows, classes_of_rows in loader.take(1):
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            optimizer.signal_skip_step(start + _ROWS < len(rows))
            optimizer.backward(feature_sums_loss(model(rows[part]), classes_of_rows[part]))
            optimizer.step()
    return sums.moments(optimizer.mechanism.noise_std(sum(p.numel() for p in sums.parameters())) / len(labels))
