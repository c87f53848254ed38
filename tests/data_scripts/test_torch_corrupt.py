"""Images that can't be read: an error by default, replaced and listed with `skip_corrupt`."""

import gc
import pickle
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_fixtures import write_classes
from torch.utils.data import DataLoader

from vptsp import (
    ClassBalancedBatchSampler,
    EvalTransform,
    ImageDataset,
    ImageError,
    SampleKey,
    TrainTransform,
    collate_images,
    load_splits,
)
from vptsp.data_scripts import torch_dataset
from vptsp.data_scripts.skipped import SkippedImages


@pytest.fixture
def table(tmp_path):
    """Classes a (4 images, the second broken), b (3, the first and third broken) and c (2, both broken)."""
    root = write_classes(tmp_path / "root", {"a": 4, "b": 3, "c": 2, "z": 1})
    for name in ("a/001", "b/000", "b/002", "c/000", "c/001"):
        path = root / f"{name}.png"
        path.write_bytes(path.read_bytes()[:60])
    return load_splits("folder", root, cache_dir=tmp_path / "cache", test_classes=["z"])["train"]


def names(paths):
    return ["/".join(Path(path).with_suffix("").parts[-2:]) for path in paths]


def transform(image, rng):
    """The whole image, untouched: says which one it is."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).clone()
    pixels[0, 0, 0] = rng.randrange(256) if rng else 0
    return pixels


def test_another_image_of_the_class_takes_the_place(table):
    dataset = ImageDataset(table, transform, skip_corrupt=True)
    readable = {row: dataset[row]["pixel_values"] for row in (0, 2, 3, 5)}
    seen = set()
    for seed in range(30):
        example = dataset[SampleKey(1, seed)]
        assert example["labels"] == 0
        pixels = example["pixel_values"]
        assert pixels[0, 0, 0] == random.Random(seed).randrange(256)
        (source,) = [row for row in (0, 2, 3) if torch.equal(readable[row].flatten()[1:], pixels.flatten()[1:])]
        seen.add(source)
        assert torch.equal(
            ImageDataset(table, transform, skip_corrupt=True)[SampleKey(1, seed)]["pixel_values"], pixels
        )
    assert seen == {0, 2, 3}
    assert names(dataset.skipped) == ["a/001"]
    for row in (4, 6):
        example = dataset[SampleKey(row, 9)]
        assert example["labels"] == 1
        assert torch.equal(example["pixel_values"].flatten()[1:], readable[5].flatten()[1:])
    assert names(dataset.skipped) == ["a/001", "b/000", "b/002"]


def test_whole_images_are_as_without_the_option(table):
    plain, skipping = (ImageDataset(table, TrainTransform(8), skip_corrupt=skip) for skip in (False, True))
    key = SampleKey(2, 5)
    assert torch.equal(plain[key]["pixel_values"], skipping[key]["pixel_values"])
    assert plain.skipped == skipping.skipped == []
    with pytest.raises(ImageError, match=r"a/001.png: can't read this image"):
        plain[SampleKey(1, 0)]
    with pytest.raises(ImageError, match=r"a/001.png: can't read this image"):
        plain[1]
    assert plain.skipped == []


def test_a_class_without_readable_images_is_an_error(table):
    dataset = ImageDataset(table, transform, skip_corrupt=True)
    with pytest.raises(
        ImageError, match=r"class 'c' has no image that can be read: '.*c/000.png', '.*c/001.png'; repair"
    ):
        dataset[SampleKey(7, 0)]


def test_evaluation_marks_what_it_can_not_read(table):
    dataset = ImageDataset(table, EvalTransform(10, 8), skip_corrupt=True)
    examples = [dataset[row] for row in range(len(dataset))]
    assert [example["labels"] for example in examples] == [0] * 4 + [1] * 3 + [2] * 2
    readable = [True, False, True, True, False, True, False, False, False]
    assert [example["readable"] for example in examples] == readable
    batch = collate_images(examples)
    assert batch["readable"].tolist() == readable and batch["labels"].tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert not examples[1]["pixel_values"].any() and examples[1]["pixel_values"].shape == (3, 8, 8)
    assert names(dataset.skipped) == ["a/001", "b/000", "b/002", "c/000", "c/001"]
    assert dataset.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 2  # what the table says stays


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_report_what_they_skip(table, start):
    table = table.select(range(7))
    dataset = ImageDataset(table, TrainTransform(8), skip_corrupt=True)
    batches = []
    for options in ({}, {"num_workers": 2 if start == "fork" else 1, "multiprocessing_context": start}):
        sampler = ClassBalancedBatchSampler(dataset.labels, 4, 2, seed=0, num_batches=6)
        if options:
            dataset = ImageDataset(table, TrainTransform(8), skip_corrupt=True)
            assert dataset.skipped == []
        batches.append(list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_images, **options)))
        assert names(dataset.skipped) == ["a/001", "b/000", "b/002"]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])
        assert one["labels"].reshape(2, 2).unique(dim=1).shape == (2, 1)


def test_the_list_of_skipped_images(caplog):
    skipped = SkippedImages()
    path = Path(skipped._path)
    for name in ("b\nc", "a", "é", "a"):
        skipped.add(name)
    copy = pickle.loads(pickle.dumps(skipped))
    copy.add("d")
    copy.add("a")
    assert skipped.names() == copy.names() == ["a", "b\nc", "d", "é"]
    assert caplog.text.count("a can't be read and is skipped") == 1
    del copy
    gc.collect()
    assert path.exists()
    del skipped
    gc.collect()
    assert not path.exists()


def test_headers_are_checked_without_decoding(table, tmp_path, monkeypatch):
    """Files and contents alike; `a/001` and others here have whole headers and are cut off within their pixels."""
    ImageDataset(table, transform).check_headers()
    files = [Path(image["path"]) for image in table["image"]]
    rows = [{"path": f"in a table/{file.name}", "bytes": file.read_bytes()} for file in files]  # the path of no file
    contents = datasets.Dataset.from_dict({"image": rows, "label": table["label"]}, features=table.features)
    ImageDataset(contents, transform).check_headers()
    monkeypatch.setattr(torch_dataset, "_HEADER_BATCH", 4)  # of 9
    rows[5] |= {"bytes": b"no picture"}
    rows[7] |= {"bytes": b""}
    contents = datasets.Dataset.from_dict({"image": rows, "label": table["label"]}, features=table.features)
    for broken in (contents, contents.select(range(5, 9)), contents.select([0, 7, 5])):
        first = rows[7 if len(broken) == 3 else 5]["path"]
        with pytest.raises(ImageError, match=rf"^{re.escape(first)}: can't read this image .*; so can't 1 others"):
            ImageDataset(broken, transform).check_headers()
        ImageDataset(broken, transform, skip_corrupt=True).check_headers()
    files[2].unlink()
    with pytest.raises(ImageError, match=r"002\.png: there is no such file"):
        ImageDataset(table, transform).check_headers()
    with pytest.raises(ImageError, match=r"more than max_image_pixels 3\); so can't 8 others"):
        ImageDataset(table, transform, max_image_pixels=3).check_headers()
