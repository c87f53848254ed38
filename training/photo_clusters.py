"""Clusters of photos that take the place of classes: how they are found, and which follows which from round to round.

Pure functions of arrays. Shapes: n photos, E embedding width, D whitened components, C clusters; -1 is no cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


CLUSTERINGS = ("kmeans", "faiss", "hdbscan", "instances")
_SILHOUETTE_PHOTOS = 2000
_PHOTOS_PER_DIMENSION = 8
_CANDIDATE_SIZES = (56, 40, 28, 20, 14, 10, 7, 5)  # mean photos of a cluster, among which one is chosen
_GOOD_ENOUGH = 0.8  # of the best silhouette, which goes on rising slowly where clusters are blurred


class MixedGroupError(ValueError):
    """Photos that belong together have two classes.

    Attributes:
        photos: Numbers of two of them.
        classes: Theirs.
    """

    def __init__(self, photos, classes):
        self.photos, self.classes = photos, classes
        super().__init__(self.named(photos, classes))

    @staticmethod
    def named(photos, classes) -> str:
        """The message, with names of two photos and of their classes."""
        (photo, other), (own, others) = photos, classes
        return (
            f"the photos {photo} (class {own}) and {other} (class {others}) belong together, by their group or their "
            "likeness: photos that do must have one class"
        )


@dataclass(frozen=True)
class ClusterPlan:
    """How photos are clustered.

    Attributes:
        clustering: `kmeans` (scikit-learn's), `faiss` (k-means too, for 100,000 photos and more), `hdbscan` (photos
            that lie in no dense place are left out) or `instances` (each photo, or each group of photos that belong
            together, is a cluster).
        num_clusters: Of k-means; None to choose by the silhouette.
        min_size: Photos of a cluster of `hdbscan` at least.
        dims: Whitened principal components that distances are measured in; 0: the embeddings as they are.
        keep: Share of the photos, those nearest their centre, that k-means leaves in.
        link_similarity: Photos at least as similar (cosine) are kept together; None: none.
        seed: Of k-means.
    """

    clustering: str = "kmeans"
    num_clusters: int | None = None
    min_size: int = 5
    dims: int = 64
    keep: float = 1.0
    link_similarity: float | None = None
    seed: int = 0


def whitened(embeddings, dims):
    """Principal components of embeddings, each divided by its deviation, L2-normalised.

    What sets photos of one product apart from those of another has often little variance beside backdrop and light;
    whitening gives each direction the same say (Jegou and Chum, "Negative evidences and co-occurrences in image
    retrieval", ECCV 2012).

    Args:
        embeddings: `(n, E)` float.
        dims: D, at most; no more than one for 8 photos, since in as many directions as there are photos each is as far
            from all others. 0 gives them as they are, and so do less than 16 photos.

    Returns:
        `(n, D)` float32, L2-normalised.
    """
    from sklearn.decomposition import PCA

    values = np.asarray(embeddings, dtype=np.float32)
    dims = min(dims, len(values) // _PHOTOS_PER_DIMENSION)
    if dims > 1:
        values = np.asarray(values, dtype=np.float64)
        most = np.linalg.matrix_rank(values - values.mean(axis=0))
        if most:
            values = PCA(min(dims, int(most)), whiten=True, svd_solver="full").fit_transform(values)
    return (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def linked_groups(embeddings, groups=None, link_similarity=None):
    """Photos that must share a cluster.

    Args:
        embeddings: `(n, E)` float, L2-normalised.
        groups: `(n,)` int64, photos of a number belong together, -1 to none; None: nothing is known.
        link_similarity: Photos at least as similar (cosine) belong together too, and so do chains of them.

    Returns:
        `(n,)` int64, numbers from 0, by first photo.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    count = len(embeddings)
    starts, ends = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    if groups is not None:
        known = np.flatnonzero(groups >= 0)
        _, first, inverse = np.unique(groups[known], return_index=True, return_inverse=True)
        starts.append(known)
        ends.append(known[first][inverse])
    if link_similarity is not None:
        for start in range(0, count, 1024):
            near = np.nonzero(embeddings[start : start + 1024] @ embeddings.T >= link_similarity)
            starts.append(near[0] + start)
            ends.append(near[1])
    pairs = np.concatenate(starts), np.concatenate(ends)
    graph = coo_matrix((np.ones(len(pairs[0]), dtype=np.int8), pairs), shape=(count, count))
    return _numbered(connected_components(graph, directed=False)[1])


def cluster_photos(embeddings, plan, groups=None, given=None, num_given=None):
    """Clusters of photos, beside classes that are given.

    Args:
        embeddings: `(n, E)` float, L2-normalised.
        plan: [`ClusterPlan`].
        groups: As for [`linked_groups`].
        given: `(n,)` int64, the class of a photo whose class is known, else -1; None: no class is known.
        num_given: Number of these classes; None: as many as occur.

    Returns:
        `(n,)` int64: classes as given, then the clusters, without a gap; -1 for photos that are left out.

    Raises:
        MixedGroupError: photos of two classes belong together.
        ValueError: there are fewer photos (or groups) than clusters asked for, or nothing is clustered.
    """
    linked = linked_groups(np.asarray(embeddings), groups, plan.link_similarity)
    given = np.full(len(linked), -1, dtype=np.int64) if given is None else np.asarray(given)
    class_of = class_of_groups(linked, given)
    labels = class_of[linked]
    free = np.flatnonzero(class_of < 0)  # groups to cluster
    if not len(free):
        raise ValueError("there is nothing to cluster: every photo has a class")
    places = whitened(embeddings, plan.dims)
    sizes = np.bincount(linked)
    sums = np.zeros((len(sizes), places.shape[1]), dtype=np.float64)
    np.add.at(sums, linked, places)
    centres = (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    found = _clusters_of(centres[free], sizes[free], plan)
    clusters = np.full(len(sizes), -1, dtype=np.int64)
    clusters[free] = found
    chosen = labels < 0
    labels[chosen] = clusters[linked[chosen]]
    inside = chosen & (labels >= 0)
    if inside.any():
        first = int(given.max(initial=-1)) + 1 if num_given is None else num_given
        labels[inside] = _numbered(labels[inside]) + first
    return labels


def class_of_groups(linked, given):
    """The class of each group that has a photo of one, else -1.

    Args:
        linked: `(n,)` int64, the group of each photo, as [`linked_groups`] gives it.
        given: `(n,)` int64, its class, or -1.

    Raises:
        MixedGroupError: a group has photos of two classes.
    """
    class_of = np.full(linked.max(initial=-1) + 1, -1, dtype=np.int64)
    known = given >= 0
    class_of[linked[known]] = given[known]
    if (wrong := np.flatnonzero(known & (class_of[linked] != given))).size:
        photo = int(wrong[0])
        other = int(np.flatnonzero((linked == linked[photo]) & known & (given != given[photo]))[0])
        raise MixedGroupError((photo, other), (int(given[photo]), int(given[other])))
    return class_of


def _clusters_of(places, sizes, plan):
    """Clusters of groups at `places`, each of as many photos as `sizes` says; -1 for none."""
    if plan.clustering == "instances":
        return np.arange(len(places))
    if plan.clustering == "hdbscan":
        from sklearn.cluster import HDBSCAN

        if len(places) < plan.min_size:
            raise ValueError(f"min_cluster_size must be <= {len(places)}, the photos or groups, got {plan.min_size}")
        return HDBSCAN(min_cluster_size=plan.min_size, cluster_selection_method="leaf", copy=True).fit_predict(places)
    kmeans = {"kmeans": _kmeans, "faiss": _faiss_kmeans}[plan.clustering]
    count = plan.num_clusters or choose_number(places, sizes, plan.seed, kmeans)
    if count > len(places):
        raise ValueError(f"clusters must be at most the {len(places)} photos or groups to cluster, got {count}")
    clusters, centres = kmeans(places, sizes, count, plan.seed)
    if plan.keep < 1:
        away = np.linalg.norm(places - centres[clusters], axis=1)
        order = np.argsort(away, kind="stable")
        left_out = order[np.cumsum(sizes[order]) > plan.keep * sizes.sum()]
        clusters[left_out] = -1
    return clusters


def _kmeans(places, sizes, count, seed):
    """The cluster of each place, and the clusters' centres."""
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=1, random_state=seed).fit(places, sample_weight=sizes.astype(places.dtype))
    return fitted.labels_.astype(np.int64), fitted.cluster_centers_


def _faiss_kmeans(places, sizes, count, seed):
    import faiss
    from sklearn.cluster import kmeans_plusplus

    places, weights = np.ascontiguousarray(places, dtype=np.float32), sizes.astype(np.float32)
    # faiss begins with random photos, which finds far worse clusters than those that scikit-learn begins with.
    begin, _ = kmeans_plusplus(places, count, sample_weight=weights, random_state=seed)
    # All photos take part, which faiss otherwise draws 256 of for each cluster; and it does not say on its own terms
    # that clusters are small, as they are here.
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(places)}
    kmeans = faiss.Kmeans(places.shape[1], count, niter=25, seed=seed, gpu=faiss.get_num_gpus() > 0, **limits)
    kmeans.train(places, weights=weights, init_centroids=begin)
    return kmeans.assign(places)[1].astype(np.int64), kmeans.centroids


