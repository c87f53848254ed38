"""Agreement of views and stability of clusters, against naive loops."""

import pytest
import torch

from vptsp.eval.without_labels import cluster_stability, view_agreement


def test_view_agreement_is_the_naive_count():
    torch.manual_seed(3)
    first = torch.nn.functional.normalize(torch.randn(1300, 6), dim=1)
    second = torch.nn.functional.normalize(first + 0.2 * torch.randn(1300, 6), dim=1)
    hits = 0
    for row in range(1300):
        similarity = second.double() @ first[row].double()
        hits += int(similarity.argmax()) == row
    assert 0.2 < hits / 1300 < 0.8
    assert view_agreement(first, second) == pytest.approx(hits / 1300, abs=1e-12)


def test_equal_embeddings_score_chance():
    same = torch.nn.functional.normalize(torch.ones(8, 3), dim=1)
    assert view_agreement(same, same) == pytest.approx(1 / 8)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must have the same shape, got \(3, 3\) and \(2, 3\)"):
        view_agreement(torch.eye(3), torch.eye(3)[:2])


def test_cluster_stability():
    assert cluster_stability([0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1]) == 1.0
    # Hubert and Arabie by hand: one of three pairs is in both; expected 3 * 3 / 15
    first, second = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 1, 2])
    assert cluster_stability(first, second) == pytest.approx((1 - 0.6) / (3 - 0.6))
