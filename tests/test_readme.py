"""The README's Python runs as written, but for names and sizes that stand for a Hub backbone."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from vptsp import Embedder, VPTSPModel
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.training.model_card import retriever_card


README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def snippet(start):
    """The one block that contains a text."""
    found = [block for block in SNIPPETS if start in block]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def save_noise(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)


def save_turned(path, orientation):
    """A JPEG whose pixels lie on their side, as cameras save them, and what turns it upright."""
    pixels = np.random.default_rng(2).integers(0, 256, (6, 4, 3), dtype=np.uint8).repeat(5, axis=0).repeat(5, axis=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("source", ["README", "card"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_snippets_turn_images_as_training_does(here, backbone_folder, source, orientation):
    torch.manual_seed(3)
    model = VPTSPModel.from_backbone(backbone_folder, embedding_dim=8)
    folder = here / "runs" / "quickstart"
    model.save_pretrained(folder)
    build_image_processor(16, 18).save_pretrained(folder)
    save_turned(here / "turned.jpg", orientation)
    save_noise(here / "b.png", 1)
    codes = [snippet("AutoModel")]
    if source == "card":
        codes = re.findall(r"```python\n(.*?)```", retriever_card(model, folder=folder).text, re.DOTALL)
        *codes, moved = codes  # the last is for a backbone that has been moved
        assert len(codes) == 3 and "path/to/" in moved
    names = {}
    for code in codes:
        drawn = '[Image.new("RGB", (640, 480), colour) for colour in ("red", "blue")]'
        code = code.replace(drawn, '[load_image("turned.jpg"), load_image("b.png")]')
        exec(code.replace("a.png", "turned.jpg"), names)
    expected = Embedder.from_pretrained(folder, device="cpu").embed_images(["turned.jpg", "b.png"])
    torch.testing.assert_close(names["embeddings"], expected)
    if source == "card":
        torch.testing.assert_close(torch.tensor(names["embedding"]), expected[0])
        torch.testing.assert_close(torch.from_numpy(names["encoded"]), expected)


def test_embedding_and_scoring(here, backbone_folder):
    VPTSPModel.from_backbone(backbone_folder, embedding_dim=8).save_pretrained(here / "runs" / "quickstart")
    build_image_processor(16, 18).save_pretrained(here / "runs" / "quickstart")
    save_noise(here / "a.png", 0)
    save_noise(here / "b.png", 1)
    names = {}
    exec(snippet("AutoModel"), names)
    assert names["similarity"].shape == (2, 2)
    torch.testing.assert_close(names["similarity"].diagonal(), torch.ones(2))
    names["labels"] = torch.tensor([0, 0])
    exec(
        snippet("import retrieval_metrics").replace("retrieval_metrics(embed", "scores = retrieval_metrics(embed"),
        names,
    )
    assert names["scores"]["recall_at_1"] == 1.0


def test_training(here, backbone_folder):
    for label in range(6):
        for i in range(3):
            save_noise(here / "photos" / f"class{label}" / f"{i}.png", 10 * label + i)
    code = snippet("VPTSPTrainer")
    for published, small in {
        '"google/vit-base-patch16-224-in21k"': repr(str(backbone_folder)),
        "TrainTransform(224)": "TrainTransform(16)",
        "EvalTransform(256, 224)": "EvalTransform(18, 16)",
        "build_image_processor(224, 256,": "build_image_processor(16, 18,",
        "per_device_train_batch_size=32": "per_device_train_batch_size=6, num_train_epochs=1, use_cpu=True",
    }.items():
        assert published in code
        code = code.replace(published, small)
    exec(code, {})
    assert VPTSPModel.from_pretrained(here / "runs" / "photos").config.num_prompts == 10


def test_every_configuration_that_is_named_exists():
    names = re.findall(r"configs/[a-z0-9_]+\.yaml", README)
    assert names
    assert all((Path(__file__).resolve().parents[1] / name).is_file() for name in names)
