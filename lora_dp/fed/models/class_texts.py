"""A new head that begins with texts about the classes: it tells them apart before any example is seen."""

from collections.abc import Sequence

import torch

from lora_dp.fed.data.encoding import InputSpec, TextSpec, text_examples
from lora_dp.fed.data.kept_activations import model_inputs
from lora_dp.fed.models.pooling import TokenMeans
from lora_dp.isolation.trials import modes_kept
from lora_dp.nn.feature_head import FeatureHead
from lora_dp.nn.feature_sums import unit_length

# How far the logits of an example and of its opposite lie apart. Chosen on SST-2 and Banking77, from 5 to 40.
_CERTAINTY = 10.0
_AT_ONCE = 64
# Some tokenizers name no limit of their model's.
_MOST_TOKENS = 512


def texts_of_names(names: Sequence[str]) -> list[str]:
    """The data's own names of classes as texts.

    Raises:
        ValueError: they are numbers.

    >>> texts_of_names(["card_arrival", "Age limit"])
    ['card arrival', 'Age limit']
    """
    if all(name.strip().lstrip("-").isdecimal() for name in names):
        raise ValueError("class_texts are to be the data's names of classes, which are numbers: give texts yourself.")
    return [" ".join(name.replace("_", " ").split()) for name in names]


@torch.no_grad()
def start_from_texts(model: TokenMeans, spec: InputSpec, texts: Sequence[str]) -> None:
    """Begins the head with what the model makes of a text about each class: weights 10·(uₖ − ū)/s, and no bias.

    uₖ is the text's feature at unit length, ū their mean, s the head's scale. The texts and the model are public, so
    that it costs no ε. It is what is called zero-shot classification.

    Args:
        model: an encoder of texts with a feature head, which is changed in place.
        spec: what it takes.
        texts: one for each class, in the order of the labels.

    Raises:
        ValueError: the model takes images; another number of texts than classes.
    """
    head = model.head
    assert isinstance(head, FeatureHead)
    if not isinstance(spec, TextSpec):
        raise ValueError("class_texts are for a model that takes texts: leave them out for images.")
    if len(texts) != head.out_features:
        raise ValueError(
            f"class_texts has {len(texts)} texts, but the data have {head.out_features} classes: give one for each, in "
            "the order of the labels."
        )
    examples = text_examples(list(texts), torch.zeros(len(texts), dtype=torch.long), spec, _MOST_TOKENS)
    with modes_kept(model):
        model.eval()
        called_with = [model_inputs(batch) for batch in examples.batches(_AT_ONCE)]
        units = torch.cat([unit_length(model.features(*args, **named)) for args, named in called_with])
    head.linear.get_parameter("weight").copy_(_CERTAINTY * (units - units.mean(0)) / head.logit_scale)
    head.linear.get_parameter("bias").zero_()
