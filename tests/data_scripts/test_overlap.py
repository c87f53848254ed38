"""Queries that are in the gallery too: found by id or content, excluded everywhere, and counted."""

import doctest
import json
import shutil

import numpy as np
import pytest
import torch
from data_fixtures import write_classes
from datasets import Dataset, Features, Image, Value

from vptsp import (
    BlockedSimilarity,
    DataError,
    EmbeddingStore,
    EvalTransform,
    EvaluatedImages,
    ImageDataset,
    StoreInfo,
    StreamedImages,
    embedding_metrics,
    find_failures,
    nearest_neighbours,
    retrieval_metrics,
    retrieval_scores,
    same_items,
)
from vptsp.data_scripts import overlap
from vptsp.data_scripts.overlap import same_dataset_images, same_images, same_stored_images
from vptsp.eval import markdown
from vptsp.eval.metric_registry import METRICS, registered_metrics
from vptsp.eval.metrics import count_relevant, select_pairs
from vptsp.search.commands import main
from vptsp.search.report import compare_stores, evaluate_stores, write_report
from vptsp.search.store import begin_store, finish_store, write_shard


RANKS = {"recall_at": (1, 2, 5, 30), "map_at": (3, 50)}


def noise(count, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


def scores_one_by_one(queries, query_labels, gallery, gallery_labels, excluded):
    """Each query against its own gallery, without the excluded items: plain sorting, no ties."""
    rows = []
    for query, (vector, label) in enumerate(zip(queries, query_labels, strict=True)):
        left = [i for i in range(len(gallery)) if [query, i] not in excluded.tolist()]
        order = sorted(left, key=lambda i: -float(vector @ gallery[i]))
        hits = [bool(gallery_labels[i] == label) for i in order]
        relevant = sum(hits)
        if relevant == 0:
            rows.append(None)
            continue
        precision = [hit * sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits)]
        row = {f"recall_at_{k}": float(any(hits[:k])) for k in RANKS["recall_at"]}
        row |= {f"map_at_{k}": sum(precision[:k]) / min(relevant, k) for k in RANKS["map_at"]}
        row |= {"map_at_r": sum(precision[:relevant]) / relevant, "r_precision": sum(hits[:relevant]) / relevant}
        rows.append(row)
    return rows


# ---- The measures


def test_excluded_pairs_equal_a_gallery_without_them(monkeypatch):
    queries, gallery = noise(12), noise(20, seed=1)
    gallery[3:9] = queries[:6]
    query_labels, gallery_labels = torch.arange(12) % 3, torch.arange(20) % 3
    query_labels[11] = 7  # not in the gallery
    excluded = torch.tensor([[0, 3], [1, 4], [5, 8], [2, 5], [2, 6], [2, 0], [0, 3]])
    expected = scores_one_by_one(queries, query_labels, gallery, gallery_labels, excluded)
    sets = (queries, query_labels, gallery, gallery_labels)
    for block_size in (1, 5, None):
        scores = retrieval_scores(*sets, **RANKS, block_size=block_size, excluded=excluded)
        for name, values in scores.items():
            got = [None if value.isnan() else value.item() for value in values]
            assert got == [None if row is None else pytest.approx(row[name]) for row in expected]
    assert retrieval_metrics(*sets, excluded=excluded)["num_in_gallery"] == 4
    assert "num_in_gallery" not in retrieval_metrics(*sets, excluded=excluded[:0])
    assert retrieval_metrics(*sets, excluded=excluded[:0]) == retrieval_metrics(*sets)


def test_the_same_set_twice_is_one_set():
    """Also with copies, ties and lone items."""
    embeddings, labels = noise(30), torch.arange(30) % 7
    embeddings[4], embeddings[5] = embeddings[11], embeddings[11]
    labels[29] = 99
    ids = [f"{i}.png" for i in range(30)]
    sets, excluded = (embeddings, labels, embeddings, labels), same_items(ids, ids)
    expected = retrieval_metrics(embeddings, labels, **RANKS)
    del expected["map_at_r_published"]
    assert retrieval_metrics(*sets, **RANKS, excluded=excluded) == pytest.approx({**expected, "num_in_gallery": 30})
    with pytest.raises(ValueError, match="the same 30 rows, so that every query would find itself"):
        retrieval_metrics(*sets, **RANKS)

    got, alone = find_failures(*sets, excluded=excluded), find_failures(embeddings, labels)
    assert all(getattr(got, name).equal(getattr(alone, name)) for name in ("query", "rank", "correct"))
    assert count_relevant(labels, labels, excluded).equal(count_relevant(labels))
    for got, alone in zip(
        nearest_neighbours(embeddings, 29, embeddings, excluded=excluded),
        nearest_neighbours(embeddings, 29),
        strict=True,
    ):
        assert got.equal(alone)
    measured = embedding_metrics(*sets, excluded=excluded, confidence=0.9, num_resamples=20)
    expected = embedding_metrics(embeddings, labels, confidence=0.9, num_resamples=20)
    assert {name: measured[name] for name in set(expected) & set(measured)} == pytest.approx(
        {name: value for name, value in expected.items() if not name.startswith("map_at_r_published")}
    )


