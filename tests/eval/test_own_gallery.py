"""Metrics of items that search one another, by squares: against whole rows, with copies elsewhere, and counted."""

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vptsp import retrieval_scores
from vptsp.eval import metrics, own_gallery
from vptsp.eval.own_gallery import NearestOthers


def make_sets(num_items, width, dtype=torch.float32, num_copies=0, seed=0):
    """Clusters of up to eight, in any order; some rows are copies of others, of any class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_items // 4, (num_items,), generator=generator)
    centres = torch.randn(num_items, width, generator=generator, dtype=dtype)
    embeddings = torch.randn(num_items, width, generator=generator, dtype=dtype) + centres[labels]
    rows = torch.randperm(num_items, generator=generator)
    embeddings[rows[:num_copies]] = embeddings[rows[-1 - torch.arange(num_copies) // 3]]
    return normalize(embeddings, dim=1), labels


def by_whole_rows(*sets, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "SIDE", len(sets[0]))
        return retrieval_scores(*sets, **options)


class CountProducts(TorchDispatchMode):
    """How many similarities matrix products give."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += result.numel() if func.overloadpacket is torch.ops.aten.mm else 0
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [9, 64, 70, 149])
def test_scores_are_those_of_whole_rows(dtype, side):
    sets = make_sets(150, 33, dtype)
    expected = by_whole_rows(*sets)
    for name, values in retrieval_scores(*sets, block_size=side).items():
        assert torch.equal(values.isnan(), expected[name].isnan())
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("num_copies", [12, 60, 150])
@pytest.mark.parametrize("width", [5, 33, 384])
def test_copies_in_other_squares_are_tied(width, num_copies):
    """To the last bit, which products of squares don't promise; the lists of many copies are cut, and go by rows."""
    sets = make_sets(200, width, num_copies=num_copies)
    expected = by_whole_rows(*sets)
    for name, values in retrieval_scores(*sets, block_size=70).items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-12, equal_nan=True)


def test_each_similarity_is_computed_once_for_both():
    sets = make_sets(640, 16)
    with CountProducts() as by_rows:
        by_whole_rows(*sets)
    with CountProducts() as by_squares:
        retrieval_scores(*sets, block_size=64)
    assert by_rows.count >= 640 * 630
    assert by_squares.count == 640 * (640 + 64) / 2


def test_lists_are_the_nearest_and_what_is_in_doubt_is_said():
    embeddings, _ = make_sets(300, 24, torch.float64)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    expected, where = similarity.topk(6 + 8, dim=1)
    nearest = NearestOthers(embeddings, 6, side=77)
    values, items, certain = nearest.rows(torch.arange(300))
    torch.testing.assert_close(values, expected)
    assert torch.equal(items, where) and certain.all()

    embeddings[40:70] = embeddings[40]  # 29 others as near as can be: 14 of them are in a list, which ones is chance
    _, _, certain = NearestOthers(embeddings, 6, side=77).rows(torch.arange(300))
    assert not certain[40:70].any() and certain[70:].sum() > 200


def test_deep_classes_among_others_go_by_rows(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_DEPTH", 20)
    embeddings, labels = make_sets(400, 12)
    labels[100:150] = 399
    expected = by_whole_rows(embeddings, labels)
    with CountProducts() as counted:
        scores = retrieval_scores(embeddings, labels, block_size=40)
    assert counted.count == 400 * 440 / 2 + 50 * 400
    for name, values in scores.items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-12, equal_nan=True)
    with CountProducts() as counted:  # too deep for all
        retrieval_scores(embeddings, labels, block_size=40, map_at=(21,))
    assert counted.count >= 380 * 400


def test_the_bar_counts_each_pair_once(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, disable, **options):
            self.total, self.disable, self.count = total, disable, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def update(self, count):
            self.count += count

    monkeypatch.setattr(own_gallery, "tqdm", Bar)
    monkeypatch.setattr(metrics, "tqdm", Bar)
    sets = make_sets(250, 8)
    quiet = retrieval_scores(*sets, block_size=60)
    told = retrieval_scores(*sets, block_size=60, progress=True)
    assert all(torch.equal(quiet[name].nan_to_num(), values.nan_to_num()) for name, values in told.items())
    assert [bar.disable for bar in bars] == [True, True, False, False]
    assert all(bar.count == bar.total for bar in bars) and bars[0].total == 250 * 249 // 2
