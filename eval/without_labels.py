"""What can be said of embeddings where nobody knows the classes. None of it is a recall.

Shapes: N images, E embedding width.
"""

from __future__ import annotations

from .checks import check_embeddings


def view_agreement(first, second):
    """Share of images whose other view is nearest to them, among the other views of all images.

    Two random crops of a photo are two views. A model that says the same of both, and other things of other photos,
    scores 1. That is what training with random crops asks for, so it rises with tuning whether or not photos of one
    product come together: it can tell a model that got worse, and not how good one is.

    Args:
        first: `(N, E)` float, L2-normalised: one view of each image.
        second: `(N, E)` float: another view of each, in the same order.

    Returns:
        Float in [0, 1]. An image whose other view ties with those of others counts as one in so many.

    Raises:
        TypeError: embeddings aren't floating-point tensors.
        ValueError: they are not L2-normalised, or not as many.

    Example:
        >>> view_agreement(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        0.3333333333333333
    """
    first, second = check_embeddings(first, "first"), check_embeddings(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            f"first and second must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    first, second = first.double(), second.double()
    agreed = 0.0
    for start in range(0, len(first), 1024):
        similarity = first[start : start + 1024] @ second.T
        own = similarity.diagonal(start)[:, None]
        tied = ((similarity - own).abs() <= 1e-12).sum(dim=1)
        nearest = (similarity <= own + 1e-12).all(dim=1)
        agreed += float((nearest / tied).sum())
    return agreed / len(first)


def cluster_stability(first, second):
    """Adjusted Rand index of two clusterings of the same images, of two seeds for instance (Hubert and Arabie, 1985).

    Args:
        first: `(N,)` integer array or tensor.
        second: `(N,)` integer: the other clustering.

    Returns:
        Float, 1 where they are the same, about 0 where they agree by chance.

    Example:
        >>> cluster_stability([0, 0, 1, 1], [1, 1, 0, 0])
        1.0
    """
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(first, second))


__all__ = ["cluster_stability", "view_agreement"]