def test_a_query_that_may_find_nothing_is_not_answered():
    scores = retrieval_scores(
        noise(2), torch.zeros(2, dtype=torch.long), noise(2), torch.zeros(2, dtype=torch.long), (1, 2, 3),
        excluded=torch.tensor([[0, 0], [0, 1], [1, 1]]),
    )  # fmt: skip
    assert [value.isnan().tolist() for value in scores.values()] == [[True, False]] * len(scores)
    assert all(values[1] == 1 for values in scores.values())


def test_collapsed_embeddings_score_chance():
    """All similarities are equal: the excluded item takes no part in the tie."""
    vectors, labels = torch.eye(3)[:1].expand(4, 3), torch.tensor([0, 0, 1, 1])
    excluded = torch.arange(4)[:, None].expand(-1, 2)
    assert retrieval_metrics(vectors, labels, vectors, labels, (1, 2, 3), excluded=excluded) == {
        "recall_at_1": pytest.approx(1 / 3), "recall_at_2": pytest.approx(2 / 3), "recall_at_3": 1.0,
        "map_at_r": pytest.approx(1 / 3), "r_precision": pytest.approx(1 / 3),
        "num_queries": 4, "num_unanswerable": 0, "num_in_gallery": 4,
    }  # fmt: skip


def test_pairs_that_make_no_sense_are_refused():
    queries, gallery = noise(3), noise(4)
    for excluded, error, message in [
        ([[0, 1]], TypeError, "excluded must be an integer tensor, got list"),
        (torch.zeros(1, 2), TypeError, "excluded must be an integer tensor, got torch.float32"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"excluded must have shape \(pairs, 2\), got \(2,\)"),
        (torch.tensor([[3, 0]]), ValueError, "rows of the 3 queries and 4 gallery items"),
        (torch.tensor([[0, -1]]), ValueError, "rows of the 3 queries and 4 gallery items"),
    ]:
        with pytest.raises(error, match=message):
            BlockedSimilarity(queries, gallery, excluded=excluded)
    with pytest.raises(ValueError, match="excluded is for a gallery of its own"):
        BlockedSimilarity(queries, excluded=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="between 1 and the 2 items that a query can find, got 3"):
        nearest_neighbours(queries, 3, gallery, excluded=torch.tensor([[0, 1], [0, 2], [1, 1]]))


# ---- Which pairs


def test_same_items_equals_comparing_each_with_each():
    rng = np.random.default_rng(0)
    queries, gallery = rng.integers(0, 9, 20).tolist(), rng.integers(0, 9, 30).tolist()
    queries[3] = gallery[4] = None
    expected = [[q, g] for q in range(20) for g in range(30) if None is not queries[q] == gallery[g]]
    assert same_items(queries, gallery).tolist() == expected
    assert same_items(["a"], ["b"]).shape == (0, 2)


def test_id_first_then_content():
    pairs = same_images(["a", "b", "z", None], ["b", "a", "c", "d"], ["1", "2", "1", None], ["2", "1", "1", None])
    # a and b are there by id, so that c is a copy of a; z is there under the names of a and c
    assert pairs.tolist() == [[0, 1], [1, 0], [2, 1], [2, 2]]


def test_pairs_among_chosen_rows():
    pairs = torch.tensor([[0, 5], [2, 1], [3, 3]])
    assert select_pairs(pairs, torch.tensor([3, 2]), torch.tensor([1, 3, 9])).tolist() == [[1, 0], [0, 1]]
    assert select_pairs(pairs[:0], torch.arange(2), torch.arange(2)).shape == (0, 2)


# ---- Stores


