"""Images to embed out of tables and whole data sets: ids, classes, columns, and nothing left out."""

import datasets
import numpy as np
import pandas as pd
import pytest
from data_fixtures import jpeg_bytes, write_classes, write_files

from vptsp import (
    DataError,
    ImageSource,
    folder_source,
    joined_source,
    load_splits,
    place_source,
    split_source,
    table_source,
)


ROWS = {
    "file": ["a/1.jpg", "b/2.jpg", "c/3.jpg"],
    "product": ["mug", "", "cup"],
    "price": [1.5, 2.0, None],
    "sku": ["007", "8", "x"],
    "split": ["train", "test", "train"],
}


@pytest.fixture
def shop(tmp_path):
    root = write_files(tmp_path / "shop", {name: jpeg_bytes(i) for i, name in enumerate(ROWS["file"])})
    pd.DataFrame(ROWS).to_csv(root / "products.csv", index=False)
    return root


def described(source):
    return [
        (name, source.class_name(row), source.columns["price"][row], source.columns["sku"][row])
        for row, name in enumerate(source.ids)
    ]


def contents(source):
    stored = [source.stored(row) for row in range(len(source))]
    return [item if isinstance(item, bytes) else open(item, "rb").read() for item in stored]  # noqa: PTH123


def test_a_table_is_one_source_whatever_its_splits(shop, monkeypatch):
    expected = [("a/1.jpg", "mug", 1.5, "007"), ("b/2.jpg", "", 2.0, "8"), ("c/3.jpg", "cup", None, "x")]
    monkeypatch.chdir(shop)
    for source in (place_source(shop / "products.csv"), table_source(pd.DataFrame(ROWS))):
        assert sorted(described(source)) == expected
        assert sorted(contents(source)) == sorted(jpeg_bytes(i) for i in range(3))
        assert source.class_names == ["cup", "mug"]
        assert source.image_root == str(shop)
        assert set(source.columns) == {"price", "sku"}


def test_classes_need_not_be_there(shop):
    pd.DataFrame({"path": ROWS["file"], "price": ROWS["price"]}).to_csv(shop / "t.csv", index=False)
    source = table_source(shop / "t.csv")
    assert source.labels.mask.all() and source.class_names == []
    with pytest.raises(DataError, match="there is no label_column 'kind'"):
        table_source(shop / "t.csv", label_column="kind")


def test_an_imagefolder_and_saved_data(shop, tmp_path):
    pd.DataFrame({"file_name": ROWS["file"], "title": list("xyz")}).to_csv(shop / "metadata.csv", index=False)
    source = place_source(shop)
    assert [(name, source.class_name(row)) for row, name in enumerate(source.ids)] == [
        (name, name[0]) for name in ROWS["file"]
    ]
    assert source.columns == {"title": ["x", "y", "z"]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "a"])}
    features["price"] = datasets.Value("int64")
    rows = {"image": [{"path": None, "bytes": jpeg_bytes(i)} for i in range(3)], "label": [1, None, 0]}
    table = datasets.Dataset.from_dict(rows | {"price": [1, 2, 3]}, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "disk")
    source = place_source(tmp_path / "disk")
    assert source.class_names == ["z", "a"] and source.columns == {"price": [1, 2, 3]}
    assert [source.class_name(row) for row in range(3)] == ["a", "", "z"]
    assert contents(source) == [jpeg_bytes(i) for i in range(3)]


def test_options_of_tables_go_with_tables(shop):
    with pytest.raises(DataError, match=r"label_column: .*shop is no table; all of its images are taken"):
        place_source(shop, label_column="product")
    with pytest.raises(DataError, match="class_split, test_share: all images of a table are taken"):
        place_source(shop / "products.csv", test_share=0.3, class_split="first")


def test_columns_are_checked(shop):
    def source(**columns):
        return ImageSource(["x", "y"], np.ma.array([0, 0]), ["a"], str, "photos", columns=columns)

    assert source(price=[1, None], name=["a", 2.5]).columns["price"] == [1, None]
    for columns, message in (
        ({"price": [1]}, "photos: the column 'price' has 1 values for 2 images"),
        ({"price": [1, [2]]}, r"the column 'price' must hold text, numbers or None, got \[2\] in row 1"),
        ({"price": [1, True]}, "got True in row 1"),
        ({"id": [1, 2]}, "a column can't be called 'id'"),
    ):
        with pytest.raises(DataError, match=message):
            source(**columns)


def test_a_changed_column_is_other_data(shop):
    before = table_source(shop / "products.csv").fingerprint()
    assert table_source(shop / "products.csv").fingerprint() == before
    pd.DataFrame({**ROWS, "price": [9.5, 2.0, None]}).to_csv(shop / "products.csv", index=False)
    assert table_source(shop / "products.csv").fingerprint() != before


def test_splits_keep_columns_and_join_to_all_of_the_data(shop, tmp_path):
    pd.DataFrame({**ROWS, "product": ["mug", "cup", "jug"]}).to_csv(shop / "products.csv", index=False)
    splits = load_splits("table", shop / "products.csv", tmp_path / "cache")
    parts = {name: split_source(split, name, shop / "products.csv") for name, split in splits.items()}
    assert parts["train"].ids == ["a/1.jpg", "c/3.jpg"] and parts["train"].columns["sku"] == ["007", "x"]
    everything = joined_source(parts, "all")
    assert described(everything) == [
        ("a/1.jpg", "mug", 1.5, "007"),
        ("c/3.jpg", "jug", None, "x"),
        ("b/2.jpg", "cup", 2.0, "8"),
    ]
    assert contents(everything) == [jpeg_bytes(i) for i in (0, 2, 1)]


def test_joined_splits_hold_each_image_once(tmp_path):
    root = write_classes(tmp_path / "photos", {"a": 3, "b": 2})
    seen = load_splits("folder", root, tmp_path / "cache", class_split="seen")
    parts = {name: split_source(split, name, root) for name, split in seen.items()}
    everything, plain = joined_source(parts, "all"), folder_source(root)
    assert sorted(everything.ids) == plain.ids
    assert {name: everything.class_name(row) for row, name in enumerate(everything.ids)} == {
        name: plain.class_name(row) for row, name in enumerate(plain.ids)
    }
    digits = load_splits("digits", cache_dir=tmp_path / "cache", class_split="seen")
    joined = joined_source({name: split_source(split, name) for name, split in digits.items()}, "all")
    assert len(joined) == 1797 and len(set(joined.ids)) == 1797


def test_training_and_embedding_give_nested_folders_the_same_classes(tmp_path, caplog):
    photos = tmp_path / "photos"
    for place in ("a/front", "a/back/deep", "b"):
        write_classes(photos / place, {"x": 1})
    splits = load_splits("folder", photos, tmp_path / "cache")
    trained = {}
    for split in splits.values():
        names = split.features["label"].names
        trained |= {row["image"]["path"].removeprefix(f"{photos}/"): names[row["label"]] for row in split}
    source = folder_source(photos)
    assert {name: source.class_name(row) for row, name in enumerate(source.ids)} == trained
    assert "all images are of the class" not in caplog.text
    write_classes(tmp_path / "above/inner", {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"Did you mean .*inner"):
        load_splits("folder", tmp_path / "above", tmp_path / "cache")
    folder_source(tmp_path / "above")
    assert "all images are of the class 'inner', its only folder; if the classes are 'a', 'b', give" in caplog.text
