"""search/filters.py, columns of texts and numbers, groups and thresholds, in both kinds of index, against loops."""

import numpy as np
import pytest
import torch

from vptsp import DataError, ImageSource, MilvusIndex, RetrievalIndex, open_index, retrieval_metrics
from vptsp.search.columns import check_values


NUM_ITEMS = 90
CLASSES = ["Mug", "cup", "Glas", ""]


def normalised(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)


def columns(count=NUM_ITEMS):
    return {
        "class_name": [CLASSES[i * i % 7 % 4] for i in range(count)],
        "price": [None if i % 11 == 0 else i / 2 for i in range(count)],
        "stock": [i % 5 for i in range(count)],
        "title": [None if i % 13 == 0 else f"Title {i % 4}" for i in range(count)],
    }


EMBEDDINGS = normalised(NUM_ITEMS, 0)
IDS = [f"item {i}" for i in range(NUM_ITEMS)]
ITEMS = [{"id": name} | {c: v[i] for c, v in columns().items()} for i, name in enumerate(IDS)]
QUERIES = normalised(6, 1)


@pytest.fixture(scope="module", params=["Flat", "IVF4,Flat", "HNSW16", "milvus"])
def index(request, tmp_path_factory):
    if request.param == "milvus":
        pytest.importorskip("milvus_lite")
        made = MilvusIndex.build(f"{tmp_path_factory.mktemp('milvus')}/a.db", IDS, EMBEDDINGS, columns())
        yield made
        made.close()
        return
    index = RetrievalIndex.build(IDS, EMBEDDINGS, columns(), factory=request.param, target_recall=1.0)
    folder = tmp_path_factory.mktemp("index") / "saved"
    index.save(folder)
    yield open_index(folder)


def expected(query, passes, k, group_by=None, minimum=-1):
    """Ids of the nearest that pass, by sorting all."""
    similarity = (EMBEDDINGS @ query).tolist()
    order = sorted((i for i in range(NUM_ITEMS) if passes(ITEMS[i])), key=lambda i: -similarity[i])
    found, seen = [], set()
    for i in order:
        value = ITEMS[i].get(group_by) if group_by else i
        if value in (None, "") or value not in seen:
            found.append(i)
            seen.add(value)
    return [IDS[i] for i in found[:k] if similarity[i] >= minimum]


def ids_of(results):
    return [[hit.id for hit in hits] for hits in results]


