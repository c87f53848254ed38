import io
import pickle
import re

import datasets
import numpy as np
import pytest
from data_fixtures import jpeg_bytes, rows_of
from PIL import Image

from vptsp import DataError, ImageDataset, load_splits


FLOWERS = ["tulip", "rose", "iris", "daisy", "lotus"]  # not in alphabetical order, and that is the order


def table(labels, feature=None, image="image", label="label", first=0):
    """Rows with the JPEG of their number."""
    feature = datasets.ClassLabel(names=FLOWERS) if feature is None else feature
    features = datasets.Features({"note": datasets.Value("string"), label: feature, image: datasets.Image()})
    rows = {
        "note": [f"row {i}" for i in range(len(labels))],
        label: labels,
        image: [{"path": f"{first + i}.jpg", "bytes": jpeg_bytes(first + i)} for i in range(len(labels))],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_repository(root, **splits):
    """A repository in the usual form: parquet files whose names tell the splits, and a card."""
    (root / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Flowers\n")
    return root


@pytest.fixture
def load(tmp_path):
    def load_hub(root, **options):
        return load_splits("hub", root, cache_dir=tmp_path / "cache", **options)

    return load_hub


def summary(splits):
    """Per split (class name, number of the JPEG) per row; labels must count from 0."""
    numbers = {jpeg_bytes(i): i for i in range(60)}
    return {split: [(name, numbers[content]) for name, _, content in rows_of(splits[split])] for split in splits}


@pytest.mark.parametrize("streaming", [False, True])
def test_train_and_test_as_given(tmp_path, load, streaming):
    """One ClassLabel for all; each side gets labels of its own, in the order of the feature."""
    root = write_repository(tmp_path / "flowers", train=table([4, 0, 4, 2]), test=table([3, 1], first=10))
    splits = load(root, streaming=streaming)
    assert summary(splits) == {
        "train": [("lotus", 0), ("tulip", 1), ("lotus", 2), ("iris", 3)],
        "test": [("daisy", 10), ("rose", 11)],
    }
    assert splits["train"].features["label"].names == ["tulip", "iris", "lotus"]
    assert splits["test"].features["label"].names == ["rose", "daisy"]
    assert [row["label"] for row in splits["train"]] == [2, 0, 2, 1]
    assert splits["train"].features["image"] == datasets.Image(decode=False)
    assert isinstance(splits, datasets.IterableDatasetDict if streaming else datasets.DatasetDict)


@pytest.mark.parametrize("streaming", [False, True])
def test_query_and_gallery(tmp_path, load, streaming, caplog):
    root = write_repository(
        tmp_path / "flowers",
        train=table([0, 0, 1]),
        query=table([4, 2, 3], first=10),
        gallery=table([2, 2, 4], first=20),
        validation=table([0], first=30),
    )
    splits = load(root, streaming=streaming)
    assert summary(splits) == {
        "train": [("tulip", 0), ("tulip", 1), ("rose", 2)],
        "query": [("lotus", 10), ("iris", 11), ("daisy", 12)],
        "gallery": [("iris", 20), ("iris", 21), ("lotus", 22)],
    }
    assert splits["query"].features == splits["gallery"].features
    assert splits["query"].features["label"].names == ["iris", "daisy", "lotus"]
    assert "the splits 'validation' are not part of the layout 'query_gallery'" in caplog.text
    assert "1 query classes have no image in the gallery: 'daisy'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_split_by_classes(tmp_path, load, streaming):
    """A classification data set: the same classes on both sides."""
    splits = {"train": table([0, 1, 2, 3]), "test": table([4, 2, 0], first=10)}
    root = write_repository(tmp_path / "flowers", **splits)
    with pytest.raises(DataError, match=r"2 classes of .* in both training and test \('iris', 'tulip'\).*layout='cla"):
        load(root, streaming=streaming)
    found = load(root, layout="classes", train_split="train+test", streaming=streaming)  # the first three names train
    assert summary(found) == {
        "train": [("tulip", 0), ("rose", 1), ("iris", 2), ("iris", 11), ("tulip", 12)],
        "test": [("daisy", 3), ("lotus", 10)],
    }
    assert found["train"].features["label"].names == ["tulip", "rose", "iris"]
    found = load(root, layout="classes", train_split="train+test", streaming=streaming, test_classes=["rose", "iris"])
    assert found["test"].features["label"].names == ["rose", "iris"]
    assert [row["label"] for row in found["test"]] == [0, 1, 1]
    found = load(root, layout="classes", train_split="train+test", streaming=streaming, class_split="alternate")
    assert found["test"].features["label"].names == ["rose", "daisy"]


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_are_chosen_and_never_merged_by_themselves(tmp_path, load, streaming, caplog):
    corrupted = table([0, 1, 2, 3, 4], first=40)
    root = write_repository(
        tmp_path / "flowers",
        clean=table([0, 1]),
        held=table([2, 3], first=10),
        noisy=corrupted,
        more=table([1], first=5),
    )

    def fails(message, **options):
        with pytest.raises(DataError, match=message):
            load(root, streaming=streaming, **options)

    for options in ({}, {"layout": "classes"}):
        names = "clean, held, more, noisy|clean, held, noisy, more"
        fails(rf"flowers has the splits ({names}): give train_split and test_split, or the splits", **options)
    given = load(root, streaming=streaming, train_split="clean", test_split="held")
    assert summary(given) == {
        "train": [("tulip", 0), ("rose", 1)],
        "test": [("iris", 10), ("daisy", 11)],
    }
    assert "'noisy'" in caplog.text and "not part of the layout 'train_test', ignored" in caplog.text
    joined = load(root, streaming=streaming, train_split="clean + more", test_split="held")
    assert summary(joined)["train"] == [("tulip", 0), ("rose", 1), ("rose", 5)]
    anew = load(root, streaming=streaming, train_split="held")  # one split, whose classes are split
    assert summary(anew) == {"train": [("iris", 10)], "test": [("daisy", 11)]}
    fails("layout 'train_test' needs the splits clean, gone; .* has", train_split="clean", test_split="gone")
    fails(r"layout 'classes' needs the splits train\[:5\]; ", train_split="train[:5]")
    fails("each split of .* can be taken once, got clean, clean", train_split="clean+clean")
    fails("test_split 'held' goes with the layout 'train_test', got 'classes'", layout="classes", test_split="held",
          train_split="clean")  # fmt: skip
    fails("2 classes of .* are in both training and test", train_split="clean", test_split="noisy")


def test_splits_that_nothing_takes_need_no_labels(tmp_path, load):
    plain = table([1]).remove_columns("label")
    datasets.DatasetDict({"train": table([0, 1]), "test": table([2]), "rest": plain}).save_to_disk(tmp_path / "disk")
    assert set(load(tmp_path / "disk")) == {"train", "test"}


def test_train_split_of_a_repository_in_the_usual_form(tmp_path, load):
    splits = {"train": table([0, 1]), "test": table([2, 3], first=10), "validation": table([1, 1], first=20)}
    root = write_repository(tmp_path / "flowers", **splits)
    assert summary(load(root, train_split="train+validation")) == {
        "train": [("tulip", 0), ("rose", 1), ("rose", 20), ("rose", 21)],
        "test": [("iris", 10), ("daisy", 11)],
    }
    anew = summary(load(root, train_split="train+test"))
    assert [name for name, _ in anew["train"]] == ["tulip", "rose"]
    assert [name for name, _ in anew["test"]] == ["iris", "daisy"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "feature, labels, train, test",
    [
        (datasets.Value("int64"), [30, 4, 200, 4], ["4", "30"], ["200"]),
        (datasets.Value("string"), ["b", "a", "c", "a"], ["a", "b"], ["c"]),
        (datasets.Value("large_string"), ["b", "a", "c", "a"], ["a", "b"], ["c"]),
    ],
)
def test_labels_without_names_and_other_columns(tmp_path, load, feature, labels, train, test, streaming):
    """One split only is split by classes; its columns have other names, even each other's."""
    for image, label in (("picture", "kind"), ("label", "image"), ("label", "kind"), ("picture", "image")):
        root = write_repository(tmp_path / f"{image}-{label}", train=table(labels, feature, image, label))
        splits = load(root, streaming=streaming, image_column=image, label_column=label)
        assert splits["train"].features["label"].names == train and splits["test"].features["label"].names == test
        assert [name for name, _ in summary(splits)["train"]] == [str(x) for x in labels if str(x) in train]
        assert set(next(iter(splits["train"]))) == {"image", "label", "note"}  # what else there is goes along
        numbers = [number for _, number in summary(splits)["train"]]
        assert [row["note"] for row in splits["train"]] == [f"row {number}" for number in numbers]


def test_streams_go_to_workers(tmp_path, load):
    root = write_repository(tmp_path / "flowers", train=table([4, 0, 4, 2]), test=table([3, 1], first=10))
    stream = load(root, streaming=True, layout="classes", train_split="train+test")["train"]
    assert rows_of(pickle.loads(pickle.dumps(stream))) == rows_of(stream)


def test_what_save_to_disk_wrote(tmp_path, load):
    expected = {"train": [("tulip", 0), ("rose", 1)], "test": [("iris", 2), ("daisy", 3)]}
    table([0, 1, 2, 3]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table([0, 1]), "test": table([2, 3], first=2)}).save_to_disk(tmp_path / "two")
    for root in (tmp_path / "one", tmp_path / "two"):
        assert summary(load(root)) == expected
        assert summary(load(root, streaming=True)) == expected


def test_it_trains_like_any_other(tmp_path, load):
    """The torch data set takes it; images are read by `open_image`, so grey becomes RGB."""
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 5), 77, np.uint8)).save(stream, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"path": None, "bytes": stream.getvalue()}] * 2, "label": [1, 0]}
    root = write_repository(tmp_path / "grey", train=datasets.Dataset.from_dict(rows, features=features))
    images = ImageDataset(load(root)["train"], lambda image, rng: image)
    assert images.class_names == ["a"] and len(images) == 1
    assert images.open_image(0).getpixel((0, 0)) == (77, 77, 77)


