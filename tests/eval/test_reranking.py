"""eval/reranking.py against the original formulations, written out slowly."""

import numpy as np
import pytest
import torch

from vptsp import QueryExpansion, Reranking, embedding_metrics, retrieval_metrics, retrieval_scores


def clustered(count, width=8, clusters=6, noise=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % clusters
    centres = torch.randn(clusters, width, generator=generator)
    points = centres[labels] + noise * torch.randn(count, width, generator=generator)
    return torch.nn.functional.normalize(points, dim=1), labels


def k_reciprocal(query, gallery, k1, k2, weight):
    """The authors' released code, row by row, for one query: distances to the gallery."""
    points = np.concatenate([query[None], gallery]).astype(np.float64)
    distance = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
    distance = distance / distance.max(axis=1, keepdims=True)
    total = len(points)
    rank = [sorted(range(total), key=lambda j, i=i: (distance[i, j], j)) for i in range(total)]

    def reciprocal(i, k):
        return {j for j in rank[i][: k + 1] if i in rank[j][: k + 1]}

    vectors = np.zeros((total, total))
    for i in range(total):
        base = reciprocal(i, k1)
        expanded = set(base)
        for candidate in base:
            others = reciprocal(candidate, int(np.around(k1 / 2)))
            if len(others & base) > 2 / 3 * len(others):
                expanded |= others
        for j in expanded:
            vectors[i, j] = np.exp(-distance[i, j])
        vectors[i] /= vectors[i].sum()
    vectors = np.array([np.mean([vectors[j] for j in rank[i][:k2]], axis=0) for i in range(total)])
    result = []
    for j in range(1, total):
        shared = sum(min(a, b) for a, b in zip(vectors[0], vectors[j], strict=True))
        result.append((1 - shared / (2 - shared)) * (1 - weight) + distance[0, j] * weight)
    return np.array(result)


def nearest_first(query, gallery):
    return (gallery.double() @ query.double()).argsort(descending=True, stable=True)


@pytest.mark.parametrize(
    ("count", "k1", "k2", "weight"),
    [
        (40, 6, 3, 0.3),
        (40, 20, 6, 0.3),
        (25, 7, 1, 0.0),
        (30, 5, 4, 0.8),
        (9, 20, 6, 0.3),
        (3, 20, 6, 0.3),
        (1, 2, 2, 0.5),
    ],
)
def test_distances_are_those_of_the_original(count, k1, k2, weight):
    points, _ = clustered(count + 1)
    query, gallery = points[0], points[1:]
    gallery = gallery[nearest_first(query, gallery)]
    got = Reranking(depth=count, k1=k1, k2=k2, weight=weight).distances(query, gallery)
    expected = k_reciprocal(query.numpy(), gallery.numpy(), k1, k2, weight)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-7)


def order_of(query, gallery, allowed, rerank):
    """Gallery rows as a re-ranked search shows them."""
    order = [row for row in nearest_first(query, gallery).tolist() if row in allowed]
    shortlist, rest = order[: rerank.depth], order[rerank.depth :]
    distance = k_reciprocal(query.numpy(), gallery[shortlist].numpy(), rerank.k1, rerank.k2, rerank.weight)
    return [shortlist[place] for place in np.argsort(distance, kind="stable")] + rest


def naive_metrics(orders, query_labels, gallery_labels):
    """Means of Recall@1 and MAP@R of whole orders."""
    recall, precision = [], []
    for order, label in zip(orders, query_labels.tolist(), strict=True):
        hits = [int(gallery_labels[row] == label) for row in order]
        relevant = sum(hits)
        recall.append(hits[0])
        precision.append(sum(hits[i] * sum(hits[: i + 1]) / (i + 1) for i in range(relevant)) / relevant)
    return float(np.mean(recall)), float(np.mean(precision))


@pytest.mark.parametrize("depth", [7, 100])
def test_metrics_are_those_of_the_re_ranked_orders(depth):
    embeddings, labels = clustered(36, noise=0.9)
    rerank = Reranking(depth=depth, k1=5, k2=2)
    everything = set(range(36))
    orders = [order_of(embeddings[i], embeddings, everything - {i}, rerank) for i in range(36)]
    expected = naive_metrics(orders, labels, labels)
    for block_size in (None, 5):
        metrics = retrieval_metrics(embeddings, labels, recall_at=(1,), rerank=rerank, block_size=block_size)
        assert (metrics["recall_at_1"], metrics["map_at_r"]) == pytest.approx(expected)
    assert expected != pytest.approx(
        naive_metrics(
            [order_of(embeddings[i], embeddings, everything - {i}, Reranking(weight=1.0)) for i in range(36)],
            labels,
            labels,
        )
    )


