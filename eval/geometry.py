"""Geometry of an embedding space: distances within and between classes, and the decay of its singular values.

After Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric Learning", ICML 2020,
section 5, with distances that have closed forms. Shapes: N items, E embedding width, C classes.

None of these measures says how good a retriever is. They describe how it uses its space: how dense classes are against
the room between them, and over how many directions the embeddings spread. All sums are taken in float64, over blocks
of rows.
"""

from __future__ import annotations

import math

import torch

from .checks import check_embeddings, check_labelled


_BLOCK_ROWS = 16384

# Distances of unit vectors below this are rounding of equal ones.
_ROUNDING = 64 * torch.finfo(torch.float64).eps


def intra_class_distance(embeddings, labels):
    """Root mean square distance of two items of one class.

    Over all pairs i < j of items of the same class, of all classes together, with n items and mean m in class c:

        intra^2 = 1/pairs * sum over pairs of |x_i - x_j|^2
                = sum over classes of n * sum over items of |x_i - m|^2  /  sum over classes of n (n - 1) / 2

    Every pair counts the same, so a class weighs by its pairs. Roth et al. average the distance itself, which takes
    every pair to be formed; the root mean square takes O(N E), is never below that average, and for unit vectors is
    `sqrt(2 - 2 * mean cosine similarity of the pairs)`. Classes of one have no pairs and are left out.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        labels: `(N,)` integer.

    Returns:
        Float in [0, 2]. 0 if each class is one point.

    Raises:
        TypeError: embeddings aren't a floating-point tensor, or labels aren't an integer tensor.
        ValueError: shapes disagree, embeddings are not finite or not L2-normalised, or no class has two items.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> intra_class_distance(embeddings, torch.tensor([0, 0, 1]))
        2.0
    """
    return _intra(*_class_means(*check_labelled(embeddings, labels)))


def inter_class_distance(embeddings, labels):
    """Root mean square distance of the means of two classes.

    Over all pairs of different classes, each class once whatever its size, with m_c the mean of class c (not
    normalised again) and m their mean over classes:

        inter^2 = 2 / (C (C - 1)) * sum over pairs of |m_c - m_d|^2 = 2 / (C - 1) * sum over classes of |m_c - m|^2

    Roth et al. average the distance itself. Classes of one count.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        labels: `(N,)` integer.

    Returns:
        Float in [0, 2]. 0 if all classes have the same mean, as collapsed embeddings do.

    Raises:
        TypeError: embeddings aren't a floating-point tensor, or labels aren't an integer tensor.
        ValueError: shapes disagree, embeddings are not finite or not L2-normalised, or there is only one class.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> inter_class_distance(embeddings, torch.tensor([0, 0, 1]))  # the means are (0, 0) and (0, 1)
        1.0
    """
    means, _, _ = _class_means(*check_labelled(embeddings, labels))
    return _inter(means)


def class_distances(embeddings, labels):
    """Distances within and between classes and their ratio, in one pass.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        labels: `(N,)` integer.

    Returns:
        Dict of floats: `intra_class_distance` and `inter_class_distance` as of the functions of these names, and
        `intra_inter_ratio`, the former divided by the latter: small where classes are dense and far apart. If all
        classes have the same mean, the ratio is infinite, or NaN if there is no distance within classes either.

    Raises:
        TypeError, ValueError: as for [`intra_class_distance`] and [`inter_class_distance`].

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> class_distances(embeddings, torch.tensor([0, 0, 1]))["intra_inter_ratio"]
        2.0
    """
    means, counts, squares = _class_means(*check_labelled(embeddings, labels))
    intra, inter = _intra(means, counts, squares), _inter(means)
    ratio = intra / inter if inter else math.inf if intra else math.nan
    return {"intra_class_distance": intra, "inter_class_distance": inter, "intra_inter_ratio": ratio}


