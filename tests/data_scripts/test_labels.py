"""One rule for labels everywhere: integers of 0..C-1; anything else is refused by row and value."""

import math

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from data_fixtures import jpeg_bytes

from vptsp import (
    ClassBalancedBatchSampler,
    DataError,
    EvalTransform,
    ImageDataset,
    TrainTransform,
    collate_images,
    load_splits,
)
from vptsp.data_scripts.labels import check_labels
from vptsp.data_scripts.streaming import StreamedImages
from vptsp.eval.checks import check_labels as check_label_tensor
from vptsp.search.image_sources import ImageSource
from vptsp.search.table_sources import split_source


NO_LABELS = [None, math.nan, 1.0, 0.5, -1, -5, True, "1", np.int64(-2), np.float32(1), np.bool_(True), 2**70]


@pytest.mark.parametrize("value", NO_LABELS, ids=repr)
def test_what_is_no_label_is_refused_by_row_and_value(value):
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    with pytest.raises(DataError) as caught:
        check_labels([0, 2, value, None], None, "table")
    assert str(caught.value) == f"table: row 2 has the label {shown}; expected an integer >= 0"
    with pytest.raises(DataError, match=r"labels: row 2 has the label"):
        ClassBalancedBatchSampler([0, 1, value, 0], 2, 1, seed=0)
    with pytest.raises(DataError, match=r"example 1 has the label"):
        pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        collate_images([{"pixel_values": pixels, "labels": label} for label in (0, value)])


@pytest.mark.parametrize(
    "labels, row, shown",
    [
        (np.array([0, 3, 1]), 1, "3"),
        (np.array([0, 1, -5], np.int8), 2, "-5"),
        (np.array([0, 2**64 - 1], np.uint64), 1, str(2**64 - 1)),
        (np.array([0.0, 1.0]), 0, "0.0"),
        (np.array([True, False]), 0, "True"),
        (np.array([0, None], object), 1, "None"),
        (torch.tensor([2, 1, -1]), 2, "-1"),
        (torch.tensor([0.5]), 0, "0.5"),
        (pa.array([0, None, 1]), 1, "None"),
        (pa.chunked_array([[0, 1], [2, -1]]), 3, "-1"),
        (pa.array([0, 1, math.nan]), 0, "0.0"),
    ],
)
def test_arrays_of_every_kind(labels, row, shown):
    with pytest.raises(DataError) as caught:
        check_labels(labels, 3)
    assert str(caught.value) == f"labels: row {row} has the label {shown}; expected 0..2"


def test_what_are_labels():
    for labels in ([2, 0, 1], np.array([2, 0, 1], np.uint8), torch.tensor([2, 0, 1]), pa.array([2, 0, 1])):
        found = check_labels(labels, 3)
        assert found.dtype == np.int64 and found.tolist() == [2, 0, 1]
    assert check_labels([]).shape == (0,)
    with pytest.raises(DataError, match=r"labels must be one-dimensional, got shape \(1, 2\)"):
        check_labels(np.zeros((1, 2), int))


def table(labels, feature):
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {"image": [{"path": None, "bytes": jpeg_bytes(i)} for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


NAMED = datasets.ClassLabel(names=["a", "b", "c"])


@pytest.mark.parametrize("labels, row, shown", [([0, None, 1], 1, "None"), ([0, 1, -1], 2, "-1")])
@pytest.mark.parametrize("feature", [NAMED, datasets.Value("int64")], ids=["named", "numbers"])
def test_tables_and_streams(labels, row, shown, feature):
    rows = table(labels, feature)
    with pytest.raises(DataError, match=rf"column 'label': row {row} has the label {shown}; expected "):
        ImageDataset(rows, EvalTransform(8, 8))
    with pytest.raises(DataError, match=rf"some split: row {row} has the label {shown}; expected "):
        split_source(rows, "some split")
    images = StreamedImages(rows.to_iterable_dataset(), TrainTransform(8), num_classes=3)
    with pytest.raises(DataError, match=rf"row {row} of the stream has the label {shown}; expected 0..2"):
        list(images.batch_sampler(2, 1, seed=0))
    with pytest.raises(DataError, match=rf"row {row} of the stream has the label {shown}; expected 0..2"):
        list(images.evaluation_batches(2))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "feature, labels, row, shown",
    [
        (NAMED, [0, 1, 2, None], 3, "None"),
        (datasets.Value("int32"), [0, -7, 1], 1, "-7"),
        (datasets.Value("string"), ["x", "y", None], 2, "None"),
        (datasets.Value("string"), ["x", " ", "y"], 1, "' '"),
    ],
)
def test_hub(tmp_path, streaming, feature, labels, row, shown):
    table(labels, feature).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=rf"split train: row {row} has the label {shown}; expected"):
        load_splits("hub", tmp_path / "saved", cache_dir=tmp_path / "cache", streaming=streaming)


def test_labels_of_an_evaluation():
    with pytest.raises(ValueError, match=r"query_labels must be >= 0: row 2 has -1"):
        check_label_tensor(torch.tensor([0, 1, -1]), "query_labels")
    with pytest.raises(DataError, match=r"photos: row 1 has the label 2; expected 0..1"):
        ImageSource(["x", "y"], np.array([0, 2]), ["a", "b"], str, "photos")


def test_unreadable_images_keep_their_label_and_are_marked(tmp_path):
    rows = table([0, 1, 2], NAMED).cast_column("image", datasets.Image(decode=False))
    broken = {"image": [*rows["image"][:2], {"path": None, "bytes": b"no image"}], "label": [0, 1, 2]}
    rows = datasets.Dataset.from_dict(broken, features=rows.features)
    skipping = ImageDataset(rows, EvalTransform(8, 8), skip_corrupt=True)
    stream = StreamedImages(rows.to_iterable_dataset(), EvalTransform(8, 8), skip_corrupt=True)
    (keys,) = stream.evaluation_batches(3)
    for examples in ([skipping[row] for row in range(3)], [stream[key] for key in keys]):
        batch = collate_images(examples)
        assert batch["labels"].tolist() == [0, 1, 2] and batch["readable"].tolist() == [True, True, False]
    plain = collate_images([ImageDataset(rows.select([0, 1]), EvalTransform(8, 8))[row] for row in range(2)])
    assert set(plain) == {"pixel_values", "labels"}