def choose_number(places, sizes, seed=0, kmeans=_kmeans):
    """The least number of clusters at which k-means has four fifths of the best silhouette (Rousseeuw, 1987).

    Args:
        places: `(n, D)` float32, what is clustered.
        sizes: `(n,)` integer, photos at each place.
        seed: Of k-means.
        kmeans: Gives clusters and centres of places, sizes, a number and a seed.

    Returns:
        One of the numbers that give clusters of 56, 40, 28, 20, 14, 10, 7 and 5 photos on average; 2 at least.
    """
    from sklearn.metrics import silhouette_score

    counts = sorted({max(round(len(places) / size), 2) for size in _CANDIDATE_SIZES})
    counts = [count for count in counts if count < len(places)] or [min(2, len(places))]
    if len(counts) == 1:
        return counts[0]
    sample = min(_SILHOUETTE_PHOTOS, len(places))
    scores = []
    for count in counts:
        clusters, _ = kmeans(places, sizes, count, seed)
        different = len(np.unique(clusters))
        usable = 1 < different < sample
        scores.append(silhouette_score(places, clusters, sample_size=sample, random_state=seed) if usable else -1.0)
    enough = max(scores) * (_GOOD_ENOUGH if max(scores) > 0 else 1)
    return next(count for count, score in zip(counts, scores, strict=True) if score >= enough)


