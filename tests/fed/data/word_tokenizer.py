"""A tokenizer of words, and data sets on disk."""

import datasets

from lora_dp.fed.data.encoding import ImageSpec

SPEC = ImageSpec(16, 16, 1, (0.5,), (0.5,))


class Words:
    """A tokenizer of words: its ids are their lengths; it marks which text of a pair a word belongs to."""

    pad_token_id = 0

    def __call__(self, texts, pairs, truncation, max_length, return_attention_mask):
        assert truncation and not return_attention_mask
        if pairs is None:
            return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}
        words = [(a.split(), b.split()) for a, b in zip(texts, pairs, strict=True)]
        return {
            "input_ids": [[len(word) for word in a + b][:max_length] for a, b in words],
            "token_type_ids": [([0] * len(a) + [1] * len(b))[:max_length] for a, b in words],
        }


def write(folder, features=None, **splits):
    """A folder of one parquet file a split, from columns."""
    folder.mkdir(exist_ok=True)
    for name, columns in splits.items():
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def write_texts(folder, labels, **more):
    return write(folder, train={"text": [f"text {i}" for i in range(len(labels))], "label": labels, **more})
