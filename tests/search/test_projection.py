"""Shorter, whitened and quantised indexes against NumPy; their files, and what is refused."""

import json

import numpy as np
import pytest
import torch

from vptsp import DataError, Projection, QueryExpansion, Reranking, RetrievalIndex, evaluate_stores, retrieval_metrics
from vptsp.search import index as index_module
from vptsp.search.sync import update_index_from_store


WIDTH, COUNT = 12, 120


def make_points(count=COUNT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2, 0.2, WIDTH)
    points = torch.randn(6, WIDTH, generator=generator)[torch.arange(count) % 6] + torch.randn(
        count, WIDTH, generator=generator
    )
    return torch.nn.functional.normalize(points * scale + 0.3, dim=1)


POINTS, QUERIES = make_points(), make_points(10, seed=1)
IDS = [f"item {row}" for row in range(COUNT)]
CLASSES = {"class_name": [f"class {row % 6}" for row in range(COUNT)]}
KINDS = [("pca", 5), ("whiten", 5), ("whiten", None), ("truncate", 5)]


def projected(kind, dim, points):
    """By NumPy's eigenvectors of the covariance of all points."""
    base, points = POINTS.double().numpy(), points.double().numpy()
    if kind == "truncate":
        result = points[:, :dim]
    else:
        values, vectors = np.linalg.eigh(np.cov(base.T, bias=True))
        values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
        result = (points - base.mean(0)) @ vectors / (np.sqrt(values) if kind == "whiten" else 1)
    return result / np.linalg.norm(result, axis=1, keepdims=True)


def build(rows=slice(None), **options):
    return RetrievalIndex.build(IDS[rows], POINTS[rows], {"class_name": CLASSES["class_name"][rows]}, **options)


def ids_of(results):
    return [[hit.id for hit in hits] for hits in results]


def nearest(similarity, k=7):
    return [[IDS[row] for row in np.argsort(-values, kind="stable")[:k]] for values in similarity]


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_similarities_are_those_of_what_numpy_projects(kind, dim):
    gallery, queries = projected(kind, dim, POINTS), projected(kind, dim, QUERIES)
    np.testing.assert_allclose(
        Projection.learn(kind, POINTS, dim)(POINTS).numpy() @ Projection.learn(kind, POINTS, dim)(QUERIES).numpy().T,
        gallery @ queries.T,
        atol=2e-4,
    )
    index = build(projection=kind, dim=dim)
    results = index.search(QUERIES, 7)
    assert ids_of(results) == nearest(queries @ gallery.T)
    assert results[0][0].similarity == pytest.approx(float((queries @ gallery.T)[0].max()), abs=2e-4)
    own = gallery @ gallery.T
    np.fill_diagonal(own, -np.inf)
    assert ids_of(index.search_ids(IDS, 7)) == nearest(own)
    info = index.info
    assert (info.embedding_dim, info.projection["dim"], info.projection["num_items"]) == (WIDTH, dim or WIDTH, COUNT)
    assert index.find_items([IDS[4]])[0].id == IDS[4]


def test_the_variance_that_is_kept():
    values = np.linalg.eigvalsh(np.cov(POINTS.double().numpy().T))[::-1]
    variance = build(projection="pca", dim=4).info.projection["variance"]
    assert variance == pytest.approx(values[:4].sum() / values.sum(), rel=1e-4)
    assert build(projection="truncate", dim=4).info.projection["variance"] is None


@pytest.mark.parametrize("quantise", [None, "int8", "binary"])
@pytest.mark.parametrize("mmap", [False, True])
def test_saved_opened_added_to_removed_from(quantise, mmap, tmp_path):
    index = build(slice(100), projection="whiten", dim=6, quantise=quantise)
    index.add(IDS[100:], POINTS[100:], {"class_name": CLASSES["class_name"][100:]})
    index.remove(IDS[3:9])
    index.add(IDS[5:7], POINTS[5:7], {"class_name": CLASSES["class_name"][5:7]})
    index.save(tmp_path / "index")
    opened = RetrievalIndex.open(tmp_path / "index", mmap=mmap)
    assert (opened.info.projection, opened.info.quantise) == (index.info.projection, quantise)
    orders = {"rerank": Reranking(depth=20, k1=5, k2=2), "expand": QueryExpansion(3)}
    for options in ({}, {"where": ["class_name=class 2"]}, {"group_by": "class_name"}, orders):
        found = index.search(QUERIES, 6, **options)
        assert opened.search(QUERIES, 6, **options) == found
        assert not {hit.id for hits in found for hit in hits} & {*IDS[3:5], *IDS[7:9]}
    assert IDS[5] in {hit.id for hit in index.search(POINTS[5:6], 3)[0]}
    learned = Projection.learn("whiten", POINTS[:100], 6)  # what is added later changes nothing of it
    torch.testing.assert_close(
        opened.embeddings_of(IDS[110:112]), learned(POINTS[110:112]), atol=0.1 if quantise else 1e-5, rtol=0
    )


