"""search/embedder.py: images in any form to embeddings, retrievers and bare backbones, fingerprints."""

from pathlib import Path

import numpy as np
import pytest
import test_families
import torch
from PIL import Image
from remote_code import remote_model
from transformers import AutoImageProcessor, AutoModel

from vptsp import Embedder, ImageError, VPTSPModel
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.loading_vptsp import name_before
from vptsp.search.fingerprints import model_fingerprint


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (22, 30, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def test_fingerprint_is_the_same_under_the_names_of_earlier_versions_of_transformers(retriever_folder):
    embedder = Embedder.from_pretrained(retriever_folder)

    class Earlier:
        config = embedder.model.config

        @staticmethod
        def state_dict():
            return {name_before(name, "vit"): tensor for name, tensor in embedder.model.state_dict().items()}

    assert "backbone.encoder.layer.0.intermediate.dense.weight" in Earlier.state_dict()
    assert model_fingerprint(Earlier, embedder.preprocess.processor) == embedder.fingerprint


def test_retriever_equals_processor_and_model(retriever_folder, picture):
    embedder = Embedder.from_pretrained(retriever_folder)
    processor = AutoImageProcessor.from_pretrained(retriever_folder, backend="pil")
    model = remote_model(retriever_folder)
    with torch.no_grad():
        expected = model(processor(images=Image.open(picture), return_tensors="pt").pixel_values).embeddings
    torch.testing.assert_close(embedder.embed_images([picture]), expected)
    assert embedder.embedding_dim == 8


def test_every_form_of_an_image_gives_the_same(retriever_folder, picture):
    embedder = Embedder.from_pretrained(retriever_folder, batch_size=2)
    image = Image.open(picture)
    tensor = torch.tensor(np.asarray(image)).permute(2, 0, 1)
    forms = [str(picture), picture, picture.read_bytes(), image, tensor, embedder.preprocess(image)]
    embeddings = embedder.embed_images(forms)
    assert embeddings.shape == (6, 8)
    torch.testing.assert_close(embeddings, embeddings[:1].expand(6, 8))
    torch.testing.assert_close(embedder.embed_images(picture), embeddings[:1])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))


def test_bare_backbone_is_the_line_that_training_prints(backbone_folder, picture):
    embedder = Embedder.from_pretrained(backbone_folder, resize_size=18)
    backbone = AutoModel.from_pretrained(backbone_folder, add_pooling_layer=False)
    pixels = build_image_processor(16, 18, backbone_folder)(images=Image.open(picture), return_tensors="pt")
    with torch.no_grad():
        cls_token = backbone(**pixels).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(cls_token, dim=1)
    torch.testing.assert_close(embedder.embed_images([picture]), expected)
    assert embedder.description()["kind"] == "backbone"


def test_fingerprint_knows_weights_and_preprocessing(retriever_folder, backbone_folder):
    first = Embedder.from_pretrained(retriever_folder)
    assert Embedder.from_pretrained(retriever_folder, dtype=torch.bfloat16).fingerprint == first.fingerprint

    fingerprints = {first.fingerprint, Embedder.from_pretrained(backbone_folder).fingerprint}
    for name in ("prompts.tokens", "head.projection.bias", "backbone.layers.1.mlp.fc1.weight"):
        model = VPTSPModel.from_pretrained(retriever_folder)
        with torch.no_grad():
            model.get_parameter(name).flatten()[-1] += 1e-3
        fingerprints.add(Embedder(model, first.preprocess.processor, "changed").fingerprint)
    model = VPTSPModel.from_pretrained(retriever_folder)
    fingerprints.add(Embedder(model, build_image_processor(16, 17), "changed").fingerprint)
    for name, value in (("adapter_scale", 0.5), ("prompt_mode", "shallow")):
        model = VPTSPModel.from_pretrained(retriever_folder)
        setattr(model.config, name, value)
        fingerprints.add(Embedder(model, first.preprocess.processor, "changed").fingerprint)
    model = VPTSPModel.from_pretrained(retriever_folder)
    model.config.backbone_config.num_attention_heads = 6
    fingerprints.add(Embedder(model, first.preprocess.processor, "changed").fingerprint)
    assert len(fingerprints) == 9


def test_fingerprint_knows_the_angles_of_rotary_positions():
    model, processor = test_families.retriever("dinov3_vit"), build_image_processor(16, 18)
    before = Embedder(model, processor, "one").fingerprint
    model.config.backbone_config.rope_theta = 50.0
    assert Embedder(model, processor, "other").fingerprint != before


def test_half_precision_is_close(retriever_folder, picture):
    exact = Embedder.from_pretrained(retriever_folder).embed_images([picture])
    half = Embedder.from_pretrained(retriever_folder, dtype=torch.bfloat16).embed_images([picture])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.03, rtol=0)


def test_what_is_no_image_is_refused(retriever_folder, tmp_path):
    embedder = Embedder.from_pretrained(retriever_folder)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        embedder.embed_images([broken])
    with pytest.raises(ImageError, match=r"absent\.jpg: there is no such file"):
        embedder.embed_images(["absent.jpg"])
    with pytest.raises(ValueError, match=r"shape \(3, 16, 16\), got \(3, 20, 20\)"):
        embedder.embed_images([torch.zeros(3, 20, 20)])
    with pytest.raises(ValueError, match=r"shape \(3, height, width\), got \(20, 20, 3\)"):
        embedder.embed_images([torch.zeros(20, 20, 3, dtype=torch.uint8)])
    with pytest.raises(TypeError, match="got int"):
        embedder.embed_images([3])
    with pytest.raises(ValueError, match="at least one image"):
        embedder.embed_images([])


def test_options_that_do_not_apply_are_refused(retriever_folder):
    with pytest.raises(ValueError, match="resize_size is for bare backbones"):
        Embedder.from_pretrained(retriever_folder, resize_size=18)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        Embedder.from_pretrained(retriever_folder, batch_size=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_have_no_fingerprint(retriever_folder, dtype):
    embedder = Embedder.from_pretrained(retriever_folder, dtype=dtype)
    assert embedder.fingerprint == Embedder.from_pretrained(retriever_folder).fingerprint
    embedder.model.prompts.tokens.data.normal_()
    with pytest.raises(ValueError, match="have changed since this Embedder was made: make another"):
        embedder.description()


def test_fingerprints_stay_what_they_were():
    """Else every store and index of embeddings would be taken for another model's."""
    folder = Path(__file__).resolve().parents[1] / "fixtures" / "retriever_v1"
    expected = "844d35915596242da3ff74a5a50ee0717d4d664056832f03075cbd5eff940394"
    assert Embedder.from_pretrained(folder).fingerprint == expected
