"""Losses that compare the images of a batch with each other: no proxies.

Shapes: B images, E embedding width, T pairs of a query and another image of its class.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecallAtKLoss(nn.Module):
    """Recall@K surrogate loss (Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity
    Mixup", CVPR 2022), without the similarity mixup.

    Every image q is a query against the other images of the batch; P_q are those of its class. With s the cosine
    similarity and sigmoid_t(x) = 1 / (1 + exp(-x / t)) in place of both step functions of Recall@k,

        rank(q, x) = 1 + sum over images z other than q and x of sigmoid_tau2(s[q, z] - s[q, x])
        recall_k(q) = mean over x in P_q of sigmoid_tau1(k - rank(q, x))
        loss = mean over k and q of 1 - recall_k(q)

    This recall is the share of P_q that is found, so with many images of a class and a small k it can't reach 1.

    Args:
        ks: The k, integers >= 1.
        recall_temperature: tau_1, > 0: how soft the border between ranks up to k and those after is.
        rank_temperature: tau_2, > 0: how soft the comparison of two similarities is.

    Raises:
        ValueError: an argument is out of range.
    """

    # Comparisons that are held at once; above, they are made in parts, which are made again in the backward pass.
    max_comparisons = 2**24

    def __init__(self, ks=(1, 2, 4, 8, 16), recall_temperature=1.0, rank_temperature=0.01):
        super().__init__()
        if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
            raise ValueError(f"ks must hold integers >= 1, got {ks!r}")
        for name, value in (("recall_temperature", recall_temperature), ("rank_temperature", rank_temperature)):
            if not 0 < value < math.inf:  # also where it is not a number
                raise ValueError(f"{name} must be > 0, got {value!r}")
        self.ks = tuple(ks)
        self.recall_temperature = recall_temperature
        self.rank_temperature = rank_temperature

    def forward(self, embeddings, labels):
        """Loss of a batch.

        Args:
            embeddings: `(B, E)`, L2-normalised.
            labels: `(B,)` int64.

        Returns:
            Scalar in [0, 1]; 0 where no image has another of its class. Queries without one count for nothing.
        """
        same_class = _pairs_of_a_class(labels)
        queries, positives = same_class.nonzero(as_tuple=True)
        if not len(queries):
            return embeddings.sum() * 0
        similarity = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
        ranks = self._soft_ranks(similarity, queries, positives)
        recall = sum(torch.sigmoid((k - ranks) / self.recall_temperature) for k in self.ks) / len(self.ks)
        num_positives = same_class.sum(dim=1)
        return 1 - (recall / num_positives[queries]).sum() / (num_positives > 0).sum()

    def _soft_ranks(self, similarity, queries, positives):
        """Ranks of T pairs, `(T,)`, from `(B, B)` similarities with a diagonal of -inf."""
        pairs_at_once = max(self.max_comparisons // len(similarity), 1)
        if len(queries) <= pairs_at_once:
            return _soft_ranks(similarity, queries, positives, self.rank_temperature)
        parts = zip(queries.split(pairs_at_once), positives.split(pairs_at_once), strict=True)
        return torch.cat(
            [checkpoint(_soft_ranks, similarity, *part, self.rank_temperature, use_reentrant=False) for part in parts]
        )


def _soft_ranks(similarity, queries, positives, temperature):
    gaps = similarity[queries] - similarity[queries, positives][:, None]
    gaps = gaps.scatter(1, positives[:, None], -torch.inf)  # an image does not compete with itself
    return 1 + torch.sigmoid(gaps / temperature).sum(dim=1)


class HyperbolicLoss(nn.Module):
    """Pairwise cross-entropy in hyperbolic space (Ermolov et al., "Hyperbolic Vision Transformers: Combining
    Improvements in Metric Learning", CVPR 2022).

    Features are clipped to a norm and mapped onto the Poincare ball ([`to_poincare_ball`]); D is the distance
    there ([`poincare_distance`]). For each ordered pair (i, j) of images of one class, with m going over all images
    of the batch but i,

        loss(i, j) = -log(exp(-D(i, j) / tau) / sum over m of exp(-D(i, m) / tau))

    averaged over the pairs. (The released code adds both orders of a pair up, so with two images of each class its
    value is twice this one.)

    Features that are clipped all lie on one sphere, where a larger cosine similarity means a smaller D and the other
    way round: for them, retrieval by cosine similarity ranks as D does.

    Args:
        temperature: tau, > 0.
        curvature: c of the ball, > 0.
        clip_radius: Largest norm of a feature, > 0; `sqrt(c) * clip_radius` must be at most 3, so that float32 can
            tell points from the border of the ball.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, temperature=0.2, curvature=0.1, clip_radius=2.3):
        super().__init__()
        for name, value in (("temperature", temperature), ("curvature", curvature), ("clip_radius", clip_radius)):
            if not 0 < value < math.inf:  # also where it is not a number
                raise ValueError(f"{name} must be > 0, got {value!r}")
        if math.sqrt(curvature) * clip_radius > 3:
            raise ValueError(
                f"sqrt(curvature) * clip_radius must be at most 3, got {math.sqrt(curvature) * clip_radius:.3g}"
            )
        self.temperature = temperature
        self.curvature = curvature
        self.clip_radius = clip_radius

    def forward(self, features, labels):
        """Loss of a batch.

        Args:
            features: `(B, E)`, output of the head before it is normalised.
            labels: `(B,)` int64.

        Returns:
            Scalar, >= 0; 0 where no image has another of its class.
        """
        points = to_poincare_ball(features, self.curvature, self.clip_radius)
        logits = -poincare_distance(points, self.curvature) / self.temperature
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        # not -inf: a batch of one image would have nothing to compare with
        log_shares = torch.log_softmax(logits.masked_fill(itself, torch.finfo(logits.dtype).min), dim=1)
        same_class = _pairs_of_a_class(labels)
        return -torch.where(same_class, log_shares, 0).sum() / same_class.sum().clamp(min=1)


def to_poincare_ball(features, curvature, clip_radius):
    """Points of the Poincare ball: features clipped to a norm, then the exponential map at the origin.

        v = x * min(1, r / ||x||),  exp_0(v) = tanh(sqrt(c) ||v||) v / (sqrt(c) ||v||)

    Ermolov et al., CVPR 2022, section 2.1; the clipping is that of Guo et al., CVPR 2022.

    Args:
        features: `(B, E)`.
        curvature: c, > 0.
        clip_radius: r, > 0.

    Returns:
        `(B, E)`, norms below 1 / sqrt(c).
    """
    norm = features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    scale = math.sqrt(curvature)
    return features * (torch.tanh(scale * norm.clamp(max=clip_radius)) / (scale * norm))


def poincare_distance(points, curvature):
    """Distances between all points of a batch in the Poincare ball (Ermolov et al., CVPR 2022, equations 1 and 2).

        D(x, y) = 2 / sqrt(c) artanh(sqrt(c) ||(-x) (+) y||), where (+) is Moebius addition, so that
        ||(-x) (+) y||^2 = ||x - y||^2 / (1 - 2c <x, y> + c^2 ||x||^2 ||y||^2)

    Args:
        points: `(B, E)`, norms below 1 / sqrt(c).
        curvature: c, > 0.

    Returns:
        `(B, B)`, >= 0; the gradient between equal points is 0.
    """
    # not by inner products: they can't tell near points apart
    straight = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    product = points @ points.T
    squared = product.diagonal()
    # (1 - c<x, y>)^2 + c^2 (||x||^2 ||y||^2 - <x, y>^2): positive inside the ball
    bend = 1 - 2 * curvature * product + curvature**2 * squared[:, None] * squared[None, :]
    scale = math.sqrt(curvature)
    return 2 / scale * torch.atanh(scale * straight / bend.sqrt())


def _pairs_of_a_class(labels):
    """`(B, B)` bool: two different images of one class."""
    return (labels[:, None] == labels[None, :]).fill_diagonal_(False)


__all__ = ["HyperbolicLoss", "RecallAtKLoss", "poincare_distance", "to_poincare_ball"]