def int8_codes(base, points):
    """Values as faiss's 8 bits keep them, each column between its least and its largest."""
    base, points = base.numpy(), points.numpy()
    low, span = base.min(0), base.max(0) - base.min(0)
    codes = np.floor(255 * ((points - low) / span).clip(0, 1))
    return low + (codes + 0.5) / 255 * span


def test_int8_scores_whole_queries_with_rounded_items():
    index = build(quantise="int8")
    similarity = QUERIES.numpy() @ int8_codes(POINTS, POINTS).T
    results = index.search(QUERIES, 7)
    assert ids_of(results) == nearest(similarity)
    assert [hit.similarity for hit in results[0]] == pytest.approx(np.sort(similarity[0])[::-1][:7].tolist(), abs=1e-5)
    assert (index.info.factory, index.is_exact, index.info.recall_at_10 > 0.9) == ("SQ8", False, True)


def test_binary_rescores_what_it_finds_by_the_int8_values(monkeypatch):
    index = build(quantise="binary", target_recall=1.0)
    factor = int(index.info.effort.removeprefix("k_factor "))
    similarity = QUERIES.numpy() @ int8_codes(POINTS, POINTS).T
    found = index.search(QUERIES, 7)
    for hits, values in zip(found, similarity, strict=True):
        expected = dict(zip(IDS, values.tolist(), strict=True))
        assert [hit.similarity for hit in hits] == pytest.approx([expected[hit.id] for hit in hits], abs=1e-5)
        assert sorted(hits, key=lambda hit: -hit.similarity) == hits
    assert factor > 1  # bits alone don't find them
    index_module.rescoring_of(index._index).k_factor = COUNT  # all of them scored anew
    assert ids_of(index.search(QUERIES, 7)) == nearest(similarity)
    where = ["class_name=class 1"]
    rows = list(range(1, COUNT, 6))
    expected = [[IDS[rows[int(IDS.index(name))]] for name in names] for names in nearest(similarity[:, rows])]
    assert ids_of(index.search(QUERIES, 7, where)) == expected
    monkeypatch.setattr(index_module, "_COMPARE_ALL", 0)  # through faiss's own filter
    assert ids_of(index.search(QUERIES, 7, where)) == expected
    assert len(index.search(QUERIES, 50, where)[0]) == len(rows)


def test_quantised_lists_and_graphs():
    assert build(factory="IVF3,Flat", quantise="int8").info.factory == "IVF3,SQ8"
    graph = build(factory="HNSW8", quantise="int8")
    assert graph.info.factory == "HNSW8_SQ8"
    assert graph.search(POINTS[:1], 1)[0][0].id == IDS[0]


def test_an_index_of_an_older_version_opens(tmp_path):
    index = build()
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    values = json.loads(path.read_text())
    del values["projection"], values["quantise"]
    path.write_text(json.dumps(values))
    opened = RetrievalIndex.open(tmp_path / "index")
    assert (opened.info.projection, opened.info.quantise) == (None, None)
    assert opened.search(QUERIES, 5) == index.search(QUERIES, 5)


