"""Re-ranking and query expansion in searches: the same as in evaluation, and right with every filter."""

import pytest
import torch

from vptsp import MilvusIndex, QueryExpansion, Reranking, RetrievalIndex, retrieval_metrics


COUNT = 60
RERANK, EXPAND = Reranking(depth=15, k1=5, k2=2), QueryExpansion(neighbours=3, alpha=2.0)
ORDERS = {
    "rerank": {"rerank": RERANK},
    "expand": {"expand": EXPAND},
    "both": {"rerank": RERANK, "expand": EXPAND},
}


def make_points(seed=0, noise=0.8):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(COUNT) % 5
    points = torch.randn(5, 8, generator=generator)[labels] + noise * torch.randn(COUNT, 8, generator=generator)
    return torch.nn.functional.normalize(points, dim=1), labels


POINTS, LABELS = make_points()
QUERIES = make_points(seed=1)[0][:6]
IDS = [f"item {row}" for row in range(COUNT)]
METADATA = {"class_name": [f"class {label}" for label in LABELS.tolist()], "price": [row % 7 for row in range(COUNT)]}


def build(rows=range(COUNT), how=RetrievalIndex.build, place=()):
    rows = list(rows)
    columns = {name: [values[row] for row in rows] for name, values in METADATA.items()}
    return how(*place, [IDS[row] for row in rows], POINTS[rows], columns)


@pytest.fixture(scope="module", params=["faiss", "milvus"])
def index(request, tmp_path_factory):
    if request.param == "faiss":
        yield build()
        return
    pytest.importorskip("milvus_lite")
    index = build(how=MilvusIndex.build, place=(f"{tmp_path_factory.mktemp('milvus')}/a.db",))
    yield index
    index.close()


def ids_of(results):
    return [[hit.id for hit in hits] for hits in results]


def slow_order(query, rows, rerank=None, expand=None):
    """Rows in the order of a search among them, and their similarities; the formulas are tested by themselves."""
    near = (POINTS[rows] @ query).argsort(descending=True, stable=True)
    if expand is not None:
        chosen = POINTS[rows][near[: expand.neighbours]]
        query = expand.expand(query[None], (chosen @ query)[None], chosen[None])[0]
        near = (POINTS[rows] @ query).argsort(descending=True, stable=True)
    if rerank is not None:
        first = near[: rerank.depth]
        distance = rerank.distances(query, POINTS[rows][first])
        near = torch.cat([first[distance.argsort(stable=True)], near[rerank.depth :]])
    rows = torch.tensor(rows, dtype=torch.int64)[near]
    return rows.tolist(), (POINTS[rows] @ query).tolist()


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("k", [4, 15, 40])
def test_the_order_is_that_of_the_slow_computation(index, name, k):
    for query, hits in zip(QUERIES, index.search(QUERIES, k, **ORDERS[name]), strict=True):
        rows, similarity = slow_order(query, list(range(COUNT)), **ORDERS[name])
        assert [hit.id for hit in hits] == [IDS[row] for row in rows[:k]]
        assert [hit.similarity for hit in hits] == pytest.approx(similarity[:k], abs=1e-5)
    assert ids_of(index.search(QUERIES, k, **ORDERS[name])) != ids_of(index.search(QUERIES, k))


@pytest.mark.parametrize("name", ORDERS)
def test_an_item_as_query_is_not_among_its_own_neighbours(index, name):
    asked = [3, 17, 44]
    found = index.search_ids([IDS[row] for row in asked], 59, **ORDERS[name])
    for row, hits in zip(asked, found, strict=True):
        others = [other for other in range(COUNT) if other != row]
        assert [hit.id for hit in hits] == [IDS[other] for other in slow_order(POINTS[row], others, **ORDERS[name])[0]]


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("where", [["price<3"], ["class_name=class 2"], ["class_name=class 2", "price>100"]])
def test_a_filter_is_a_search_in_an_index_of_what_passes(index, name, where):
    passing = set(index.ids_where(where))
    rows = [row for row in range(COUNT) if IDS[row] in passing]
    found = index.search(QUERIES, 10, where, **ORDERS[name])
    assert ids_of(found) == [
        [IDS[row] for row in slow_order(query, rows, **ORDERS[name])[0][:10]] for query in QUERIES
    ]
    if rows:
        assert ids_of(found) == ids_of(build(rows).search(QUERIES, 10, **ORDERS[name]))


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("k", [3, 20])
def test_least_similarity_and_groups_are_taken_of_the_order(index, name, k):
    options = {"min_similarity": 0.35, "group_by": "price"}
    for query, hits, few in zip(
        QUERIES,
        index.search(QUERIES, k, **options, **ORDERS[name]),
        index.search(QUERIES, k, min_similarity=0.35, **ORDERS[name]),
        strict=True,
    ):
        rows, similarity = slow_order(query, list(range(COUNT)), **ORDERS[name])
        similar = [row for row, value in zip(rows, similarity, strict=True) if value >= 0.35]
        assert [hit.id for hit in few] == [IDS[row] for row in similar[:k]]
        firsts = {}
        for row in similar:
            firsts.setdefault(METADATA["price"][row], row)
        assert [hit.id for hit in hits] == [IDS[row] for row in list(firsts.values())[:k]]


@pytest.mark.parametrize("name", ORDERS)
def test_an_evaluation_scores_what_a_search_finds(name):
    found = build().search_ids(IDS, 1, **ORDERS[name])
    right = [
        hits[0].metadata["class_name"] == f"class {label}" for hits, label in zip(found, LABELS.tolist(), strict=True)
    ]
    metrics = retrieval_metrics(POINTS, LABELS, recall_at=(1,), **ORDERS[name])
    assert metrics["recall_at_1"] == pytest.approx(sum(right) / COUNT)


def test_what_is_refused(index, monkeypatch):
    with pytest.raises(TypeError, match="rerank must be a Reranking or None, got 'yes'"):
        index.search(QUERIES, 3, rerank="yes")
    with pytest.raises(TypeError, match="expand must be a QueryExpansion or None"):
        index.search_ids(IDS[:1], 3, expand=RERANK)
    monkeypatch.setattr(type(index), "max_results", 20)
    with pytest.raises(ValueError, match="rerank: depth must be at most 20 in this index, got 30"):
        index.search(QUERIES, 3, rerank=Reranking(depth=30))
    assert len(index.search_ids(IDS[:1], 3, rerank=Reranking(depth=19))[0]) == 3


def test_find_items(index):
    hits = index.find_items([IDS[7], IDS[2]])
    assert [hit.id for hit in hits] == [IDS[7], IDS[2]]
    assert hits[0].metadata == {name: values[7] for name, values in METADATA.items()}
    with pytest.raises(ValueError, match="1 ids are not in the index"):
        index.find_items(["none"])
