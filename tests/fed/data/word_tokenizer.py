"""A tokenizer of words, and data sets on disk."""

import datasets

from lora_dp.fed.data.encoding import ImageSpec

SPEC = ImageSpec(16, 16, 1, (0.5,), (0.5,))


class Words:
    """A tokenizer of words: its ids are their lengths; it marks which text of a pair a word belongs to.

    Attributes:
        around: what it puts before and after every text that is not cut.
    """

    pad_token_id = 0
    around = ([], [])

    def __call__(
        self, texts, pairs=None, truncation=False, max_length=None, return_attention_mask=True, add_special_tokens=True
    ):
        if max_length is None:
            before, after = self.around if add_special_tokens else ([], [])
            return {"input_ids": [[*before, *(len(word) for word in text.split()), *after] for text in texts]}
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
