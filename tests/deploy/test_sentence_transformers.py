"""A saved retriever as sentence-transformers reads it, from a folder; `test_hub.py` has the same from the Hub."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from remote_code import without_registered_classes
from sentence_transformers import SentenceTransformer

from vptsp import Embedder, VPTSPConfig, VPTSPModel, build_image_processor


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(3)
    for name, size in (("a", (40, 30)), ("b", (24, 36))):
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{name}.png")
    turned = Image.open(folder / "a.png")
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    return [str(folder / name) for name in ("a.png", "b.png", "turned.jpg")]


@pytest.fixture(scope="module")
def retriever(backbone_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retriever")
    VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, num_prompts=5).save_pretrained(folder)
    build_image_processor(16, 20, backbone_folder).save_pretrained(folder)
    return folder


def remote_encoder(folder):
    """By the code that lies beside the weights."""
    with without_registered_classes():
        encoder = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    assert type(encoder[0].auto_model).__module__.startswith("transformers_modules.")
    return encoder


def test_embeddings_are_the_same(retriever, photos):
    encoder = remote_encoder(retriever)
    expected = Embedder.from_pretrained(retriever).embed_images(photos)
    encoded = encoder.encode(photos)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, expected, atol=1e-6)
    assert encoder.get_embedding_dimension() == 10
    torch.testing.assert_close(encoder.similarity(encoded, encoded), expected @ expected.T, atol=1e-6, rtol=0)


def test_what_is_saved_again_is_read_too(retriever, photos, tmp_path):
    VPTSPModel.from_pretrained(retriever).save_pretrained(tmp_path)
    build_image_processor(16, 20, retriever).save_pretrained(tmp_path)
    encoder = remote_encoder(tmp_path)
    expected = remote_encoder(retriever).encode(photos)
    np.testing.assert_allclose(encoder.encode(photos), expected, atol=1e-6)


def test_other_libraries_find_widths_and_sizes(vit_config):
    config = VPTSPConfig(num_classes=3, embedding_dim=10, backbone_config=vit_config)
    assert (config.projection_dim, config.hidden_size) == (10, 24)
    assert (config.image_size, config.patch_size) == (16, 8)
    assert not {"projection_dim", "hidden_size", "image_size", "patch_size"} & set(config.to_dict())


def test_the_example_of_langchain_runs(retriever, photos, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "sharing.md"
    section = page.read_text(encoding="utf-8").partition("## In other libraries")[2].partition("\n## ")[0]
    monkeypatch.chdir(Path(photos[0]).parent)
    names = {"name": str(retriever), "revision": None}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    (first, similarity), (second, _) = names["found"]
    assert (first.page_content, second.page_content) == ("a.png", "b.png")
    assert similarity == pytest.approx(1.0, abs=1e-6)
