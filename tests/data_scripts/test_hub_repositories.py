"""A data set of several repositories: training, and what tests; among it sets in the form of retrieval benchmarks."""

import datasets
import pytest
from data_fixtures import jpeg_bytes, rows_of, write_retrieval_set
from test_data_hub import summary, table, write_repository

from vptsp import DataArguments, DataError, check_data_arguments, load_splits


BIRDS = datasets.ClassLabel(names=["wren", "kite", "tulip"])  # tulip is 0 in the flowers
TEXT = datasets.Value("string")
NUMBER = datasets.Value("int64")


@pytest.fixture
def load(tmp_path):
    def load_hub(root, **options):
        given = {name: str(value) if name.endswith("_repo") else value for name, value in options.items()}
        return load_splits("hub", root, cache_dir=tmp_path / "cache", **given)

    return load_hub


@pytest.fixture
def flowers(tmp_path):
    return write_repository(tmp_path / "flowers", train=table([4, 0, 4, 2]))


# ---- a pair


@pytest.mark.parametrize("streaming", [False, True])
def test_training_and_test_from_two_repositories(tmp_path, load, flowers, streaming):
    """Classes are known by their names, as numbers are each repository's own; they sort by name then."""
    birds = write_repository(tmp_path / "birds", test=table([1, 0, 1], BIRDS, first=10), rest=table([0], BIRDS))
    splits = load(flowers, test_repo=birds, streaming=streaming)
    assert summary(splits) == {
        "train": [("lotus", 0), ("tulip", 1), ("lotus", 2), ("iris", 3)],
        "test": [("kite", 10), ("wren", 11), ("kite", 12)],
    }
    assert splits["train"].features["label"].names == ["iris", "lotus", "tulip"]
    assert splits["test"].features["label"].names == ["kite", "wren"]
    assert [row["label"] for row in splits["test"]] == [0, 1, 0]
    assert isinstance(splits, datasets.IterableDatasetDict if streaming else datasets.DatasetDict)


@pytest.mark.parametrize("streaming", [False, True])
def test_queries_and_gallery_from_two_repositories(tmp_path, load, flowers, streaming, caplog):
    asking = write_repository(tmp_path / "asking", train=table(["wren", "kite"], TEXT, first=10))  # the only split
    shelf = write_repository(
        tmp_path / "shelf", gallery=table([0, 1, 1], BIRDS, first=20), noisy=table([0, 0, 1], BIRDS, first=30)
    )
    splits = load(flowers, query_repo=asking, gallery_repo=shelf, streaming=streaming)
    assert summary(splits) == {
        "train": [("lotus", 0), ("tulip", 1), ("lotus", 2), ("iris", 3)],
        "query": [("wren", 10), ("kite", 11)],
        "gallery": [("wren", 20), ("kite", 21), ("kite", 22)],
    }
    assert splits["query"].features == splits["gallery"].features
    assert "shelf: of its splits, 'gallery' is taken, and not 'noisy'" in caplog.text
    chosen = load(flowers, query_repo=asking, gallery_repo=shelf, gallery_split="noisy", streaming=streaming)
    assert [number for _, number in summary(chosen)["gallery"]] == [30, 31, 32]
    both = load(flowers, query_repo=asking, gallery_repo=shelf, gallery_split="gallery+noisy", streaming=streaming)
    assert [number for _, number in summary(both)["gallery"]] == [20, 21, 22, 30, 31, 32]


def test_labels_of_one_kind_stay_as_they_are(tmp_path, load):
    """The same class names keep their order, numbers are the same classes everywhere."""
    one = write_repository(tmp_path / "one", train=table([4, 0]))
    two = write_repository(tmp_path / "two", test=table([3, 1], first=10))
    assert load(one, test_repo=two)["test"].features["label"].names == ["rose", "daisy"]
    one = write_repository(tmp_path / "three", train=table([30, 4], NUMBER))
    two = write_repository(tmp_path / "four", test=table([200, 100], NUMBER, first=10))
    assert load(one, test_repo=two)["test"].features["label"].names == ["100", "200"]


