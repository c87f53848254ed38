import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vptsp import DataError, load_splits


@pytest.fixture
def load(tmp_path):
    def load_it(**options):
        return load_splits("digits", cache_dir=tmp_path / "cache", **options)

    return load_it


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_scans_are_all_there_and_exact(load):
    splits = load(digit_size=8)
    assert [len(splits["train"]), len(splits["test"])] == [901, 896]
    assert splits["train"].features["label"].names == list("01234")
    assert splits["test"].features["label"].names == list("56789")
    digits = load_digits()
    for split, first in (("train", 0), ("test", 5)):
        order = np.argsort(digits.target, kind="stable")
        order = order[(digits.target[order] >= first) & (digits.target[order] < first + 5)]
        assert [label + first for label in splits[split]["label"]] == digits.target[order].tolist()
        for row, source in list(zip(splits[split], order, strict=True))[::50]:
            expected = [[round(value * 255 / 16) for value in line] for line in digits.images[source]]
            assert np.array_equal(pixels(row), np.stack([expected] * 3, -1))
            assert row["image"]["path"] == f"digits/{digits.target[source]}/{source:04d}.png"


def test_options(load):
    splits = load(train_classes=["3", "1"], test_classes=["8", "0"])
    assert splits["train"].features["label"].names == ["1", "3"]
    assert splits["test"].features["label"].names == ["0", "8"]
    image = pixels(splits["train"][0])
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    small = pixels(load(train_classes=["3", "1"], test_classes=["8", "0"], digit_size=8)["train"][0])
    # enlarging keeps what is where: each block's mean follows the scan's pixel
    blocks = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), small[..., 0].ravel())[0, 1] > 0.98


def test_errors(load):
    with pytest.raises(DataError, match="digit_size must be >= 8, got 4"):
        load(digit_size=4)
    with pytest.raises(DataError, match="digits come with scikit-learn and have no data_dir, got 'x'"):
        load(data_dir="x")
    with pytest.raises(DataError, match="train_classes names unknown classes: 'ten'"):
        load(train_classes=["ten"])
