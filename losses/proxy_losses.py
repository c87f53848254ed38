"""Losses between embeddings and proxies.

Shapes: B images, M proxies compared with (all C classes, or those of the batch).
"""

from __future__ import annotations

import torch


def proxy_anchor_loss(
    similarity, targets, alpha=32.0, delta=0.1, reduction="all_classes", num_present=None, others=(0, 0.0)
):
    """Proxy-Anchor loss (Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4).

    For every proxy c, over the images b of its class and over those of other classes,

        positive_c = log(1 + sum_b exp(-alpha * (s[b, c] - delta)))
        negative_c = log(1 + sum_b exp(alpha * (s[b, c] + delta)))

    Args:
        similarity: `(B, M)` cosine similarity of embeddings and proxies.
        targets: `(B,)` int64, the column of each image's class.
        alpha: Scale, > 0.
        delta: Margin.
        reduction: `all_classes` averages both terms over all proxies; `batch_positives` averages the positive term
            over the classes that have an image in the batch, as in the paper.
        num_present: Number of classes in the batch, where known; saves counting them.
        others: How many more proxies there are, none of an image's class, and the sum of their negative terms; see
            [`others_per_class`].

    Returns:
        Scalar, >= 0.
    """
    num_others, other_negatives = others
    num_proxies = similarity.shape[1] + num_others
    own = similarity.gather(1, targets[:, None]).squeeze(1)
    positive = _log1p_sum_exp_by_class(-alpha * (own - delta), targets, similarity.shape[1])
    negative = log1p_sum_exp(_others(alpha * (similarity + delta), targets), dim=0)
    if reduction == "all_classes":
        positives = num_proxies
    elif reduction == "batch_positives":
        positives = num_present if num_present is not None else targets.unique().numel()
    else:
        raise ValueError(f"reduction must be all_classes or batch_positives, got {reduction!r}")
    return positive.sum() / positives + (negative.sum() + other_negatives) / num_proxies


def proxy_nca_loss(similarity, targets, alpha=32.0, delta=0.1, others=None):
    """Proxy-NCA in the masked log-sum-exp form of Proxy-Anchor: sums over proxies per image, mean over images.

        positive_b = log(1 + exp(-alpha * (s[b, y_b] - delta)))
        negative_b = log(1 + sum over proxies c other than y_b of exp(alpha * (s[b, c] + delta)))

    After Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017.

    Args and returns: as for [`proxy_anchor_loss`], but for

        others: `(B,)`, of each image, the log of the sum over further proxies, none of its class, of the exponentials;
            see [`others_per_image`].
    """
    own = similarity.gather(1, targets[:, None])
    positive = log1p_sum_exp(-alpha * (own - delta), dim=1)
    exponents = _others(alpha * (similarity + delta), targets)
    if others is not None:
        exponents = torch.cat([exponents, others[:, None]], dim=1)
    negative = log1p_sum_exp(exponents, dim=1)
    return (positive + negative).mean()


def log1p_sum_exp(exponents, dim):
    """`log(1 + sum(exp(exponents), dim))` without overflow; entries of -inf count for nothing."""
    largest = exponents.detach().amax(dim=dim, keepdim=True).clamp(min=0)
    total = torch.exp(-largest) + torch.exp(exponents - largest).sum(dim=dim, keepdim=True)
    return (total.log() + largest).squeeze(dim)


def _log1p_sum_exp_by_class(exponents, targets, num_classes):
    """`log(1 + sum of exp(exponents))` over the `(B,)` entries of each class, `(num_classes,)`; 0 for absent ones."""
    largest = exponents.new_zeros(num_classes).scatter_reduce(0, targets, exponents.detach(), "amax")
    total = torch.exp(-largest).index_add(0, targets, torch.exp(exponents - largest[targets]))
    return total.log() + largest


def _others(exponents, targets):
    """`(B, M)` with each image's own class masked out."""
    return exponents.scatter(1, targets[:, None], -torch.inf)


__all__ = ["log1p_sum_exp", "proxy_anchor_loss", "proxy_nca_loss"]
