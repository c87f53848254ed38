"""Clusters in place of labels: compared with brute force and with naive loops."""

import itertools

import numpy as np
import pytest

from vptsp.training import photo_clusters
from vptsp.training.photo_clusters import (
    ClusterPlan,
    choose_number,
    cluster_photos,
    follow_clusters,
    linked_groups,
    whitened,
)


def normalised(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def blobs(count, size, width=16, noise=0.05, seed=0):
    """`count` groups of `size` embeddings, in order of the groups."""
    rng = np.random.default_rng(seed)
    centres = normalised(rng.normal(size=(count, width)))
    return normalised(np.repeat(centres, size, axis=0) + noise * rng.normal(size=(count * size, width)))


def partition(labels):
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist()) - {-1}}


def test_whitened_is_the_definition():
    values = normalised(np.random.default_rng(0).normal(size=(50, 8)) * np.linspace(5, 0.1, 8))
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred / 49)
    expected = normalised(centred @ directions[:, -3:] / np.sqrt(variances[-3:]))
    actual = whitened(values, 3)
    # up to order and signs of the components, which distances don't see
    assert np.allclose(actual @ actual.T, expected @ expected.T, atol=1e-4)
    assert whitened(values, 64).shape == (50, 6)  # a direction for 8 photos
    assert np.allclose(whitened(values[:15], 64), values[:15])
    assert np.allclose(whitened(values, 0), values)
    assert np.isfinite(whitened(np.tile(values[:1], (50, 1)), 4)).all()
    flat = np.tile(values[:10, :3], (5, 1))
    assert whitened(flat, 6).shape == (50, 3)


def test_linked_groups_are_chains():
    embeddings = normalised(np.array([[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1], [-1, 0], [-1, 0.01]]))
    near = linked_groups(embeddings, link_similarity=0.99)
    reach = embeddings @ embeddings.T >= 0.99
    for _ in range(6):  # transitive closure
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    assert np.array_equal(near[:, None] == near[None], reach)
    grouped = linked_groups(embeddings, np.array([7, -1, -1, 7, -1, -1]), link_similarity=0.99)
    assert grouped[0] == grouped[3] == grouped[2] != grouped[4]
    assert linked_groups(embeddings).tolist() == list(range(6))


@pytest.mark.parametrize("clustering", ["kmeans", "faiss"])
@pytest.mark.parametrize("dims", [0, 64])
def test_kmeans_finds_the_groups_that_there_are(dims, clustering):
    labels = cluster_photos(blobs(6, 5), ClusterPlan(clustering, num_clusters=6, dims=dims))
    assert partition(labels) == {frozenset(range(5 * i, 5 * i + 5)) for i in range(6)}
    assert labels[:1] == [0]  # numbered by the first photo
    again = cluster_photos(blobs(6, 5), ClusterPlan(clustering, num_clusters=6, dims=dims))
    assert np.array_equal(labels, again)


def test_the_number_is_found():
    assert choose_number(blobs(12, 10, noise=0.02), np.ones(120, dtype=int)) == 12
    assert choose_number(blobs(6, 20, noise=0.02), np.ones(120, dtype=int)) == 6
    assert choose_number(blobs(2, 1), np.ones(2, dtype=int)) == 2


def test_photos_that_belong_together_share_a_cluster():
    embeddings = blobs(6, 5)
    groups = np.full(30, -1)
    groups[[0, 29]] = 3  # of two blobs
    labels = cluster_photos(embeddings, ClusterPlan(num_clusters=6, dims=0), groups)
    assert labels[0] == labels[29]
    free = cluster_photos(embeddings, ClusterPlan(num_clusters=6, dims=0))
    assert free[0] != free[29]


def test_classes_that_are_given_stay():
    embeddings = blobs(6, 5)
    given = np.full(30, -1)
    given[:3], given[5:7] = 1, 0
    groups = np.full(30, -1)
    groups[[0, 4]] = 0  # a photo without a class beside one of class 1
    labels = cluster_photos(embeddings, ClusterPlan(num_clusters=4, dims=0), groups, given, num_given=2)
    assert (labels[given >= 0] == given[given >= 0]).all()
    assert labels[4] == 1
    others = np.delete(labels, [0, 1, 2, 4, 5, 6])
    assert set(others.tolist()) == {2, 3, 4, 5}
    groups[[0, 5]] = 9
    with pytest.raises(ValueError, match=r"photos 0 \(class 1\) and 5 \(class 0\) belong together"):
        cluster_photos(embeddings, ClusterPlan(num_clusters=4), groups, given)
    with pytest.raises(ValueError, match="nothing to cluster: every photo has a class"):
        cluster_photos(embeddings, ClusterPlan(num_clusters=4), None, np.zeros(30, dtype=int))


