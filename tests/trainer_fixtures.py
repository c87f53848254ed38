"""Fixtures for tests of the Trainer: images of a few colours, some classes to train on and the others to test."""

import numpy as np
import pytest
from PIL import Image

from vptsp import EvalTransform, ImageDataset, TrainTransform, load_splits


NUM_CLASSES, TRAIN_CLASSES = 8, 5


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Images of 8 classes, each a colour with noise, so that there is something to learn."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (root / f"class{label}").mkdir()
        colour = rng.integers(40, 216, 3)
        for i in range(6):
            pixels = np.clip(colour + rng.normal(0, 15, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    cache = tmp_path_factory.mktemp("cache")
    return load_splits("folder", root, cache_dir=cache, train_classes=[f"class{c}" for c in range(TRAIN_CLASSES)])


@pytest.fixture
def train_dataset(splits):
    return ImageDataset(splits["train"], TrainTransform(16))


@pytest.fixture
def eval_dataset(splits):
    return ImageDataset(splits["test"], EvalTransform(18, 16))
