"""`join_datasets`: labels of several data sets become those of one."""

import datasets
import numpy as np
import pytest
from data_fixtures import jpeg_bytes

from vptsp import ClassBalancedBatchSampler, DataError, EvalTransform, ImageDataset, TrainTransform, join_datasets


def table(labels, names=None, first=0, **columns):
    feature = (
        datasets.ClassLabel(names=names)
        if names
        else datasets.Value("string" if labels[0] == str(labels[0]) else "int64")
    )
    features = {"image": datasets.Image(), "label": feature}
    features |= {
        name: datasets.Value("string" if isinstance(values[0], str) else "int64") for name, values in columns.items()
    }
    images = [{"path": None, "bytes": jpeg_bytes(first + i, (24, 20))} for i in range(len(labels))]
    rows = {"image": images, "label": labels, **columns}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


BIRDS = (["wren", "crow", "wren", "kite"], None)
THINGS = ([0, 2, 2], ["kite", "unused", "cup"])


@pytest.mark.parametrize("classes", ["apart", "merged"])
def test_tables(classes):
    parts = {"birds": table(*BIRDS), "things": table(*THINGS, first=9)}
    joined = join_datasets(parts, classes)
    given = ["wren", "crow", "wren", "kite", "kite", "cup", "cup"]
    titles = [
        f"{'birds' if row < 4 else 'things'}/{name}" if classes == "apart" else name for row, name in enumerate(given)
    ]
    feature = joined.features["label"]
    assert [feature.names[label] for label in joined["label"]] == titles
    assert feature.names == list(dict.fromkeys(sorted(titles[:4]) + titles[4:]))  # texts are numbered in sorted order
    assert set(joined["label"]) == set(range(len(feature.names)))
    for part, rows in ((parts["birds"], range(4)), (parts["things"], range(4, 7))):
        for row, image in zip(rows, part["image"], strict=True):
            assert np.array_equal(np.asarray(joined[row]["image"]), np.asarray(image))


@pytest.mark.parametrize("classes", ["apart", "merged"])
def test_image_datasets(classes):
    def wrapped(labels, names, first):
        return ImageDataset(
            table(labels, names, first), EvalTransform(18, 16), skip_corrupt=True, max_image_pixels=10**6
        )

    one, other = wrapped([1, 0, 1], ["crow", "wren"], 0), wrapped(*THINGS, 9)
    joined = join_datasets({"birds": one, "things": other}, classes)
    assert isinstance(joined, ImageDataset) and joined.skips_corrupt and joined.max_image_pixels == 10**6
    assert joined.transform is one.transform and joined.num_classes == 4
    assert joined.labels.tolist() == [1, 0, 1, 2, 3, 3]
    prefixes = ("birds/", "things/") if classes == "apart" else ("", "")
    assert joined.class_names == [f"{prefixes[i > 1]}{name}" for i, name in enumerate(["crow", "wren", "kite", "cup"])]
    for row in range(3):
        assert (joined[row]["pixel_values"] == one[row]["pixel_values"]).all()
        assert (joined[row + 3]["pixel_values"] == other[row]["pixel_values"]).all()
    batches = list(ClassBalancedBatchSampler(joined.labels, batch_size=4, images_per_class=1, seed=0))
    assert batches and all(len({int(joined.labels[int(key)]) for key in batch}) == 4 for batch in batches)


def test_numbers_without_names():
    parts = {"one": table([0, 3, 3]), "other": table([3, 1])}
    joined = join_datasets(parts)
    assert joined.features["label"].names == ["one/0", "one/3", "other/1", "other/3"]
    assert joined["label"] == [0, 1, 1, 3, 2]
    with pytest.raises(DataError, match="one: the labels are numbers, not names"):
        join_datasets(parts, "merged")


def test_columns_that_all_have_go_along(caplog):
    one = table(["a", "b"], price=[1, 2], shop=["x", "y"])
    other = table(["a", "c"], price=[3, 4], shop=[5, 6], colour=["red", "blue"])
    joined = join_datasets({"one": one, "other": other})
    assert joined.column_names == ["image", "label", "price"] and joined["price"] == [1, 2, 3, 4]
    assert "columns that not all of one, other have alike are left out: colour, shop" in caplog.text


REFUSED = {
    "one": (lambda a, b: ({"a": a},), "takes two or more data sets by name, got 'a'"),
    "list": (lambda a, b: ([a, b],), "takes two or more data sets by name"),
    "how": (lambda a, b: ({"a": a, "b": b}, "together"), "classes must be apart or merged, got 'together'"),
    "slash": (lambda a, b: ({"a/b": a, "b": b},), "must be text without '/', got 'a/b'"),
    "mixed": (lambda a, b: ({"a": a, "b": ImageDataset(b, EvalTransform(18, 16))},), "got Dataset, ImageDataset"),
    "stream": (lambda a, b: ({"a": a.to_iterable_dataset(), "b": b.to_iterable_dataset()},), "got IterableDataset"),
    "transforms": (
        lambda a, b: ({"a": ImageDataset(a, TrainTransform(16)), "b": ImageDataset(b, EvalTransform(18, 16))},),
        "transform of the data sets to join must be the same, got TrainTransform.* for a and EvalTransform.* for b",
    ),
    "no label": (lambda a, b: ({"a": a.remove_columns("label"), "b": b},), "a: no column is called label"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_joined(arguments, message):
    one, other = table([0, 1], ["x", "y"]), table([1, 0], ["y", "z"])
    with pytest.raises(DataError, match=message):
        join_datasets(*arguments(one, other))
