"""The pictures of a run."""

import numpy as np
import pytest
import torch
from PIL import Image

from vptsp import VPTSPModel
from vptsp.eval.evaluated_images import EvaluatedImages, draw_neighbours
from vptsp.training.run_pictures import draw_run


def make_retriever(backbone_folder):
    return VPTSPModel.from_backbone(backbone_folder, num_prompts=3, embedding_dim=8).eval()


class Photos:
    """A data set of noise, as far as pictures need one."""

    def __init__(self, labels, size=(30, 20)):
        self.class_names = [f"class {label}" for label in range(10)]
        rng = np.random.default_rng(0)
        self.images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in labels]
        self.opened = []

    def open_images(self, rows):
        self.opened.append(sorted(rows))
        return {row: self.images[row] for row in rows}

    @staticmethod
    def transform(image, rng):
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)


RECORDS = [{"epoch": 0.5, "proxy_start": [0.5] * 4, "proxy_before": [0.5] * 4}]
LOG = [{"step": 1, "epoch": 0.5, "loss": 1.0, "learning_rate": 0.1}]
NAMES = ["neighbours", "failures", "confusion", "map", "attention", "curves", "proxies"]


@pytest.mark.parametrize("own_gallery", [False, True])
def test_pictures_of_a_run(backbone_folder, tmp_path, own_gallery):
    labels, readable = torch.tensor([0, 1, 2, 3] * 5 + [2]), torch.arange(21) < 20
    embeddings = torch.nn.functional.normalize(torch.randn(21, 8), dim=1)
    dataset, evaluated = Photos(labels), {"query": (embeddings, labels, readable), "gallery": None}
    if own_gallery:
        dataset = {"query": dataset, "gallery": Photos(labels)}
        evaluated["gallery"] = (embeddings.roll(3, 0), labels, readable)
    evaluated = EvaluatedImages(dataset, evaluated)
    retriever = make_retriever(backbone_folder)
    written, problems = draw_run(tmp_path, evaluated, retriever, None, LOG, RECORDS, count=3)
    assert problems == {}
    assert [path.name for path in written] == [f"{name}.png" for name in NAMES]
    assert all(Image.open(path).size[0] > 300 for path in written)
    assert all(20 not in rows for rows in evaluated.queries.opened)  # could not be read
    assert len(evaluated.queries.opened) + (len(evaluated.gallery.opened) if own_gallery else 0) == 7


def test_a_picture_that_can_t_be_drawn_keeps_none_of_the_others(backbone_folder, tmp_path):
    labels = torch.tensor([0, 0, 1, 1])
    embeddings = torch.eye(8)[labels]
    evaluated = EvaluatedImages(Photos(labels), {"query": (embeddings, labels, labels >= 0), "gallery": None})
    written, problems = draw_run(tmp_path, evaluated, make_retriever(backbone_folder), None, LOG, [])
    assert [path.name for path in written] == ["neighbours.png", "attention.png", "curves.png"]
    assert "at least one" in problems["failures"] and "at least one" in problems["confusion"]
    assert "at least 5 embeddings" in problems["map"] and "no record" in problems["proxies"]


def test_photographs_take_little_room(tmp_path):
    rng = np.random.default_rng(0)
    labels = torch.arange(24) % 4
    photos = Photos(labels)
    ramp = np.add.outer(np.arange(300), np.arange(300)) % 256
    noisy = (ramp[..., None] + rng.normal(0, 12, (24, 300, 300, 3))).clip(0, 255).astype(np.uint8)
    photos.images = [Image.fromarray(pixels) for pixels in noisy]
    embeddings = torch.nn.functional.normalize(torch.randn(24, 8), dim=1)
    evaluated = EvaluatedImages(photos, {"query": (embeddings, labels, labels >= 0), "gallery": None})
    path = draw_neighbours(tmp_path / "neighbours.png", evaluated)
    assert path.stat().st_size < 900_000  # noise; photographs take less
    assert Image.open(path).mode == "P"