@pytest.mark.parametrize(
    "change", [{"projection": None}, {"projection": {"kind": "pca", "dim": 5}}, {"embedding_dim": 9}]
)
def test_a_record_that_does_not_fit_the_file_is_refused(change, tmp_path):
    build(projection="pca", dim=4).save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="projection"):
        RetrievalIndex.open(tmp_path / "index")
    plain = build()
    plain.save(tmp_path / "plain")
    path = tmp_path / "plain" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection": {"kind": "pca", "dim": 4}}))
    with pytest.raises(DataError, match="can't be read: it holds no projection"):
        RetrievalIndex.open(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "pcaa", "dim": 3}, "projection must be one of pca, whiten, truncate, got 'pcaa'.*pca"),
        ({"projection": "pca"}, "projection 'pca' needs dim"),
        ({"dim": 3}, "dim goes with projection, got dim 3 alone"),
        ({"projection": "truncate", "dim": 13}, "dim must be in 1 to 12, .*, got 13"),
        ({"quantise": "int4"}, "quantise must be one of int8, binary, got 'int4'"),
        ({"quantise": "binary", "factory": "IVF2,Flat"}, "quantise 'binary' goes with factory Flat, got 'IVF2,Flat'"),
        ({"quantise": "int8", "factory": "PQ4"}, "quantise 'int8' goes with factory Flat, .*, got 'PQ4'"),
        ({"quantise": "int8", "memory_gb": 1e-9}, "memory_gb: 120 items take .* with int8"),
        ({"quantise": "binary", "memory_gb": 1e-9}, "memory_gb: 120 items take .* with binary"),
        ({"factory": "PCAW4,Flat"}, "projection='whiten' and dim do that"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_refused_embeddings():
    with pytest.raises(ValueError, match="projection 'whiten' to dim 12 is learned from more than 12 items, got 12"):
        build(slice(12), projection="whiten")
    flat = torch.nn.functional.normalize(make_points()[:, :2], dim=1)
    flat = torch.cat([flat, torch.zeros(COUNT, 4)], dim=1)
    with pytest.raises(ValueError, match="dim must be at most 2 here: the 120 embeddings vary in no more directions"):
        RetrievalIndex.build(IDS, flat, CLASSES, projection="whiten", dim=3)
    index = RetrievalIndex.build(IDS, flat, CLASSES, projection="truncate", dim=2)
    last = torch.eye(6)[5:]
    with pytest.raises(ValueError, match="nothing is left of 1 embeddings after the projection, rows 0"):
        index.search(last, 3)
    with pytest.raises(ValueError, match="nothing is left"):
        index.add(["new"], last, {"class_name": ["x"]})
    assert len(index) == COUNT
    with pytest.raises(ValueError, match="width 6, got 2"):
        index.search(flat[:1, :2], 3)


class Store:
    """What `evaluate_stores` and `update_index_from_store` ask of a store."""

    def __init__(self):
        self.ids, self.embeddings, self.class_names, self.folder = IDS, POINTS, CLASSES["class_name"], "store"
        self.labelled, self.labels = torch.ones(COUNT, dtype=torch.bool), torch.arange(COUNT) % 6
        self.columns, self.contents = {}, None
        data = {"description": "photos", "fingerprint": "d"}
        model = {"name": "m", "kind": "retriever", "fingerprint": "f" * 64}
        self.info = type("Info", (), {"model": model, "data": data, "skipped": [], "image_root": None})

    def __len__(self):
        return COUNT


def test_an_evaluation_projects_alike():
    options = {"clustering": False, "geometry": False, "recall_at": (1,), "map_at": ()}
    report = evaluate_stores(Store(), projection="whiten", dim=5, rerank=Reranking(k1=5), **options)
    points = torch.from_numpy(projected("whiten", 5, POINTS))
    expected = retrieval_metrics(points, Store().labels, recall_at=(1,), rerank=Reranking(k1=5))
    assert report["metrics"]["recall_at_1"] == pytest.approx(expected["recall_at_1"])
    assert report["metrics"]["map_at_r"] == pytest.approx(expected["map_at_r"], abs=1e-3)
    assert report["search"]["rerank"] == {"depth": 100, "k1": 5, "k2": 6, "weight": 0.3}
    assert (report["search"]["projection"]["kind"], report["search"]["projection"]["dim"]) == ("whiten", 5)
    assert "search" not in evaluate_stores(Store(), **options)


def test_milvus_refuses_what_is_for_faiss(tmp_path):
    with pytest.raises(ValueError, match=r"build must be empty for Milvus.* got 'quantise'"):
        update_index_from_store(f"{tmp_path}/a.db", Store(), build={"quantise": "int8"})