def spectral_decay(embeddings, direction="spectrum_to_uniform"):
    """Spectral decay rho: KL divergence between the normalised singular values and the uniform distribution.

    With s_1 ... s_E the singular values of the `(N, E)` embeddings (not centred; zeros where N < E), divided by their
    sum, and u_i = 1 / E:

        "spectrum_to_uniform":  KL(s || u) = sum of s_i * log(s_i * E) = log E - entropy of s
        "uniform_to_spectrum":  KL(u || s) = -1/E * sum of log(s_i * E)

    The former is the divergence of the singular values *from* uniform: exp(log E - rho) is the number of directions
    that the embeddings effectively use. The latter is the one of Roth et al.; it is governed by the smallest singular
    values and infinite as soon as one is 0, as for fewer items than dimensions. Neither bounds the other.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        direction: Which of the two.

    Returns:
        Float in nats. 0 if all directions are used alike; at most log E in the former direction, which collapsed
        embeddings reach. Singular values at the level of float64's rounding count as 0.

    Raises:
        TypeError: embeddings aren't a floating-point tensor.
        ValueError: embeddings are not finite or not L2-normalised, or direction is neither of the two.

    Example:
        >>> spectral_decay(torch.eye(4))
        0.0
        >>> round(spectral_decay(torch.eye(4)[:1].expand(9, 4)), 6)  # log 4
        1.386294
    """
    if direction not in ("spectrum_to_uniform", "uniform_to_spectrum"):
        raise ValueError(f"direction must be 'spectrum_to_uniform' or 'uniform_to_spectrum', got {direction!r}")
    embeddings = check_embeddings(embeddings, "embeddings").detach()
    width = embeddings.shape[1]
    factor = embeddings.new_zeros(0, width, dtype=torch.float64)
    for block in embeddings.split(_BLOCK_ROWS):  # the factor R of a QR decomposition has the same singular values
        factor = torch.linalg.qr(torch.cat([factor, block.double()]), mode="r").R
    values = torch.linalg.svdvals(factor)
    values[values <= values[0] * max(embeddings.shape) * torch.finfo(values.dtype).eps] = 0
    shares = torch.nn.functional.pad(values / values.sum(), (0, width - len(values)))
    if direction == "uniform_to_spectrum":
        rho = -(shares * width).log().mean()
    else:
        rho = torch.special.xlogy(shares, shares * width).sum()
    return max(rho.item(), 0.0)


def geometry_metrics(embeddings, labels):
    """Distances within and between classes, their ratio, and spectral decay.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        labels: `(N,)` integer.

    Returns:
        Dict of floats: those of [`class_distances`], and `spectral_decay` in its default direction.

    Raises:
        TypeError, ValueError: as for [`class_distances`].

    Example:
        >>> list(geometry_metrics(torch.eye(4), torch.tensor([0, 0, 1, 1])))
        ['intra_class_distance', 'inter_class_distance', 'intra_inter_ratio', 'spectral_decay']
    """
    return {**class_distances(embeddings, labels), "spectral_decay": spectral_decay(embeddings)}


def _class_means(embeddings, labels):
    """Mean of each class, `(C, E)`, its size, and its sum of squared distances to the mean, `(C,)`; all float64."""
    classes, position, counts = labels.unique(return_inverse=True, return_counts=True)
    means = embeddings.new_zeros(len(classes), embeddings.shape[1], dtype=torch.float64)
    squares = means.new_zeros(len(classes))
    blocks = list(zip(embeddings.split(_BLOCK_ROWS), position.split(_BLOCK_ROWS), strict=True))
    for block, where in blocks:
        means.index_add_(0, where, block.double())
    means /= counts[:, None]
    for block, where in blocks:  # a second pass, as the difference of two large sums would lose small distances
        squares.index_add_(0, where, (block.double() - means[where]).square().sum(1))
    return means, counts.double(), squares


def _intra(means, counts, squares):
    num_pairs = (counts * (counts - 1)).sum() / 2
    if not num_pairs:
        raise ValueError(f"intra-class distance needs a class with two items, got {len(counts)} classes of one")
    return _root((counts * squares).sum() / num_pairs)


def _inter(means):
    if len(means) < 2:
        raise ValueError("inter-class distance needs two classes, got one")
    return _root(2 * (means - means.mean(0)).square().sum() / (len(means) - 1))


def _root(mean_square):
    distance = mean_square.sqrt().item()
    return distance if distance > _ROUNDING else 0.0


__all__ = [
    "class_distances",
    "geometry_metrics",
    "inter_class_distance",
    "intra_class_distance",
    "spectral_decay",
]