def test_test_repositories_with_queries_and_gallery(tmp_path, load, flowers):
    root = write_repository(
        tmp_path / "birds", query=table([1], BIRDS, first=10), gallery=table([0, 1], BIRDS, first=20)
    )
    assert {name: len(split) for name, split in load(flowers, test_repo=root).items()} == {
        "train": 4,
        "query": 1,
        "gallery": 2,
    }


def test_splits_of_pairs_are_never_guessed(tmp_path, load, flowers):
    def fails(message, root=flowers, **options):
        with pytest.raises(DataError, match=message):
            load(root, **options)

    birds = write_repository(tmp_path / "birds", a=table([1], BIRDS), b=table([0], BIRDS))
    fails(r"birds has the splits a, b, not test: give test_split, one of these or several as in a\+b", test_repo=birds)
    fails(r"birds has the splits a, b, not c: give test_split", test_repo=birds, test_split="a+c")
    fails("each split of .*birds can be taken once, got a, a", test_repo=birds, test_split="a+a")
    fails("flowers has the splits train, not first: give train_split", test_repo=birds, train_split="first")
    fails("birds has the splits a, b, not train: give train_split", birds, test_repo=flowers)
    assert (
        len(load(birds, train_split="a + b", test_repo=flowers, test_split="train", test_classes=None)["train"]) == 2
    )


def test_what_does_not_go_together(tmp_path, load, flowers, monkeypatch):
    def fails(message, root=flowers, **options):
        with pytest.raises(DataError, match=message):
            load(root, **options)

    birds = write_repository(tmp_path / "birds", train=table([1], BIRDS))
    for options, message in (
        ({"query_repo": birds}, "comes from test_repo, or from query_repo and gallery_repo; got query_repo$"),
        (
            {"test_repo": birds, "gallery_repo": birds},
            "or from query_repo and gallery_repo; got test_repo and gallery_",
        ),
        ({"test_repo": birds, "query_split": "train"}, "query_split is a split of query_repo, got test_repo"),
        (
            {"query_repo": birds, "gallery_repo": birds, "test_split": "a"},
            "test_split is a split of test_repo, got que",
        ),
        ({"test_repo": "a b"}, "test_repo must be a repository, as owner/name or owner/name@revision, got 'a b'"),
        ({"test_repo": "a/b/c"}, "test_repo must be a repository, as owner/name .* got 'a/b/c'"),
        ({"test_repo": tmp_path / "absent"}, "absent does not exist"),
        ({"test_repo": "./absent"}, "absent does not exist"),
    ):
        fails(message, **options)
        given = {name: str(value) for name, value in options.items()}
        with pytest.raises(DataError, match=message):  # before a run loads anything
            check_data_arguments(DataArguments(dataset_name="hub", data_dir=str(flowers), **given))
    fails(
        "layout 'classes': what trains and what tests come apart, as 'train_test'", test_repo=birds, layout="classes"
    )
    fails(
        "test_share splits classes, but the splits of .*flowers and .*birds already", test_repo=birds, test_share=0.3
    )
    fails("2 classes of .*flowers and .*more are in both training and test", test_repo=write_repository(
        tmp_path / "more", train=table(["tulip", "rose", "iris"], TEXT)))  # fmt: skip
    fails("the labels of some splits have names, those of others have none", test_repo=write_repository(
        tmp_path / "numbers", train=table([7, 8], NUMBER)))  # fmt: skip
    words = write_repository(tmp_path / "words", train=table(["x", "y"], TEXT))
    fails(
        "are text, those of others numbers",
        write_repository(tmp_path / "n", train=table([7], NUMBER)),
        test_repo=words,
    )
    broken = write_repository(tmp_path / "broken", train=table([0, None], BIRDS))
    for streaming in (False, True):
        fails("split test: .*row.* has the label None; expected 0..2", test_repo=broken, streaming=streaming)
    monkeypatch.chdir(tmp_path)
    for option in ("dataset_repo", "test_repo"):
        root = None if option == "dataset_repo" else flowers
        fails(f"{option} 'birds' is a repository, but there is a folder of that name here", root, **{option: "birds"})
    fails(r"dataset_repo must be a repository, as owner/name.* got '\./birds'", None, dataset_repo="./birds")
    assert len(load(flowers, test_repo="./birds")["test"]) == 1