def test_places_weigh_as_many_photos_as_they_have():
    """Two places of many photos and two of one: each heavy one is a centre, and the light ones are near the second."""
    places = np.array([[0.0, 0.0], [4.0, 0.0], [4.5, 0.0], [4.2, 0.0]], dtype=np.float32)
    for kmeans in (photo_clusters._kmeans, photo_clusters._faiss_kmeans):
        clusters, centres = kmeans(places, np.array([50, 60, 1, 1]), 2, seed=0)
        assert clusters[1] == clusters[2] == clusters[3] != clusters[0]
        mean = (60 * 4.0 + 4.5 + 4.2) / 62
        assert np.allclose(centres[clusters[1]], [mean, 0], atol=1e-4)


@pytest.mark.parametrize("clustering", ["kmeans", "faiss"])
def test_the_number_is_found_by_either(clustering):
    labels = cluster_photos(blobs(12, 10, noise=0.02), ClusterPlan(clustering, dims=0))
    assert labels.max() + 1 == 12


@pytest.mark.parametrize("clustering", ["kmeans", "faiss"])
def test_the_farthest_are_left_out(clustering):
    embeddings = blobs(4, 10)
    labels = cluster_photos(embeddings, ClusterPlan(clustering, num_clusters=4, dims=0, keep=0.75))
    assert (labels < 0).sum() == 10
    everything = cluster_photos(embeddings, ClusterPlan(clustering, num_clusters=4, dims=0))
    centres = np.stack([embeddings[everything == label].mean(axis=0) for label in range(4)])
    away = np.linalg.norm(embeddings - centres[everything], axis=1)
    assert set(np.flatnonzero(labels < 0)) == set(np.argsort(away)[-10:])


def test_outliers_are_not_forced_in():
    embeddings = blobs(4, 12, noise=0.02)
    embeddings = np.concatenate([embeddings, normalised(-embeddings.sum(axis=0, keepdims=True))])  # far from all
    labels = cluster_photos(embeddings, ClusterPlan("hdbscan", dims=0))
    assert partition(labels) == {frozenset(range(12 * i, 12 * i + 12)) for i in range(4)}
    assert labels[48] == -1


def test_instances():
    groups = np.array([0, -1, 0, -1])
    assert cluster_photos(blobs(4, 1), ClusterPlan("instances"), groups).tolist() == [0, 1, 0, 2]


def test_more_clusters_than_photos():
    with pytest.raises(ValueError, match="clusters must be at most the 30 photos or groups to cluster, got 31"):
        cluster_photos(blobs(6, 5), ClusterPlan(num_clusters=31))
    with pytest.raises(ValueError, match="min_cluster_size must be <= 30, the photos or groups, got 40"):
        cluster_photos(blobs(6, 5), ClusterPlan("hdbscan", min_size=40))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_given", [0, 2])
def test_clusters_follow_those_that_share_most(seed, num_given):
    rng = np.random.default_rng(seed)
    old, new = (4, 5) if seed % 2 else (5, 4)
    given = np.where(np.arange(40) < 6, np.arange(40) % num_given, -1) if num_given else np.full(40, -1)

    def clustering(count):
        labels = rng.integers(-1, count, 40)
        labels[6 : 6 + count] = np.arange(count)
        return np.where(given >= 0, given, np.where(labels >= 0, labels + num_given, -1))

    before, after = clustering(old), clustering(new)
    labels, source, moved = follow_clusters(before, after, num_given)
    overlap = np.zeros((new, old), dtype=int)
    for a, b in zip(after - num_given, before - num_given, strict=True):
        if a >= 0 and b >= 0:
            overlap[a, b] += 1
    wide = overlap if new <= old else overlap.T
    best = max(
        sum(wide[row, column] for row, column in enumerate(columns))
        for columns in itertools.permutations(range(wide.shape[1]), wide.shape[0])
    )
    assert partition(labels) == partition(after)
    assert source[:num_given].tolist() == list(range(num_given))
    assert len(set(source[source >= 0])) == (source >= 0).sum()  # nobody is followed twice
    stays = sum(b >= num_given and source[a] == b for a, b in zip(labels, before, strict=True) if a >= num_given)
    assert stays == best
    unmoved = sum(
        (a == b == -1) or (a >= 0 and b >= 0 and source[a] == b) for a, b in zip(labels, before, strict=True)
    )
    assert moved == 40 - unmoved
    for number, earlier in enumerate(source):
        if num_given <= earlier < len(source):
            assert number == earlier  # numbers stay where they can


def test_equal_clusterings_stay_as_they_are():
    before = np.array([0, 0, 1, 1, 2, -1])
    labels, source, moved = follow_clusters(before, np.array([2, 2, 0, 0, 1, -1]))
    assert labels.tolist() == before.tolist()
    assert source.tolist() == [0, 1, 2]
    assert moved == 0