def _numbered(values):
    """Numbers from 0 by first occurrence, so that they don't depend on what an algorithm calls its clusters."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def follow_clusters(before, after, num_given=0):
    """Which cluster goes on which, by the photos that they share: the assignment with most in all (Hungarian).

    Args:
        before: `(n,)` int64, class or cluster of each photo in the round before, -1 for none.
        after: `(n,)` int64, now; numbers from `num_given`, without a gap.
        num_given: Classes that are given, which stay what they are.

    Returns:
        labels: `after` with clusters renumbered: one that goes on an earlier one has its number, where that is below
            the new number of clusters.
        source: `(C,)` int64, for each class or cluster now, the one before that it goes on; -1 where it is new.
        moved: How many photos are no longer where they were, in going out or coming in among them.
    """
    from scipy.optimize import linear_sum_assignment

    old_count, count = int(before.max(initial=-1)) + 1, int(after.max(initial=-1)) + 1
    overlap = np.zeros((max(count, num_given), max(old_count, num_given)), dtype=np.int64)
    shared = (before >= num_given) & (after >= num_given)
    np.add.at(overlap, (after[shared], before[shared]), 1)
    new, old = linear_sum_assignment(overlap[num_given:, num_given:], maximize=True)
    new, old = new + num_given, old + num_given
    pairs = [(a, b) for a, b in zip(new.tolist(), old.tolist(), strict=True) if overlap[a, b]]
    number = np.full(len(overlap), -1, dtype=np.int64)
    number[:num_given] = np.arange(num_given)
    for a, b in pairs:
        if b < len(overlap):
            number[a] = b
    free = np.setdiff1d(np.arange(len(overlap)), number)
    number[number < 0] = free
    source = np.full(len(overlap), -1, dtype=np.int64)
    source[:num_given] = np.arange(num_given)
    for a, b in pairs:
        source[number[a]] = b
    labels = np.where(after >= 0, number[after], -1)
    from_where = np.where(labels >= 0, source[labels], -1)
    stays = (from_where == before) & ((labels < 0) | (from_where >= 0))
    return labels, source, int((~stays).sum())


__all__ = [
    "CLUSTERINGS",
    "ClusterPlan",
    "MixedGroupError",
    "choose_number",
    "class_of_groups",
    "cluster_photos",
    "follow_clusters",
    "linked_groups",
    "whitened",
]