def test_revisions_reach_load_dataset(tmp_path, load, flowers, monkeypatch):
    calls = []

    def fake(name, config=None, revision=None, **options):
        calls.append((name, revision))
        return datasets.DatasetDict({"train": table([0, 1]), "test": table([1], BIRDS)})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision=None, **options: ["default"])
    load(None, dataset_repo="some/flowers@v1", test_repo="some/birds@abc123")
    assert calls == [("some/flowers", "v1"), ("some/birds", "abc123")]
    with pytest.raises(DataError, match="names a revision, and so does dataset_revision"):
        load(None, dataset_repo="some/flowers@v1", dataset_revision="v2")


@pytest.mark.parametrize("streaming", [False, True])
def test_queries_and_gallery_of_one_repository_by_other_names(tmp_path, load, streaming):
    root = write_repository(
        tmp_path / "flowers",
        train=table([0, 1]),
        asked=table([2], first=10),
        shelf=table([3, 2], first=20),
        more=table([2], first=30),
    )
    splits = load(root, query_split="asked", gallery_split="shelf+more", streaming=streaming)
    assert summary(splits) == {
        "train": [("tulip", 0), ("rose", 1)],
        "query": [("iris", 10)],
        "gallery": [("daisy", 20), ("iris", 21), ("iris", 30)],
    }
    for options, message in (
        ({"query_split": "asked"}, "layout 'query_gallery' needs the splits train, asked, gallery; .* has"),
        (
            {"query_split": "asked", "test_split": "more"},
            "query_split 'asked' goes with the layout 'query_gallery', got",
        ),
        ({"layout": "classes", "train_split": "shelf", "gallery_split": "more"}, "gallery_split 'more' goes with the"),
    ):
        with pytest.raises(DataError, match=message):
            load(root, streaming=streaming, **options)


# ---- retrieval sets


QUERIES = {"q1": 10, "q2": 11, "q3": 12}
CORPUS = {"c1": 20, "c2": 21, "c3": 22, "c4": 23}
QRELS = [("q1", "c1", 1), ("q1", "c3", 1), ("q2", "c2", 2), ("q3", "c1", 1), ("q3", "c3", 1), ("q2", "c1", 0)]


def images(numbers):
    return {name: None if number is None else jpeg_bytes(number) for name, number in numbers.items()}


def write_set(root, query=QUERIES, corpus=CORPUS, qrels=QRELS, **options):
    return write_retrieval_set(root, images(query), images(corpus), qrels, **options)


@pytest.mark.parametrize("query_name", ["query", "queries"])
def test_retrieval_sets_test(tmp_path, load, flowers, query_name, caplog):
    """q1 and q3 ask for the same two images, q2 for another; nothing asks for c4, and 0 is no answer."""
    root = write_set(tmp_path / "set", query_name=query_name)
    splits = load(flowers, test_repo=root)
    assert {name: rows for name, rows in summary(splits).items() if name != "train"} == {
        "query": [("query q1", 10), ("query q2", 11), ("query q1", 12)],
        "gallery": [("query q1", 20), ("query q2", 21), ("query q1", 22), ("corpus c4", 23)],
    }
    assert splits["query"].features == splits["gallery"].features
    assert set(splits["gallery"].column_names) == {"image", "label"}  # what all three have
    assert splits["train"].features["label"].names == ["iris", "lotus", "tulip"]
    assert "1 images of the corpus answer no query; each is a class of its own" in caplog.text


def test_queries_that_are_in_the_corpus_need_no_line_of_their_own(tmp_path, load, flowers, caplog):
    """As the sets of CUB-200-2011 and Cars-196: every image asks for the others of its class."""
    classes = {"a": [10, 11, 12], "b": [13, 14], "c": [15]}
    numbers = [number for members in classes.values() for number in members]
    of = {number: name for name, members in classes.items() for number in members}
    qrels = [(f"q{x}", f"c{y}", 1) for x in numbers for y in numbers if x != y and of[x] == of[y]]
    root = write_set(tmp_path / "set", {f"q{x}": x for x in numbers}, {f"c{x}": x for x in numbers}, qrels)
    splits = load(flowers, test_repo=root)
    for split, count in (("query", 5), ("gallery", 6)):
        found = {number: name for name, number in summary(splits)[split]}
        assert len(found) == count
        assert all((found[x] == found[y]) == (of[x] == of[y]) for x in found for y in found)
    assert "no image answers 1 queries, left out" in caplog.text