def make_store(folder, ids, contents=None, root="/photos", data="d" * 64, seed=0):
    info = StoreInfo(
        model={"name": "m", "kind": "retriever", "fingerprint": "f" * 64, "dtype": "float32"},
        data={"description": f"images of {folder.name}", "fingerprint": data},
        num_images=len(ids), embedding_dim=6, image_root=root,
    )  # fmt: skip
    begin_store(folder, info)
    classes = [f"class {i % 3}" for i in range(len(ids))]
    labels = [i % 3 for i in range(len(ids))]
    write_shard(folder, info, 0, ids, labels, classes, noise(len(ids), seed).float(), contents=contents)
    finish_store(folder, info)
    return EmbeddingStore.open(folder)


def test_a_store_as_its_own_gallery(tmp_path, capsys):
    store = make_store(tmp_path / "store", [f"{i}.png" for i in range(30)])
    expected = retrieval_metrics(store.embeddings, store.labels)
    assert expected["recall_at_1"] < 0.6  # noise
    report = evaluate_stores(store, store, clustering=False, geometry=False)
    for name in ("recall_at_1", "map_at_r", "r_precision"):
        assert report["metrics"][name] == pytest.approx(expected[name])
    assert report["metrics"]["num_in_gallery"] == report["data"]["queries"]["num_in_gallery"] == 30
    assert "30 images, 30 of them in the gallery too: excluded" in write_report(tmp_path / "report", report)

    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    words = ["evaluate", "--store", str(tmp_path / "store"), "--no_clustering", "--no_geometry", "--output"]
    for place in ("store", "copy"):
        assert main([*words, str(tmp_path / place), "--gallery_store", str(tmp_path / place)]) == 0
        metrics = json.loads((tmp_path / place / "metrics.json").read_text())["metrics"]
        assert metrics["recall_at_1"] == pytest.approx(expected["recall_at_1"])
        assert "30 of them in the gallery too: excluded" in capsys.readouterr().out


def test_comparison_with_the_same_gallery(tmp_path):
    first, second = (
        make_store(tmp_path / name, [f"{i}.png" for i in range(30)], seed=i) for i, name in enumerate("ab")
    )
    report, alone = compare_stores(first, second, first, second), compare_stores(first, second)
    for name, values in report["comparison"].items():
        assert values == pytest.approx(alone["comparison"][name])
    assert report["data"]["queries"]["num_in_gallery"] == 30


def test_both_models_of_a_comparison_are_treated_alike(tmp_path):
    """The second model's stores are old, and don't know that the first query is in the gallery."""
    contents = [*"abcdefghi"], ["a", *"rstuvwxyz"]
    stores = [
        make_store(tmp_path / f"{part}{seed}", [f"{i}.png" for i in range(len(contents[part]))],
                   contents[part] if seed == 0 else None, f"/{part}", str(part) * 64, seed)
        for seed in (0, 1) for part in (0, 1)
    ]  # fmt: skip
    report = compare_stores(stores[0], stores[2], stores[1], stores[3])
    assert report["data"]["queries"]["num_in_gallery"] == 1
    vectors = stores[2].embeddings, stores[2].labels, stores[3].embeddings, stores[3].labels
    expected = retrieval_metrics(*vectors, excluded=torch.tensor([[0, 0]]))["map_at_r"]
    assert report["comparison"]["map_at_r"]["second_mean"] == pytest.approx(expected)


def test_disjoint_stores_are_evaluated_as_before(tmp_path):
    queries = make_store(tmp_path / "q", ["query/0.png", "query/1.png"], ["1", "2"], data="1" * 64)
    gallery = make_store(tmp_path / "g", [f"gallery/{i}.png" for i in range(9)], [*"abcdefghi"], data="2" * 64, seed=1)
    report = evaluate_stores(queries, gallery, clustering=False, geometry=False)
    assert report["metrics"] == pytest.approx(
        embedding_metrics(
            queries.embeddings, queries.labels, gallery.embeddings, gallery.labels, clustering=False, geometry=False
        )
    )
    assert "num_in_gallery" not in report["data"]["queries"]


