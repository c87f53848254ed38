"""An option of a data set that would change nothing is refused, before any image is looked at where that can be."""

import datasets
import pytest
from data_fixtures import jpeg_bytes, write_classes

from vptsp import DataArguments, DataError, check_data_arguments, load_splits


@pytest.fixture
def saved(tmp_path):
    """What `save_to_disk` writes of four images of two classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"path": f"{number}.jpg", "bytes": jpeg_bytes(number)} for number in range(4)]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_seed": 3}, "split_seed 3 is for class_split random and seen: class_split 'first' draws nothing"),
        ({"split_seed": 3, "class_split": "alternate"}, "class_split 'alternate' draws nothing"),
        ({"train_classes": ["a"], "test_share": 0.3}, "train_classes says which .* and so does test_share 0.3"),
        ({"test_classes": ["a"], "test_share": 0.3}, "test_classes says which .* and so does test_share 0.3"),
        ({"test_classes": ["a"], "class_split": "random"}, "test_classes says which .*so does class_split 'random'"),
    ],
)
def test_what_says_how_to_split(options, message, tmp_path):
    root = write_classes(tmp_path / "root", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=message):
        DataArguments(data_dir=str(root), **options)
    if "class_split" not in options or "split_seed" in options:
        with pytest.raises(DataError, match=message):
            load_splits("folder", root, **options)


def test_what_does_have_an_effect_is_taken(tmp_path):
    lists = {"test_classes": ["a"], "class_split": "random", "validation_share": 0.4}  # which classes validate
    assert DataArguments(**lists, split_seed=3).split_seed == 3
    for split in ("random", "seen"):
        assert DataArguments(class_split=split, split_seed=3).split_seed == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_of_what_save_to_disk_wrote(saved, streaming):
    options = {"dataset_config": "small"}
    message = f"dataset_config 'small' is of a repository, but {saved} is what save_to_disk wrote"
    with pytest.raises(DataError, match=message):
        check_data_arguments(DataArguments(dataset_name="hub", data_dir=str(saved), **options))
    with pytest.raises(DataError, match=message):
        load_splits("hub", saved, streaming=streaming, **options)
    assert set(load_splits("hub", saved, streaming=streaming)) == {"train", "test"}


def test_a_root_of_images_that_have_no_paths(saved, tmp_path):
    message = f"image_root '{tmp_path}' is for paths, but the column 'image' holds images"
    with pytest.raises(DataError, match=message):
        load_splits("saved", saved, image_root=str(tmp_path))
    contents = datasets.Dataset.from_dict({"image": [jpeg_bytes(number) for number in range(4)], "label": [*"abab"]})
    contents.to_parquet(tmp_path / "contents.parquet")
    with pytest.raises(DataError, match=message):
        load_splits("table", tmp_path / "contents.parquet", image_root=str(tmp_path))
    assert len(load_splits("table", tmp_path / "contents.parquet")["train"]) == 2


def test_a_column_that_says_another_split_than_the_table_is_of(tmp_path):
    (tmp_path / "two").mkdir()
    for name, label in (("train", "a"), ("test", "b")):
        columns = {"image": [jpeg_bytes(1), jpeg_bytes(2)], "label": [label] * 2, "part": [name] * 2}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "two" / f"{name}-0.parquet")
    assert set(load_splits("saved", tmp_path / "two", split_column="part", cache_dir=tmp_path / "c")) == {
        "train",
        "test",
    }
    datasets.Dataset.from_dict(columns | {"part": ["gallery"] * 2}).to_parquet(tmp_path / "two" / "test-0.parquet")
    with pytest.raises(DataError, match="the table of the split 'test' has a column that says it is 'gallery'"):
        load_splits("saved", tmp_path / "two", split_column="part", cache_dir=tmp_path / "c")
