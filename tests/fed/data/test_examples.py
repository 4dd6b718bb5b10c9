import pytest
import torch
from torch.utils.data import DataLoader

from lora_dp.fed.data.examples import ImageExamples, TextExamples

LENGTHS = [3, 9, 1, 20]


def images() -> ImageExamples:
    pixels = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8)
    return ImageExamples(pixels, torch.arange(6) % 3, [0.1, 0.2, 0.3], [0.5, 0.25, 1.0])


def texts() -> TextExamples:
    ids = torch.full((4, 20), 7, dtype=torch.int32)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[:length] = torch.arange(100, 100 + length)
    return TextExamples(ids, torch.tensor(LENGTHS), torch.tensor([0, 1, 0, 1]), pad_id=7)


def test_images_are_normalised_per_channel():
    examples = images()
    batch = examples.batch([4, 1])
    expected = (examples._pixels[[4, 1]] / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.25, 1.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [1, 1]
    assert batch["labels"].dtype == torch.int64


def test_a_batch_of_texts_is_padded_to_a_multiple_of_8_and_no_further():
    examples = texts()
    assert examples.batch([0, 2])["input_ids"].shape == (2, 8)
    assert examples.batch([1])["input_ids"].shape == (1, 16)
    # the store itself ends at 20
    assert examples.batch([3])["input_ids"].shape == (1, 20)
    batch = examples.batch([0, 1])
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["input_ids"][0].tolist() == [100, 101, 102] + [7] * 13


@pytest.mark.parametrize("make", [images, texts])
def test_a_batch_of_none_keeps_its_shape(make):
    for tensor in make().batch([]).values():
        assert tensor.shape[0] == 0


@pytest.mark.parametrize("make", [images, texts])
def test_subsets_of_subsets_pick_the_right_examples_and_share_memory(make):
    examples = make()
    part = examples.subset([3, 2, 0]).subset(torch.tensor([2, 0]))
    assert len(part) == 2
    for name, tensor in part.batch([0, 1]).items():
        assert torch.equal(tensor, examples.batch([0, 3])[name])
    assert torch.equal(part.labels, examples.labels[[0, 3]])
    assert part._labels.data_ptr() == examples._labels.data_ptr()


@pytest.mark.parametrize("make", [images, texts])
def test_one_by_one_or_at_once_gives_the_same_batch(make):
    examples = make()
    at_once = examples.collate(examples.__getitems__([1, 0]))
    one_by_one = examples.collate([examples[1], examples[0]])
    assert at_once.keys() == one_by_one.keys()
    for name, tensor in at_once.items():
        assert torch.equal(tensor, one_by_one[name])
    with pytest.raises(IndexError):
        examples[len(examples)]


@pytest.mark.parametrize("make", [images, texts])
def test_a_data_loader_fetches_whole_batches(make, monkeypatch):
    examples = make()
    monkeypatch.setattr(type(examples), "__getitem__", None)
    loader = DataLoader(examples, batch_size=3, collate_fn=examples.collate)
    assert torch.cat([batch["labels"] for batch in loader]).equal(examples.labels)
    assert torch.cat([batch["labels"] for batch in examples.batches(4)]).equal(examples.labels)
