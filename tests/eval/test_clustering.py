"""Clustering measures against loops over classes, clusters and pairs, and against scikit-learn."""

import doctest
import math
import warnings
from itertools import combinations

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch.nn.functional import normalize

from vptsp.eval import clustering
from vptsp.eval.clustering import clustering_metrics, kmeans_clusters, normalized_mutual_information, pairwise_f1


def slow_nmi(labels, clusters):
    count = len(labels)

    def share(*conditions):
        return sum(all(values[i] == value for values, value in conditions) for i in range(count)) / count

    def entropy(values):
        return math.fsum(-share((values, v)) * math.log(share((values, v))) for v in set(values))

    information = math.fsum(
        both * math.log(both / (share((labels, c)) * share((clusters, k))))
        for c in set(labels)
        for k in set(clusters)
        if (both := share((labels, c), (clusters, k)))
    )
    total = entropy(labels) + entropy(clusters)
    return 2 * information / total if total else 1.0


def slow_pairwise_f1(labels, clusters):
    same = [(labels[i] == labels[j], clusters[i] == clusters[j]) for i, j in combinations(range(len(labels)), 2)]
    found_right = sum(a and b for a, b in same)
    to_find, found = sum(a for a, _ in same), sum(b for _, b in same)
    if not to_find and not found:
        return 1.0
    if not found_right:
        return 0.0
    precision, recall = found_right / found, found_right / to_find
    return 2 * precision * recall / (precision + recall)


def random_partition(generator, count):
    num_groups = int(torch.randint(1, count + 3, (), generator=generator))
    return torch.randint(0, num_groups, (count,), generator=generator)


def test_equal_slow_loops_and_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    for case in range(400):
        count = int(torch.randint(1, 25, (), generator=generator))
        labels, clusters = (random_partition(generator, count) for _ in range(2))
        if case % 7 == 0:
            clusters = labels % 3 if case % 2 else labels * 10**15
        nmi, f1 = normalized_mutual_information(labels, clusters), pairwise_f1(labels, clusters)
        assert 0 <= nmi <= 1
        assert nmi == pytest.approx(slow_nmi(labels.tolist(), clusters.tolist()), abs=1e-12)
        assert nmi == pytest.approx(normalized_mutual_info_score(labels.numpy(), clusters.numpy()), abs=1e-12)
        assert f1 == pytest.approx(slow_pairwise_f1(labels.tolist(), clusters.tolist()), abs=1e-12)
        # neither names nor order nor which is which matter
        order = torch.randperm(count, generator=generator)
        assert normalized_mutual_information(clusters[order] * 3 + 5, labels[order]) == pytest.approx(nmi, abs=1e-12)
        assert pairwise_f1(clusters[order] * 3 + 5, labels[order]) == pytest.approx(f1, abs=1e-12)


def test_partitions_of_one_group_and_of_lone_items():
    one, lone, halves = torch.zeros(6).long(), torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1])
    for partition in (one, lone, halves):
        assert normalized_mutual_information(partition, partition + 9) == 1
        assert pairwise_f1(partition, partition + 9) == 1
    assert normalized_mutual_information(one, lone) == normalized_mutual_information(halves, one) == 0
    assert pairwise_f1(one, lone) == pairwise_f1(lone, halves) == 0
    assert pairwise_f1(halves, one) == pytest.approx(2 * 6 / (6 + 15))
    assert normalized_mutual_information(torch.tensor([4]), torch.tensor([1])) == 1
    assert pairwise_f1(torch.tensor([4]), torch.tensor([1])) == 1