def test_configurations_and_revision_reach_load_dataset(tmp_path, load, monkeypatch):
    calls = []

    def fake(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.DatasetDict({"train": table([0, 1])})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *args, **kwargs: ["default", "small"])
    load(None, dataset_repo="some/flowers", dataset_config="small", dataset_revision="abc123")
    ((args, kwargs),) = calls
    assert args == ("some/flowers", "small")
    assert kwargs == {
        "revision": "abc123",
        "token": None,
        "streaming": False,
        "cache_dir": str(tmp_path / "cache"),
    }


def test_errors(tmp_path, load, monkeypatch):
    root = write_repository(tmp_path / "flowers", train=table([0, 1, 2]), test=table([3, 4]))

    def fails(message, data_dir=root, **options):
        with pytest.raises(DataError, match=message):
            load(data_dir, **options)

    fails("give either dataset_repo .* got neither", None)
    fails("give either dataset_repo .* got both", dataset_repo="some/flowers")
    fails("dataset_revision 'main' is of a repository, but .*flowers is a local folder", dataset_revision="main")
    fails("absent does not exist", tmp_path / "absent")
    fails("there is no image_column 'img'; the columns are note, label, image", image_column="img")
    fails("there is no label_column 'class'; the columns are note, label, image", label_column="class")
    fails("image_column 'note' must hold images .* got Value", image_column="note")
    fails("label_column 'image' must hold ClassLabel, integers or strings, got Image", label_column="image")
    fails("layout must be one of auto, classes", layout="flat")
    fails("layout 'query_gallery' needs the splits train, query, gallery; .* has train, test", layout="query_gallery")
    fails("test_share splits classes, but the splits of .* already say .*layout='classes'", test_share=0.3)
    fails("can't load the data set .*flowers' .*BuilderConfig 'small' not found", dataset_config="small")
    offline = re.escape("can't load the data set 'some/absent-flowers' at revision 'v1' (")
    fails(offline, None, dataset_repo="some/absent-flowers", dataset_revision="v1")
    (tmp_path / "empty").mkdir()
    fails("can't load the data set .*empty'", tmp_path / "empty")
    fails("row 1 has the label None; expected 0..4", write_repository(tmp_path / "a", train=table([0, None, 1])))
    unknown = write_repository(tmp_path / "b", train=table([0, 1]), test=table([2, -1]))
    fails("split test: row 1 has the label -1; expected 0..4", unknown)
    fails("holds 1 classes; expected at least two", write_repository(tmp_path / "c", train=table([1, 1])))
    other = table([0], datasets.ClassLabel(names=["x"]))
    saved = datasets.DatasetDict({"train": table([1]), "test": other})
    saved.save_to_disk(tmp_path / "names")
    fails("the splits have different class names", tmp_path / "names")
    saved["test"] = table([0], datasets.Value("int64"))
    saved.save_to_disk(tmp_path / "mixed")
    fails("the labels of some splits have names, those of others have none", tmp_path / "mixed")
    empty = table([]).cast_column("label", datasets.ClassLabel(names=FLOWERS))
    datasets.DatasetDict({"train": table([1]), "test": empty}).save_to_disk(tmp_path / "none")
    fails(r"can't load the data set .*none'", tmp_path / "none")
    loaded = datasets.DatasetDict({"train": table([1]), "test": empty})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: loaded)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *args, **kwargs: ["default"])
    fails("some/flowers: the split test is empty", None, dataset_repo="some/flowers")
