"""Data of the federation, opened: the built-in digits, or whatever ``datasets`` opens.

Two steps, because the model needs the number of classes and the data need the model's input format:

    raw = open_data(config)                                       # nothing encoded yet
    loaded = load_model(model_config, raw.num_labels, raw.kind)
    splits = encode(raw, loaded.spec)

The names and number of classes are taken to be public.
"""

import numpy as np
from PIL import Image

from lora_dp.extras import needing
from lora_dp.fed.data.encoding import RawData
from lora_dp.fed.data.options import DataConfig
from lora_dp.fed.data.partition import hold_out


def open_data(config: DataConfig) -> RawData:
    """Opens the data set and finds its splits, input column, label column and classes.

    Integer and string labels become 0, 1, … in sorted order of the train split's values. Where no split is there to
    evaluate on, some of train is held out.

    Raises:
        ValueError: data set, split or column missing or not recognised; no examples; labels not classes.
    """
    if config.dataset == "digits":
        return _open_digits(config)
    with needing(f"the data set {config.dataset}", "fed"):
        from lora_dp.fed.data.datasets import open_dataset  # a second to import, which the digits do not need

    return open_dataset(config)


def _open_digits(config: DataConfig) -> RawData:
    with needing("the data set digits", "fed"):
        from sklearn.datasets import load_digits  # a second to import

    digits = load_digits()
    # their grey levels run from 0 to 16
    images = [Image.fromarray(pixels) for pixels in np.rint(digits.images * (255 / 16)).astype(np.uint8)]
    train, held_out = hold_out(digits.target, config)
    return RawData(
        kind="image",
        label_names=[str(name) for name in digits.target_names],
        train_inputs=[images[row] for row in train],
        train_labels=digits.target[train],
        validation_inputs=[images[row] for row in held_out],
        validation_labels=digits.target[held_out],
        max_length=config.max_length,
    )