@pytest.mark.parametrize(
    ("roots", "data", "contents", "expected"),
    [
        (("/a", "/a"), "12", (None, None), [[0, 1]]),  # one folder: the same id is the same file
        (("/a", "/a"), "12", (["x", "y"], ["z", "w"]), [[0, 1]]),  # changed between
        (("/a", "/b"), "12", (["x", "y"], ["z", "w"]), []),  # other folders' files of the same name
        (("/a", "/b"), "12", (["x", "y"], ["y", "w"]), [[1, 0]]),
        ((None, None), "12", (["x", "y"], ["z", "w"]), []),  # `row 0` of two splits
        ((None, None), "11", (None, None), [[0, 1]]),  # a copy of the store
    ],
)
def test_when_two_stores_have_an_image_in_common(tmp_path, caplog, roots, data, contents, expected):
    names = (["1.png", "2.png"], ["0.png", "1.png"])
    stores = [make_store(tmp_path / str(i), names[i], contents[i], roots[i], data[i] * 64) for i in range(2)]
    assert same_stored_images(*stores).tolist() == expected
    assert not caplog.text


def test_what_cannot_be_told_is_said(tmp_path, caplog):
    stores = [make_store(tmp_path / r, ["1.png", "2.png"], None, f"/{r}", r * 64) for r in "12"]
    assert same_stored_images(*stores).tolist() == []
    assert f"2 ids are in both {tmp_path / '1'} and {tmp_path / '2'}" in caplog.text


# ---- Data sets, as the Trainer evaluates them


def as_table(paths, contents=False):
    images = [{"path": str(path), "bytes": path.read_bytes() if contents else None} for path in paths]
    features = Features({"image": Image(decode=False), "label": Value("int64")})
    return Dataset.from_dict({"image": images, "label": list(range(len(paths)))}, features=features)


@pytest.mark.parametrize("kind", ["paths", "contents", "stream"])
def test_images_of_two_data_sets(tmp_path, kind):
    root = write_classes(tmp_path / "photos", {"a": 3, "b": 3})
    queries = [root / "a" / "000.png", root / "a" / "001.png", root / "b" / "000.png"]
    shutil.copy(queries[1], root / "b" / "copy.png")
    (root / "b" / "link.png").symlink_to(queries[2])
    gallery = [root / "b" / "copy.png", root / "a" / "000.png", root / "b" / "001.png", root / "b" / "link.png"]
    sets = [as_table(paths, kind == "contents") for paths in (queries, gallery)]
    if kind == "stream":
        sets = [StreamedImages(s.to_iterable_dataset(), EvalTransform(18, 16), num_classes=4) for s in sets]
    else:
        sets = [ImageDataset(s, EvalTransform(18, 16)) for s in sets]
    assert same_dataset_images(*sets, 3).tolist() == [[0, 1], [1, 0], [2, 3]]
    assert same_dataset_images(sets[0], sets[0], 3).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert same_dataset_images(object(), object(), 3).shape == (0, 2)


def test_pictures_leave_the_query_out():
    labels, readable = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([True, True, False, True, True])
    embeddings = noise(5).float()
    found = {"query": (embeddings, labels, readable), "gallery": (embeddings, labels, readable)}
    pairs = torch.arange(5)[:, None].expand(-1, 2)
    own = EvaluatedImages({"query": None, "gallery": None}, {**found, "excluded": pairs})
    alone = EvaluatedImages(None, {**found, "gallery": None})
    assert own.excluded.tolist() == [[i, i] for i in range(4)]
    assert own.neighbours[1].equal(alone.neighbours[1])
    assert own.num_relevant.equal(alone.num_relevant)


def test_registered_metrics_are_told_or_it_is_said(monkeypatch, caplog):
    seen = []
    monkeypatch.setitem(
        METRICS.entries, "told", lambda q, ql, g=None, gl=None, excluded=None: seen.append(excluded) or 1
    )
    monkeypatch.setitem(METRICS.entries, "not_told", lambda q, ql, g=None, gl=None: 2)
    inputs = (noise(2), torch.arange(2), noise(2), torch.arange(2))
    assert {"told": 1.0, "not_told": 2.0}.items() <= registered_metrics(*inputs).items()
    assert seen == [None]
    assert not caplog.text
    registered_metrics(*inputs, torch.tensor([[0, 0]]))
    assert seen[1].tolist() == [[0, 0]]
    assert "the metric not_told has no parameter `excluded`" in caplog.text


@pytest.mark.parametrize("module", [markdown, overlap])
def test_examples_in_the_documentation(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_stores_of_two_models_are_refused_first(tmp_path):
    store = make_store(tmp_path / "s", ["1.png"])
    store.info.model["fingerprint"] = "e" * 64
    with pytest.raises(DataError, match="embeddings of one model"):
        evaluate_stores(store, make_store(tmp_path / "t", ["1.png"]))
