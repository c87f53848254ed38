import pickle
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_fixtures import write_classes, write_image
from PIL import Image
from torch.utils.data import DataLoader

from vptsp import (
    ClassBalancedBatchSampler,
    DataError,
    EvalTransform,
    ImageDataset,
    ImageError,
    SampleKey,
    TrainTransform,
    collate_images,
    load_splits,
)


COUNTS = {"a": 4, "b": 5, "c": 3, "d": 4, "e": 1, "f": 2}


@pytest.fixture
def splits(tmp_path):
    root = write_classes(tmp_path / "root", COUNTS)
    return load_splits("folder", root, cache_dir=tmp_path / "cache", test_share=0.4)


def test_evaluation_and_training_items(splits):
    evaluation = ImageDataset(splits["train"], EvalTransform(12, 8))
    training = ImageDataset(splits["train"], TrainTransform(8))
    assert len(evaluation) == 16 and evaluation.num_classes == 4 and evaluation.class_names == list("abcd")
    for index, row in enumerate(splits["train"]):
        image = Image.open(row["image"]["path"]).convert("RGB")
        item = evaluation[index]
        assert torch.equal(item["pixel_values"], EvalTransform(12, 8)(image)) and item["labels"] == row["label"]
        item = training[SampleKey(index, 99 + index)]
        assert torch.equal(item["pixel_values"], TrainTransform(8)(image, random.Random(99 + index)))
        assert item["labels"] == row["label"] and type(item["labels"]) is int
    assert torch.equal(evaluation[np.int64(3)]["pixel_values"], evaluation[3]["pixel_values"])
    assert np.array_equal(np.asarray(evaluation.open_image(15)), np.asarray(image))


def test_labels_decode_nothing(splits, monkeypatch):
    shuffled = splits["train"].shuffle(seed=0)
    expected = [row["label"] for row in shuffled]

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    dataset = ImageDataset(shuffled.cast_column("image", datasets.Image()), EvalTransform(8, 8))
    assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == expected
    assert len(dataset) == len(expected)


def test_batches_do_not_depend_on_workers_or_ranks(splits):
    dataset = ImageDataset(splits["train"], TrainTransform(8))

    def batches(num_workers=0, **options):
        sampler = ClassBalancedBatchSampler(dataset.labels, 8, 2, seed=1, **options)
        sampler.set_epoch(3)
        return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_images, num_workers=num_workers))

    alone = batches()
    assert len(alone) == 2
    assert alone[0]["pixel_values"].shape == (8, 3, 8, 8) and alone[0]["pixel_values"].dtype == torch.uint8
    assert alone[0]["labels"].dtype == torch.int64
    assert alone[0]["labels"].reshape(4, 2).unique(dim=1).shape == (4, 1)
    for other in (batches(num_workers=2), [*zip(*(batches(rank=r, world_size=2) for r in range(2)), strict=True)]):
        for batch, same in zip(alone, other, strict=True):
            parts = same if isinstance(same, tuple) else (same,)
            for key in ("pixel_values", "labels"):
                assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))


def test_dataset_is_picklable(splits):
    dataset = ImageDataset(splits["test"], EvalTransform(12, 8))
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[2]["pixel_values"], dataset[2]["pixel_values"])
    assert copy.class_names == ["e", "f"]


def test_other_tables(tmp_path):
    """Hub-style tables: bytes or paths, images that would be decoded, other column names, labels without names."""
    path = write_image(tmp_path / "x.png")
    table = {
        "photo": [{"path": None, "bytes": path.read_bytes()}, {"path": str(path), "bytes": None}],
        "product": [4, 0],
        "more": ["x", "y"],
    }
    features = {"photo": datasets.Image(), "product": datasets.Value("int32"), "more": datasets.Value("string")}
    table = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    dataset = ImageDataset(table, EvalTransform(8, 8), image_column="photo", label_column="product")
    assert torch.equal(dataset[0]["pixel_values"], dataset[1]["pixel_values"])
    assert dataset.labels.tolist() == [4, 0] and dataset.num_classes == 5
    assert dataset.class_names == list("01234")
    with pytest.raises(DataError, match="there is no column 'image'; the columns are photo, product, more"):
        ImageDataset(table, EvalTransform(8, 8))
    with pytest.raises(DataError, match=r"column 'more' must hold images \(datasets.Image\), got Value"):
        ImageDataset(table, EvalTransform(8, 8), image_column="more", label_column="product")
    with pytest.raises(DataError, match="column 'more' must hold integers or ClassLabel, got Value"):
        ImageDataset(table, EvalTransform(8, 8), image_column="photo", label_column="more")


def test_corrupt_image_names_its_file(splits, tmp_path):
    row = splits["train"][2]
    path = Path(row["image"]["path"])
    path.write_bytes(path.read_bytes()[:60])
    dataset = ImageDataset(splits["train"], TrainTransform(8))
    with pytest.raises(ImageError, match=r"root/a/002.png: can't read this image"):
        dataset[SampleKey(2, 0)]
    loader = DataLoader(dataset, batch_sampler=[[SampleKey(2, 0)]], collate_fn=collate_images, num_workers=1)
    batches = iter(loader)
    with pytest.raises(ImageError, match=r"root/a/002.png: can't read this image"):
        next(batches)
    assert list(batches) == []
    stored = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": [{"path": None, "bytes": b"x"}, None], "label": [0, 0]}, stored)
    with pytest.raises(ImageError, match="row 0: can't read"):
        ImageDataset(table, EvalTransform(8, 8))[0]
    with pytest.raises(DataError, match="row 1 has no image in column 'image'"):
        ImageDataset(table, EvalTransform(8, 8))[1]


def test_collate():
    examples = [{"pixel_values": torch.full((3, 2, 2), i, dtype=torch.uint8), "labels": 7 - i} for i in range(3)]
    batch = collate_images(examples)
    assert batch["pixel_values"].shape == (3, 3, 2, 2) and batch["labels"].tolist() == [7, 6, 5]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="at least one example, got none"):
        collate_images([])