FILTERS = {
    "one class": (["class_name=Mug"], lambda i: i["class_name"] == "Mug"),
    "in another case": (["CLASS_NAME=mUG"], lambda i: i["class_name"] == "Mug"),
    "two classes": (["class_name=mug", "class_name=CUP"], lambda i: i["class_name"] in ("Mug", "cup")),
    "not a class": (["class_name!=mug"], lambda i: i["class_name"] != "Mug"),
    "cheap": (["price<20"], lambda i: i["price"] is not None and i["price"] < 20),
    "a range": (["price>=7.5", "price <= 20"], lambda i: i["price"] is not None and 7.5 <= i["price"] <= 20),
    "more": (["price>30.2"], lambda i: i["price"] is not None and i["price"] > 30.2),
    "a whole number": (["stock=3"], lambda i: i["stock"] == 3),
    "a whole number as a fraction": (["stock=3.0"], lambda i: i["stock"] == 3),
    "no such fraction": (["stock=2.5"], lambda i: False),
    "less than a fraction": (["stock<2.5"], lambda i: i["stock"] < 2.5),
    "not a number, or none": (["price!=1.5"], lambda i: i["price"] != 1.5),
    "not a text, or none": (["title!=title 1"], lambda i: i["title"] != "Title 1"),
    "both": (["class_name=cup", "price<30"], lambda i: i["class_name"] == "cup" and (i["price"] or 99) < 30),
    "an id": (["id=ITEM 7"], lambda i: i["id"] == "item 7"),
    "a dict": ({"stock": [1, 4], "title": "TITLE 2"}, lambda i: i["stock"] in (1, 4) and i["title"] == "Title 2"),
    "one text": ("stock>3", lambda i: i["stock"] > 3),
    "nothing": (["price>1000"], lambda i: False),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_a_loop(index, name):
    where, passes = FILTERS[name]
    assert ids_of(index.search(QUERIES, 7, where=where)) == [expected(query, passes, 7) for query in QUERIES]
    assert sorted(index.ids_where(where)) == sorted(item["id"] for item in ITEMS if passes(item))


def test_columns_come_back_as_they_were(index):
    for hits in index.search(QUERIES, 30):
        for hit in hits:
            assert {"id": hit.id} | hit.metadata == ITEMS[IDS.index(hit.id)]
    assert index.columns == ["class_name", "price", "stock", "title"]


@pytest.mark.parametrize("k", [1, 3, 4, 60])
@pytest.mark.parametrize("group_by", ["class_name", "title", "stock", "id"])
def test_groups_are_the_best_of_each(index, k, group_by):
    found = ids_of(index.search(QUERIES, k, group_by=group_by))
    if isinstance(index, RetrievalIndex) and not index.is_exact and k > 5:
        pytest.skip("a list or a graph of faiss may not go through all items")
    assert found == [expected(query, lambda i: True, k, group_by) for query in QUERIES]


def test_groups_lie_deep_where_the_nearest_are_all_alike():
    """All of the first class are nearer than any of the second: k photos grouped would be one."""
    near = torch.nn.functional.normalize(torch.tensor([1.0, 0, 0, 0]) + 0.01 * torch.randn(400, 4), dim=1)
    vectors = torch.cat([near, torch.eye(4)[1:]])
    names = ["near"] * 400 + ["second", "third", "fourth"]
    index = RetrievalIndex.build([str(i) for i in range(403)], vectors, {"class_name": names})
    (hits,) = index.search(torch.eye(4)[:1], 3, group_by="CLASS_NAME")
    assert hits[0].metadata["class_name"] == "near"
    assert {hit.metadata["class_name"] for hit in hits} < set(names)
    assert len({hit.metadata["class_name"] for hit in hits}) == 3
    (hits,) = index.search_ids(["400"], 4, group_by="class_name")  # which doesn't find itself
    assert sorted(hit.metadata["class_name"] for hit in hits) == ["fourth", "near", "third"]


def test_milvus_says_where_it_cannot_look_deeper(monkeypatch, tmp_path):
    pytest.importorskip("milvus_lite")
    monkeypatch.setattr(MilvusIndex, "max_results", 5)
    index = MilvusIndex.build(f"{tmp_path}/a.db", IDS, EMBEDDINGS, {"class_name": ["x"] * 89 + ["y"]})
    with pytest.raises(ValueError, match=r"group_by: the 5 most similar items, .* hold 1 groups of 2"):
        index.search(EMBEDDINGS[:1], 2, group_by="class_name")
    with pytest.raises(ValueError, match="k must be at most 5 in this index, got 6"):
        index.search(EMBEDDINGS[:1], 6)
    index.close()


def test_minimum(index):
    found = ids_of(index.search(QUERIES, 10, min_similarity=0.3, where=["stock<3"]))
    assert found == [expected(query, lambda i: i["stock"] < 3, 10, minimum=0.3) for query in QUERIES]
    for wrong in (1.5, -2, float("nan")):
        with pytest.raises(ValueError, match=r"min_similarity must be in \[-1, 1\]"):
            index.search(QUERIES, 3, min_similarity=wrong)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused_everywhere(index, k):
    for search in (lambda: index.search(QUERIES, k), lambda: index.search_ids([IDS[0]], k)):
        with pytest.raises(ValueError, match=f"k must be >= 1, got {k}"):
            search()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["colour=red"], r"no column 'colour'; the columns are \['id', 'class_name', 'price', 'stock', 'title'\]"),
        (["prize<3"], "no column 'prize'.*did you mean 'price'"),
        (["price<cheap"], "price holds numbers, got 'cheap'"),
        (["price=nan"], "price holds numbers, got 'nan'"),
        (["title<3"], "title holds texts, which only = and != compare, got title<3"),
        (["price"], "where must be COLUMN=VALUE, got 'price'"),
        ({"stock": "a"}, "stock holds numbers, got 'a'"),
        ({"class_name": 3}, "class_name must be texts, got 3"),
        ({"stock": True}, "stock holds numbers, got True"),
    ],
)
def test_filters_that_cannot_be(index, where, message):
    for ask in (lambda: index.search(QUERIES, 3, where=where), lambda: index.ids_where(where)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_values_that_nobody_has(index):
    for where, message in [
        (["class_name=muk"], "no item has class_name 'muk'; did you mean 'Mug'"),
        ({"title": "Title 7"}, "no item has title 'Title 7'; did you mean 'Title"),
        (["stock=9"], "no item has stock 9"),
        (["class_name!=muk"], "no item has class_name 'muk'"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.require_values(where)
    index.require_values(["class_name=MUG", "stock=3.0", "price>1000"])
    index.require_values(None)


def test_text_is_looked_for_in_texts(index):
    assert ids_of(index.search(QUERIES, 5, containing="Title 2")) == [
        expected(query, lambda i: "Title 2" in (i["title"] or ""), 5) for query in QUERIES
    ]


def test_arrays_of_numpy_are_welcome(index):
    array = QUERIES.numpy()
    for given in (array, array.astype(np.float64), array[::-1][::-1], np.asfortranarray(array)):
        assert ids_of(index.search(given, 4)) == ids_of(index.search(QUERIES, 4))
    with pytest.raises(TypeError, match=r"floating-point tensor, got .*int64"):
        index.search(np.ones((2, 8), dtype=np.int64), 3)


def test_arrays_are_added_and_measured():
    frozen = EMBEDDINGS.numpy().copy()
    frozen.flags.writeable = False
    index = RetrievalIndex.build(IDS, frozen, columns())
    index.add(["new"], QUERIES[:1].numpy(), {"class_name": ["x"], "price": [3], "stock": [1], "title": [None]})
    assert index.search(QUERIES[:1].numpy(), 1)[0][0].id == "new"
    labels = torch.arange(NUM_ITEMS) % 9
    assert retrieval_metrics(frozen, labels.numpy()) == retrieval_metrics(EMBEDDINGS, labels)
    pairs = torch.tensor([[0, 3], [1, 5]])
    sets = (QUERIES, torch.arange(6), EMBEDDINGS, labels)
    assert retrieval_metrics(*(values.numpy() for values in sets), excluded=pairs.numpy()) == retrieval_metrics(
        *sets, excluded=pairs
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "a"], "must be all texts or all numbers, got 'a' and 1"),
        ([float("nan")], "texts, finite numbers or None, got nan"),
        ([float("inf")], "texts, finite numbers or None, got inf"),
        ([True], "texts, finite numbers or None, got True"),
        ([[1]], r"texts, finite numbers or None, got \[1\]"),
        ([2**63], "texts, finite numbers or None, got 9223372036854775808"),
        (["\udcff"], "texts that UTF-8 can hold"),
        ("ab", "a list of texts or numbers, got a single one"),
    ],
)
def test_values_that_no_column_holds(values, message):
    with pytest.raises(ValueError, match=message):
        check_values(values, "price")
    with pytest.raises(ValueError, match=message):
        RetrievalIndex.build(["a"], torch.eye(8)[:1], {"price": values})


def test_an_added_column_of_another_kind_is_refused(index):
    added = {"class_name": ["x"], "price": ["dear"], "stock": [1], "title": [None]}
    with pytest.raises(ValueError, match="the column 'price' holds numbers in the index, got texts"):
        index.add(["new"], QUERIES[:1], added)
    assert len(index) == NUM_ITEMS


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"price": [1, 2]}, "'price' has 2 values for 3 images"), ({"path": ["a"] * 3}, "can't be called 'path'")],
)
def test_columns_of_a_source_are_one_value_per_image(columns, message):
    labels = np.ma.array([0, 0, 0])
    with pytest.raises(DataError, match=message):
        ImageSource(["a", "b", "c"], labels, ["x"], None, "photos", columns=columns)
