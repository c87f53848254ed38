"""`validation_share`: classes of the training side that don't train."""

import numpy as np
import pytest
from data_fixtures import write_classes

from vptsp import DataArguments, DataError
from vptsp.data_scripts.image_datasets import image_datasets
from vptsp.data_scripts.split_record import record_splits


CLASSES = {name: 2 + i % 3 for i, name in enumerate("abcdefghij")}


@pytest.fixture
def arguments(tmp_path):
    root = write_classes(tmp_path / "photos", CLASSES)
    return lambda **fields: DataArguments(data_dir=str(root), data_cache_dir=str(tmp_path / "cache"), **fields)


def files_by_class(split):
    names = split.features["label"].names
    found = {name: [] for name in names}
    for row in split:
        found[names[row["label"]]].append(row["image"]["path"])
    return found


@pytest.mark.parametrize(
    "options, train, validation",
    [
        ({"test_share": 0.3, "validation_share": 0.3}, "abcde", "fg"),
        ({"test_share": 0, "validation_share": 0.5}, "abcde", "fghij"),
        ({"class_split": "alternate", "validation_share": 0.4}, "acg", "ei"),  # of a, c, e, g, i
        ({"train_classes": list("bdfhj"), "validation_share": 0.4}, "bdf", "hj"),
    ],
)
def test_classes_move_with_their_images_and_labels_of_their_own(arguments, options, train, validation):
    whole = arguments(**{**options, "validation_share": 0}).load_splits()
    splits = arguments(**options).load_splits()
    assert list(splits) == ["train", "validation", *(["test"] if "test" in whole else [])]
    before = files_by_class(whole["train"])
    for name, classes in (("train", train), ("validation", validation)):
        assert files_by_class(splits[name]) == {c: before[c] for c in classes}
        assert splits[name].column_names == whole["train"].column_names
    if "test" in whole:
        assert files_by_class(splits["test"]) == files_by_class(whole["test"])


def test_it_is_random_by_its_seed(arguments):
    names = [
        arguments(test_share=0, class_split="random", split_seed=seed, validation_share=0.3)
        .load_splits()["validation"].features["label"].names
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert names[0] == names[1] != names[2]
    assert all(len(found) == 3 for found in names)


def test_the_record_of_a_run_names_them_and_leads_back(arguments):
    given = arguments(validation_share=0.4)
    images = image_datasets(given)
    record = record_splits(given, images)
    assert list(record["splits"]) == ["train", "validation", "test"]
    assert list(record["splits"]["validation"]["classes"]) == ["d", "e"]
    again = image_datasets(DataArguments(**{**record["data"], "data_cache_dir": given.data_cache_dir}))
    for name, part in again.items():
        assert part.fingerprint() == record["splits"][name]["fingerprint"]
        np.testing.assert_array_equal(part.labels, images[name].labels)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_share": 1.0}, "validation_share must be between 0 and 1"),
        ({"validation_share": -0.1}, "validation_share must be between 0 and 1"),
        ({"validation_share": "much"}, "validation_share must be a number"),
        ({"validation_share": 0.2, "streaming": True}, "a stream has no table of them"),
        ({"validation_share": 0.2, "class_split": "seen"}, "with class_split 'seen' all train and test"),
        ({"validation_share": 0.2}, "validation_share 0.2 of 5 training classes gives 4 for training and 1 for"),
        ({"validation_share": 0.8}, "validation_share 0.8 of 5 training classes gives 1 for training and 4 for"),
    ],
)
def test_what_it_cannot_be(arguments, options, message):
    with pytest.raises(DataError, match=message):
        arguments(**options).load_splits()
