"""Losses in extreme regimes, where the plain formulas overflow, and on hand-computed cases."""

import math

import pytest
import torch

from vptsp.losses.proxy_losses import log1p_sum_exp, proxy_anchor_loss, proxy_nca_loss


def test_proxy_anchor_by_hand():
    similarity = torch.tensor([[0.5, 0.2, -0.1], [0.4, 0.9, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    alpha, delta = 2.0, 0.1
    positive = math.log(1 + math.exp(-2 * 0.4)) + math.log(1 + math.exp(-2 * 0.8))
    negative = (
        math.log(1 + math.exp(2 * 0.5))
        + math.log(1 + math.exp(2 * 0.3))
        + math.log(1 + math.exp(2 * 0.0) + math.exp(2 * 0.1))
    )
    loss = proxy_anchor_loss(similarity, targets, alpha, delta)
    assert loss.item() == pytest.approx(positive / 3 + negative / 3, rel=1e-12)
    loss = proxy_anchor_loss(similarity, targets, alpha, delta, "batch_positives")
    assert loss.item() == pytest.approx(positive / 2 + negative / 3, rel=1e-12)


def test_proxy_nca_by_hand():
    similarity = torch.tensor([[0.5, 0.2, -0.1]], dtype=torch.float64)
    positive = math.log(1 + math.exp(-2 * 0.4))
    negative = math.log(1 + math.exp(2 * 0.3) + math.exp(2 * 0.0))
    assert proxy_nca_loss(similarity, torch.tensor([0]), 2.0, 0.1).item() == pytest.approx(positive + negative)


@pytest.mark.parametrize("loss", [proxy_anchor_loss, proxy_nca_loss])
def test_no_overflow_at_large_scale(loss):
    similarity = torch.tensor([[-1.0, 1.0, 0.0], [1.0, -1.0, 0.5]], requires_grad=True)
    value = loss(similarity, torch.tensor([0, 1]), alpha=1000.0)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(similarity.grad).all()
    assert value.item() > 1000


def test_class_without_other_images_has_no_negative_term():
    similarity = torch.zeros(2, 1, requires_grad=True)
    loss = proxy_anchor_loss(similarity, torch.tensor([0, 0]), alpha=2.0, delta=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(0.2)))
    assert torch.isfinite(similarity.grad).all()


def test_batch_positives_counts_classes_that_repeat():
    similarity = torch.randn(4, 5, dtype=torch.float64)
    targets = torch.tensor([3, 1, 3, 1])
    counted = proxy_anchor_loss(similarity, targets, reduction="batch_positives")
    told = proxy_anchor_loss(similarity, targets, reduction="batch_positives", num_present=2)
    torch.testing.assert_close(counted, told)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="reduction must be all_classes or batch_positives, got 'sum'"):
        proxy_anchor_loss(torch.zeros(1, 2), torch.tensor([0]), reduction="sum")


def test_log1p_sum_exp():
    exponents = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(log1p_sum_exp(exponents, dim=0), exponents.exp().sum(0).log1p())
    assert log1p_sum_exp(torch.full((3,), -torch.inf), dim=0) == 0