def test_a_gallery_of_its_own_and_what_is_excluded():
    embeddings, labels = clustered(40, noise=0.9)
    queries, gallery = embeddings[:10], embeddings[10:]
    excluded = torch.tensor([[0, 3], [0, 5], [4, 2]])
    rerank = Reranking(depth=12, k1=5, k2=2)
    orders = []
    for row in range(10):
        allowed = set(range(30)) - {item for query, item in excluded.tolist() if query == row}
        orders.append(order_of(queries[row], gallery, allowed, rerank))
    scores = retrieval_scores(queries, labels[:10], gallery, labels[10:], (1,), excluded=excluded, rerank=rerank)
    expected = naive_metrics(orders, labels[:10], labels[10:])
    assert (float(scores["recall_at_1"].mean()), float(scores["map_at_r"].mean())) == pytest.approx(expected)
    alone = retrieval_scores(
        queries[3:5],
        labels[3:5],
        gallery,
        labels[10:],
        (1,),
        excluded=excluded[2:] - torch.tensor([3, 0]),
        rerank=rerank,
    )
    torch.testing.assert_close(alone["map_at_r"], scores["map_at_r"][3:5])  # whatever else is asked with it


def expanded_slowly(row, embeddings, allowed, neighbours, alpha):
    query = embeddings[row].double()
    similarity = {other: float(query @ embeddings[other].double()) for other in allowed}
    total = query.clone()
    for other in sorted(allowed, key=lambda item: (-similarity[item], item))[:neighbours]:
        total += max(similarity[other], 0) ** alpha * embeddings[other].double()
    return total / total.norm()


@pytest.mark.parametrize(("neighbours", "alpha"), [(3, 3.0), (5, 0.0), (100, 1.0)])
def test_expanded_queries(neighbours, alpha):
    embeddings, labels = clustered(30, noise=0.9)
    everything = set(range(30))
    orders = []
    for row in range(30):
        query = expanded_slowly(row, embeddings, everything - {row}, neighbours, alpha)
        orders.append([other for other in nearest_first(query, embeddings).tolist() if other != row])
    metrics = retrieval_metrics(embeddings, labels, recall_at=(1,), expand=QueryExpansion(neighbours, alpha))
    assert (metrics["recall_at_1"], metrics["map_at_r"]) == pytest.approx(naive_metrics(orders, labels, labels))


def test_expansion_comes_before_re_ranking():
    embeddings, labels = clustered(30, noise=0.9)
    rerank, everything = Reranking(depth=9, k1=4, k2=2), set(range(30))
    orders = []
    for row in range(30):
        query = expanded_slowly(row, embeddings, everything - {row}, 4, 2.0).float()
        orders.append(order_of(query, embeddings, everything - {row}, rerank))
    metrics = retrieval_metrics(embeddings, labels, recall_at=(1,), rerank=rerank, expand=QueryExpansion(4, 2.0))
    assert (metrics["recall_at_1"], metrics["map_at_r"]) == pytest.approx(naive_metrics(orders, labels, labels))


def test_weight_one_changes_nothing_and_equal_embeddings_score_chance():
    embeddings, labels = clustered(30)
    plain = retrieval_metrics(embeddings, labels)
    assert retrieval_metrics(embeddings, labels, rerank=Reranking(weight=1.0)) == pytest.approx(plain)
    same = embeddings[:1].repeat(12, 1)
    distance = Reranking().distances(same[0], same[1:])
    assert torch.equal(distance, distance[:1].expand(11))
    metrics = retrieval_metrics(same, labels[:12], rerank=Reranking(k1=20), expand=QueryExpansion())
    assert metrics["recall_at_1"] == pytest.approx(1 / 11)


def test_all_measures_take_both():
    embeddings, labels = clustered(30, noise=0.9)
    options = {"rerank": Reranking(k1=5, k2=2), "expand": QueryExpansion(3)}
    plain, metrics = embedding_metrics(embeddings, labels), embedding_metrics(embeddings, labels, **options)
    expected = retrieval_metrics(embeddings, labels, map_at=(1000,), **options)
    assert {name: metrics[name] for name in expected} == expected != {name: plain[name] for name in expected}
    assert metrics["nmi"] == plain["nmi"]  # of the embeddings themselves


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reranking(depth=0), "rerank: depth must be a whole number >= 1, got 0"),
        (lambda: Reranking(k1=2.5), "rerank: k1 must be a whole number >= 1, got 2.5"),
        (lambda: Reranking(weight=1.5), r"rerank: weight must be in \[0, 1\], got 1.5"),
        (lambda: QueryExpansion(neighbours=True), "expand: neighbours must be a whole number"),
        (lambda: QueryExpansion(alpha=float("nan")), "expand: alpha must be >= 0, got nan"),
        (lambda: Reranking.of_words(["dept=3"]), "rerank takes depth=.*, got 'dept=3'.*depth"),
        (lambda: Reranking.of_words(["50"]), "rerank takes depth=.*, got '50'"),
        (lambda: Reranking.of_words(["k1=3", "k1=4"]), "rerank: k1 was given twice"),
        (lambda: QueryExpansion.of_words(["alpha=x"]), "expand: alpha must be a number, got 'x'"),
        (lambda: QueryExpansion.of_words(["neighbours=2.0"]), "expand: neighbours must be a whole number, got '2.0'"),
    ],
)
def test_refused_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_words():
    assert Reranking.of_words([]) == Reranking()
    assert Reranking.of_words(["depth=5", "weight=0.5"]) == Reranking(depth=5, weight=0.5)
    assert QueryExpansion.of_words(["alpha=2"]) == QueryExpansion(alpha=2.0)
    embeddings, labels = clustered(12)
    with pytest.raises(TypeError, match="rerank must be a Reranking or None, got True"):
        retrieval_metrics(embeddings, labels, rerank=True)