def test_a_query_may_be_the_answer_of_another(tmp_path, load, flowers):
    """10 asks for 11 alone, and 12 for 10: as in sets of pairs, and no reason to join the three."""
    root = write_set(tmp_path / "set", {"q1": 10, "q2": 12}, {"c1": 11, "c2": 10}, [("q1", "c1", 1), ("q2", "c2", 1)])
    assert summary(load(flowers, test_repo=root))["gallery"] == [("query q1", 11), ("query q2", 10)]


def test_other_names_of_retrieval_sets(tmp_path, load, flowers, monkeypatch):
    """`default` for qrels, `_id` for ids, `query_id` in qrels, splits, and a configuration of several."""
    tables = {"default": {"test": datasets.Dataset.from_dict({"query_id": [1], "corpus_id": [2], "score": [1.0]})}}
    for name, number in (("queries", 1), ("corpus", 2)):
        rows = {"_id": [number], "picture": [{"bytes": jpeg_bytes(number), "path": None}]}
        table_of = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        tables[name] = {"test": table_of, "dev": table_of.select([])}
    load_dataset = datasets.load_dataset

    def fake(name, config=None, **options):
        return tables[config] if name == "some/set" else load_dataset(name, config, **options)

    names = datasets.get_dataset_config_names
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(
        datasets,
        "get_dataset_config_names",
        lambda name, **options: list(tables) if name == "some/set" else names(name, **options),
    )
    splits = load(flowers, test_repo="some/set")
    assert [name for name, _, _ in rows_of(splits["query"])] == ["query 1"]
    assert [content for _, _, content in rows_of(splits["gallery"])] == [jpeg_bytes(2)]


def test_retrieval_sets_that_are_refused(tmp_path, load, flowers):
    def fails(message, **parts):
        root = write_set(tmp_path / f"set{len(list(tmp_path.iterdir()))}", **parts)
        with pytest.raises(DataError, match=message):
            load(flowers, test_repo=root)

    unequal = [*QRELS, ("q1", "c4", 1)]
    fails(
        r"no classes: 'c4' answers queries that are answered by the same images as 'q3' \('c1', 'c3'\)", qrels=unequal
    )
    fails("qrels, split test: row 6 names 'q9', which is not in .*query, split test", qrels=[*QRELS, ("q9", "c1", 1)])
    fails("row 6 names 'c9', which is not in .*corpus, split corpus", qrels=[*QRELS, ("q1", "c9", 1)])
    fails("row 6 has the score None; expected a number", qrels=[*QRELS, ("q1", "c1", None)])
    fails(r"no image answers any query \(no score is above 0\)", qrels=[("q1", "c1", 0)])
    fails("1 of 4 rows have no image in the column 'image', the first is 'c2'", corpus=CORPUS | {"c2": None})
    root = write_set(tmp_path / "set")
    for options, message in (
        ({"streaming": True}, "is a retrieval set, whose rows are found by id: leave streaming out"),
        ({"test_split": "dev"}, "set, qrels has the splits test, not 'dev': give one as test_split"),
        ({"layout": "classes"}, "what trains and what tests come apart, as 'query_gallery'"),
    ):
        with pytest.raises(DataError, match=message):
            load(flowers, test_repo=root, **options)
    for options in ({}, {"test_repo": root}):
        with pytest.raises(DataError, match=r"is a retrieval set \(corpus, query, qrels\): .* Give it as test_repo"):
            load(root, **options)
    root = write_set(tmp_path / "twice")
    twice = datasets.Dataset.from_parquet(str(root / "corpus-00000-of-00001.parquet"))
    datasets.concatenate_datasets([twice, twice]).to_parquet(root / "corpus-00000-of-00001.parquet")
    with pytest.raises(DataError, match="corpus, split corpus: the id 'c1' is there twice"):
        load(flowers, test_repo=root)
    root = write_set(tmp_path / "broken")
    (root / "corpus-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"can't load the data set .*broken' \("):
        load(flowers, test_repo=root)
