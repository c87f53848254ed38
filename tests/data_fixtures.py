"""Miniature data sets that the tests of the data code make for themselves."""

from pathlib import Path

import numpy as np
from PIL import Image


SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
"""Larger real data, beside a checkout; tests that use it skip where it is absent."""


def write_image(path, size=(12, 10), seed=0):
    """Write one image of noise (any format that the name's extension says) and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_classes(root, counts, extension="png"):
    """Make `root/<class>/NNN.png`, as many per class as `counts` says; return root."""
    root = Path(root)
    for position, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            write_image(root / name / f"{i:03d}.{extension}", seed=100 * position + i)
    return root
