"""Rows that repeat earlier rows, found by keys, against comparing every pair of rows."""

import pytest
import torch
from torch.nn.functional import normalize

from vptsp.eval.neighbours import _KEY_COLUMNS, _find_copies


def slow_copies(gallery):
    first = [min(j for j in range(i + 1) if bool((gallery[j] == gallery[i]).all())) for i in range(len(gallery))]
    copies = [i for i, j in enumerate(first) if i != j]
    return copies, [first[i] for i in copies]


@pytest.mark.parametrize("width", [1, 3, _KEY_COLUMNS, 40])
def test_equals_comparing_all_pairs(width):
    generator = torch.Generator().manual_seed(width)
    for dtype in (torch.float32, torch.float64):
        gallery = normalize(torch.randn(40, width, generator=generator, dtype=dtype), dim=1)
        gallery[torch.randint(0, 40, (20,), generator=generator)] = gallery[:20].clone()
        copies, originals = _find_copies(gallery)
        assert (copies.tolist(), originals.tolist()) == slow_copies(gallery)
        assert len(copies)


def test_rows_that_share_a_key_are_compared_in_full():
    gallery = torch.zeros(6, 100)
    gallery[torch.arange(6), torch.tensor([1, 2, 1, 3, 2, 4])] = 1.0  # no column that keys look at
    copies, originals = _find_copies(gallery)
    assert (copies.tolist(), originals.tolist()) == ([2, 4], [0, 1])


def test_zeros_of_either_sign_are_equal():
    copies, originals = _find_copies(torch.tensor([[1.0, 0.0], [1.0, -0.0], [0.0, 1.0]]))
    assert (copies.tolist(), originals.tolist()) == ([1], [0])
    assert all(not len(part) for part in _find_copies(torch.eye(5)))