def test_many_items_need_no_memory_for_their_pairs():
    labels = torch.arange(300_000) // 5
    assert pairwise_f1(labels, labels) == 1
    assert pairwise_f1(labels, labels // 2) == pytest.approx(2 * 20 / (45 + 20))
    assert normalized_mutual_information(labels, labels // 2) == pytest.approx(
        2 * math.log(30_000) / (math.log(30_000) + math.log(60_000))
    )


def blobs(generator, num_classes=5, size=12, spread=0.05):
    centres = normalize(torch.randn(num_classes, 16, generator=generator), dim=1)
    labels = torch.arange(num_classes).repeat_interleave(size)
    return normalize(centres[labels] + spread * torch.randn(len(labels), 16, generator=generator), dim=1), labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_k_means_finds_classes_that_lie_apart(dtype, init):
    embeddings, labels = blobs(torch.Generator().manual_seed(2))
    embeddings = normalize(embeddings.to(dtype).double(), dim=1).to(dtype)
    got = clustering_metrics(embeddings, labels + 3, num_starts=20, init=init)
    assert got == pytest.approx({"nmi": 1.0, "pairwise_f1": 1.0, "num_clusters": 5})


def test_k_means_follows_from_the_seed_and_measures_are_of_its_clusters():
    embeddings, labels = blobs(torch.Generator().manual_seed(3), num_classes=9, spread=0.5)
    first = kmeans_clusters(embeddings, 9, seed=1)
    assert first.equal(kmeans_clusters(embeddings, 9, seed=1))
    assert first.dtype == torch.int64
    assert sorted(first.unique().tolist()) == list(range(9))
    assert any(not first.equal(kmeans_clusters(embeddings, 9, seed=seed)) for seed in range(2, 6))
    got = clustering_metrics(embeddings, labels, seed=1)
    assert 0.1 < got["nmi"] == normalized_mutual_information(labels, first) < 1
    assert got["pairwise_f1"] == pairwise_f1(labels, first)

    def inertia(clusters):
        return sum(
            float((part - part.mean(0)).square().sum()) for part in map(embeddings.__getitem__, masks(clusters))
        )

    def masks(clusters):
        return [clusters == k for k in clusters.unique()]

    assert inertia(kmeans_clusters(embeddings, 9, seed=1, num_starts=20)) <= inertia(first) + 1e-4
    assert inertia(first) < inertia(labels[torch.randperm(len(labels))])


def test_no_more_different_embeddings_than_clusters():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collapsed = torch.eye(4)[:1].expand(10, 4)
        got = clustering_metrics(collapsed, torch.arange(10) // 5)
        assert got == {"nmi": 0.0, "pairwise_f1": pytest.approx(2 * 20 / (45 + 20)), "num_clusters": 2}
        assert kmeans_clusters(collapsed, 10).tolist() == [0] * 10
        assert sorted(kmeans_clusters(torch.eye(4), 4).tolist()) == [0, 1, 2, 3]
        # one item per class, and all items in one class
        assert clustering_metrics(torch.eye(4), torch.arange(4))["nmi"] == 1
        assert clustering_metrics(torch.eye(4), torch.zeros(4).long()) == {
            "nmi": 1.0,
            "pairwise_f1": 1.0,
            "num_clusters": 1,
        }


def test_takes_embeddings_that_carry_gradients():
    embeddings = normalize(torch.randn(8, 3, requires_grad=True), dim=1)
    assert not kmeans_clusters(embeddings, 3).requires_grad
    assert clustering_metrics(embeddings, torch.arange(8) // 2)["num_clusters"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clusters": 4}, "num_clusters must be between 1 and the 3 items, got 4"),
        ({"num_clusters": 0}, "got 0"),
        ({"num_starts": 0}, "num_starts must be >= 1, got 0"),
        ({"max_iterations": 0}, "max_iterations must be >= 1, got 0"),
        ({"init": "best"}, r"init must be 'k-means\+\+' or 'random', got 'best'"),
        ({"embeddings": 2 * torch.eye(3)}, "must be L2-normalised"),
    ],
)
def test_k_means_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        kmeans_clusters(**{"embeddings": torch.eye(3), "num_clusters": 2, **changes})


@pytest.mark.parametrize("measure", [normalized_mutual_information, pairwise_f1])
def test_measures_refuse(measure):
    with pytest.raises(ValueError, match="must have the same length, got 3 and 2"):
        measure(torch.arange(3), torch.arange(2))
    with pytest.raises(TypeError, match=r"clusters must be an integer tensor, got torch.float32"):
        measure(torch.arange(3), torch.ones(3))
    with pytest.raises(ValueError, match="labels must be a 1-D tensor that is not empty"):
        measure(torch.arange(0), torch.arange(0))
    with pytest.raises(ValueError, match="labels must have one label per embedding, 3, got 2"):
        clustering_metrics(torch.eye(3), torch.arange(2))
    with pytest.raises(TypeError, match="embeddings must be a floating-point tensor, got list"):
        clustering_metrics([[1.0]], torch.arange(1))


def test_examples_in_the_documentation():
    results = doctest.testmod(clustering)
    assert results.attempted > 5
    assert results.failed == 0
