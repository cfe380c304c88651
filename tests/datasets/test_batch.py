"""What one update trains on."""

import torch

from datasets.batch import one_hot, pixels_to_float


def test_labels_become_one_hot_float():
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    found = one_hot(torch.tensor([2, 0]), 3)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_all_pixel_values_fill_the_range_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    scaled = pixels_to_float(values)
    assert scaled[0] == -1 and scaled[255] == 1 and scaled.dtype == torch.float32
    assert torch.equal(((scaled + 1) * 127.5).round().to(torch.uint8), values)
