"""Views of images: each a shift of its own image, drawn from torch's generator, in the order of the examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dp.fed.data.augmentation import Views


def images(count: int, height: int = 16, width: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 2, height, width, generator=generator).to(dtype)
    return {"pixel_values": pixels, "labels": torch.arange(count)}


def place_of(view: Tensor, image: Tensor) -> tuple[int, int, bool]:
    """By how much the view is shifted from its image, and whether it is mirrored."""
    height, width = image.shape[-2:]
    down, right = height // 8, width // 8
    padded = F.pad(image.double().unsqueeze(0), (right, right, down, down), mode="replicate")[0]
    found = [
        (y, x, mirrored)
        for y in range(2 * down + 1)
        for x in range(2 * right + 1)
        for mirrored in (False, True)
        if torch.equal(padded[:, y : y + height, x : x + width], (view.flip(-1) if mirrored else view).double())
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_view_is_a_shift_of_its_own_image(mirror, dtype):
    torch.manual_seed(0)
    batch = images(3, dtype=dtype)
    views = Views(40, mirror)(batch)
    assert views["pixel_values"].shape == (120, 2, 16, 24) and views["pixel_values"].dtype == dtype
    assert views["labels"].tolist() == [0] * 40 + [1] * 40 + [2] * 40
    places = [
        place_of(view, batch["pixel_values"][label])
        for view, label in zip(views["pixel_values"], views["labels"].tolist(), strict=True)
    ]
    assert {y for y, _, _ in places} == set(range(5)) and {x for _, x, _ in places} == set(range(7))
    assert {mirrored for *_, mirrored in places} == ({False, True} if mirror else {False})


def test_one_view_is_the_batch_itself():
    batch = images(2)
    assert Views()(batch) is batch


def test_draws_follow_torchs_generator():
    batch, found = images(2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(Views(5)(batch)["pixel_values"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_nobody_has_no_views():
    assert {name: len(tensor) for name, tensor in Views(3)(images(0)).items()} == {"pixel_values": 0, "labels": 0}


def test_rows_are_gathered_and_spread_in_the_same_order():
    views, rows = Views(3), torch.randn(12, 2, 5)
    gathered = views.gathered(rows)
    assert gathered.shape == (4, 3, 2, 5) and torch.equal(gathered[1, 2], rows[5])
    spread = views.spread({"pixel_values": gathered, "labels": torch.arange(4)})
    assert torch.equal(spread["pixel_values"], rows) and spread["labels"].tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        2,
        2,
        2,
        3,
        3,
        3,
    ]
