"""What is saved: versions of the format, safetensors alone, and nothing of the machine that it was saved on.

`fixtures/retriever_vN` holds a small retriever as each version of the format wrote it, its own remote code included,
with images and the embeddings that it must give. A new version adds its own, with `fixtures/make_retriever.py`.
`fixtures/retriever_ten_files` is of version 1 too, and holds the code as it was before it was gathered in four files.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from remote_code import remote_model
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTModel

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel
from vptsp.configuration_vptsp import FORMAT_VERSION


FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("retriever_*"))


@pytest.fixture
def retriever(backbone_folder):
    return VPTSPModel.from_backbone(backbone_folder, num_prompts=5, embedding_dim=10).eval()


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_version_has_a_fixture():
    versions = [folder.name for folder in FIXTURES if folder.name != "retriever_ten_files"]
    assert versions == [f"retriever_v{i + 1}" for i in range(FORMAT_VERSION)]


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
@pytest.mark.parametrize("code", ["today's", "its own"])
def test_retriever_of_an_earlier_version(folder, code):
    if code == "its own":
        model = remote_model(folder)
        assert type(model).__module__.startswith("transformers_modules.")
    else:
        model = VPTSPModel.from_pretrained(folder)
    expected = load_file(folder / "expected.safetensors")
    with torch.inference_mode():
        embeddings = model(expected["pixel_values"]).embeddings
    torch.testing.assert_close(embeddings, expected["embeddings"], atol=1e-5, rtol=0)
    assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == 8


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)
def test_retriever_of_an_earlier_version_saved_again(folder, tmp_path):
    VPTSPModel.from_pretrained(folder).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION
    expected = load_file(folder / "expected.safetensors")
    embeddings = VPTSPModel.from_pretrained(tmp_path)(expected["pixel_values"]).embeddings
    torch.testing.assert_close(embeddings, expected["embeddings"], atol=1e-5, rtol=0)


def test_newer_format_is_refused(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    change_config(tmp_path, format_version=FORMAT_VERSION + 1, pooling="of tomorrow")
    newer = f"saved by a newer version of vptsp: format_version is {FORMAT_VERSION + 1}, this code reads up to"
    with pytest.raises(ValueError, match=newer):
        VPTSPModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="format_version must be an integer >= 1, got 0"):
        VPTSPConfig(format_version=0)


def test_only_safetensors_are_read(retriever, tmp_path, backbone_folder):
    retriever.save_pretrained(tmp_path / "retriever")
    weights = load_file(tmp_path / "retriever" / "model.safetensors")
    (tmp_path / "retriever" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "retriever" / "pytorch_model.bin")
    for cls in (VPTSPModel, VPTSPForMetricLearning):
        with pytest.raises(OSError, match=r"holds no model\.safetensors: .* never from pickled files"):
            cls.from_pretrained(tmp_path / "retriever")

    shutil.copytree(backbone_folder, tmp_path / "backbone")
    (tmp_path / "backbone" / "model.safetensors").unlink()
    torch.save(ViTModel.from_pretrained(backbone_folder).state_dict(), tmp_path / "backbone" / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"or holds no model\.safetensors"):
        VPTSPModel.from_backbone(tmp_path / "backbone")


def test_paths_of_this_machine_are_not_saved(retriever, tmp_path, backbone_folder):
    retriever.save_pretrained(tmp_path, save_backbone=True)
    text = (tmp_path / "config.json").read_text()
    assert backbone_folder.name not in text
    assert json.loads(text)["backbone"] is None
    assert json.loads(text)["backbone_config"].get("_name_or_path", "") == ""


def test_backbone_is_found_from_a_subfolder(retriever, tmp_path, backbone_folder, monkeypatch):
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    model = VPTSPModel.from_backbone(tmp_path / "backbone", num_prompts=5, embedding_dim=10).eval()
    model.save_pretrained(tmp_path / "repository" / "birds")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = VPTSPModel.from_pretrained(tmp_path / "repository", subfolder="birds")
    assert torch.equal(loaded.prompts.tokens, model.prompts.tokens)


def test_configuration_without_a_backbone(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    change_config(tmp_path, backbone=None)
    with pytest.raises(ValueError, match=r"names no backbone: give its place with backbone="):
        VPTSPModel.from_pretrained(tmp_path)


def test_pushing_has_a_method_of_its_own(retriever, tmp_path):
    with pytest.raises(ValueError, match=r"use model\.push_to_hub"):
        retriever.save_pretrained(tmp_path / "birds", push_to_hub=True)
    assert not (tmp_path / "birds").exists()


def test_another_model_is_not_overwritten(retriever, tmp_path, backbone_folder):
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    before = (tmp_path / "backbone" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"backbone holds another model \(model_type 'vit' in config.json\)"):
        retriever.save_pretrained(tmp_path / "backbone")
    assert (tmp_path / "backbone" / "model.safetensors").read_bytes() == before
    retriever.save_pretrained(tmp_path / "own")
    retriever.save_pretrained(tmp_path / "own")
