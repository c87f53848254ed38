"""Clustering measures of metric learning: NMI and pairwise F1 of k-means with as many clusters as classes.

Shapes: N items, E embedding width. Items whose class has no other item count like all others here: unlike a query,
they can be put into the right cluster.

Both measures compare two partitions and know nothing of names: renaming or reordering classes or clusters changes
nothing. They follow from the counts of (class, cluster) pairs, of which at most N are not zero.
"""

from __future__ import annotations

import torch

from .checks import check_embeddings, check_labelled, check_labels


def kmeans_clusters(embeddings, num_clusters, seed=0, num_starts=1, max_iterations=300, init="k-means++"):
    """Clusters of embeddings by k-means (Euclidean, scikit-learn's `KMeans` by Lloyd's algorithm).

    Where there are no more different embeddings than clusters, each different embedding is a cluster of its own: the
    optimum, which needs no search, and the remaining clusters stay empty. Collapsed embeddings are thus one cluster.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised; clustered in float32, or float64 if given so.
        num_clusters: 1 <= num_clusters <= N.
        seed: Of the starts. With several threads the last bits of sums, and so an item halfway between two clusters,
            may still differ from run to run.
        num_starts: Starts to choose the best of.
        max_iterations: Iterations of each start at most.
        init: `"k-means++"`, or `"random"` items. The former compares every item with about log(clusters) candidates
            for each cluster before the first iteration: with ten thousand clusters that is most of the time.

    Returns:
        `(N,)` int64 on the embeddings' device, values in [0, num_clusters).

    Raises:
        TypeError: embeddings aren't a floating-point tensor.
        ValueError: embeddings are not finite or not L2-normalised, or num_clusters, num_starts, max_iterations or
            init is none of the values above.

    Example:
        >>> clusters = kmeans_clusters(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), num_clusters=2)
        >>> bool(clusters[0] == clusters[2] != clusters[1])
        True
    """
    embeddings = check_embeddings(embeddings, "embeddings").detach()
    for name, value in (("num_starts", num_starts), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if init not in ("k-means++", "random"):
        raise ValueError(f"init must be 'k-means++' or 'random', got {init!r}")
    if not 1 <= num_clusters <= len(embeddings):
        raise ValueError(f"num_clusters must be between 1 and the {len(embeddings)} items, got {num_clusters}")
    values = embeddings.to("cpu", torch.promote_types(embeddings.dtype, torch.float32))
    different, clusters = torch.unique(values, dim=0, return_inverse=True)
    if len(different) > num_clusters:
        from sklearn.cluster import KMeans

        kmeans = KMeans(
            num_clusters, init=init, n_init=num_starts, max_iter=max_iterations, random_state=seed, algorithm="lloyd"
        )
        clusters = torch.from_numpy(kmeans.fit_predict(values.numpy()))
    return clusters.long().to(embeddings.device)


def normalized_mutual_information(labels, clusters):
    """Normalised mutual information of two partitions, with the arithmetic mean of their entropies.

    Manning et al., "Introduction to Information Retrieval", 2008, section 16.3. With p(c, k) the share of items of
    class c in cluster k:

        NMI = 2 * I(C; K) / (H(C) + H(K)),  I = sum over c, k of p(c, k) * log( p(c, k) / (p(c) p(k)) )

    Computed by scikit-learn's `normalized_mutual_info_score` with its default, `average_method="arithmetic"`. Other
    normalisations (geometric, min, max) give other numbers. Not corrected for chance: many small clusters score well
    above 0 even where they are drawn at random.

    Args:
        labels: `(N,)` integer, the classes.
        clusters: `(N,)` integer, any names.

    Returns:
        Float in [0, 1]: 1 if the partitions are equal, also if both are one group; 0 if only one of them is.

    Raises:
        TypeError: labels or clusters aren't integer tensors.
        ValueError: they aren't 1-D, are empty, or differ in length.

    Example:
        >>> normalized_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        1.0
        >>> normalized_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
        0.0
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(*_partitions(labels, clusters)))


def pairwise_f1(labels, clusters):
    """F1 of the pairs of items that share a cluster, against the pairs that share a class.

    Manning et al., "Introduction to Information Retrieval", 2008, section 16.3, with beta = 1; in metric learning
    since Oh Song et al., CVPR 2016. With n(c, k) items of class c in cluster k, and pairs(n) = n (n - 1) / 2:

        TP = sum of pairs(n(c, k)),  precision = TP / sum of pairs(n(k)),  recall = TP / sum of pairs(n(c))
        F1 = 2 * TP / (sum of pairs(n(k)) + sum of pairs(n(c)))

    Counted without forming a pair (scikit-learn's `pair_confusion_matrix`).

    Args:
        labels: `(N,)` integer, the classes.
        clusters: `(N,)` integer, any names.

    Returns:
        Float in [0, 1]: 1 if the partitions are equal, also if all items are alone in both, where there are no pairs.

    Raises:
        TypeError: labels or clusters aren't integer tensors.
        ValueError: they aren't 1-D, are empty, or differ in length.

    Example:
        >>> pairwise_f1(torch.tensor([0, 0, 0, 1]), torch.tensor([7, 7, 3, 3]))  # TP 1, 2 pairs found, 3 to find
        0.4
    """
    from sklearn.metrics.cluster import pair_confusion_matrix

    (_, only_cluster), (only_class, both) = pair_confusion_matrix(*_partitions(labels, clusters))
    return float(2 * both / (2 * both + only_cluster + only_class)) if both + only_cluster + only_class else 1.0


def clustering_metrics(embeddings, labels, seed=0, num_starts=1, max_iterations=300, init="k-means++"):
    """NMI and pairwise F1 of k-means with as many clusters as there are classes.

    Args:
        embeddings: `(N, E)` float of any precision, L2-normalised.
        labels: `(N,)` integer.
        seed, num_starts, max_iterations, init: Of [`kmeans_clusters`].

    Returns:
        Dict with `nmi` and `pairwise_f1`, floats in [0, 1], and the count `num_clusters`.

    Raises:
        TypeError: embeddings aren't a floating-point tensor, or labels aren't an integer tensor.
        ValueError: shapes disagree, or as for [`kmeans_clusters`].

    Example:
        >>> embeddings = torch.eye(3).repeat_interleave(4, dim=0)
        >>> clustering_metrics(embeddings, torch.arange(3).repeat_interleave(4))
        {'nmi': 1.0, 'pairwise_f1': 1.0, 'num_clusters': 3}
    """
    embeddings, labels = check_labelled(embeddings, labels)
    num_clusters = len(labels.unique())
    clusters = kmeans_clusters(embeddings, num_clusters, seed, num_starts, max_iterations, init)
    return {
        "nmi": normalized_mutual_information(labels, clusters),
        "pairwise_f1": pairwise_f1(labels, clusters),
        "num_clusters": num_clusters,
    }


def _partitions(labels, clusters):
    """Both as numpy arrays, checked."""
    labels, clusters = check_labels(labels, "labels"), check_labels(clusters, "clusters")
    if len(labels) != len(clusters):
        raise ValueError(f"labels and clusters must have the same length, got {len(labels)} and {len(clusters)}")
    return labels.cpu().numpy(), clusters.cpu().numpy()


__all__ = ["clustering_metrics", "kmeans_clusters", "normalized_mutual_information", "pairwise_f1"]
