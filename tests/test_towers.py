"""Checkpoints of an image and a text tower: the image tower as backbone, nothing of the text tower read."""

import json
from pathlib import Path

import pytest
import safetensors
import torch
from hub_stand_in import HubStandIn, Repository
from remote_code import remote_model
from safetensors.torch import load_file, save_file
from test_families import perturb
from test_hub import run
from transformers import (
    CLIPConfig,
    CLIPModel,
    MLCDVisionConfig,
    MLCDVisionModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

from vptsp import VPTSPModel, loading_vptsp
from vptsp.data_scripts.preprocessing import build_image_processor


TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
TEXT = {**TOWER, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**TOWER, "patch_size": 8, "image_size": 16}
MODELS = {
    "clip": (CLIPModel, CLIPConfig, IMAGE),
    "siglip": (SiglipModel, SiglipConfig, IMAGE),
    "siglip2": (Siglip2Model, Siglip2Config, {**TOWER, "patch_size": 8, "num_patches": 4}),
}
FIELDS = {"embedding_dim": 10, "num_prompts": 2}


@pytest.fixture(params=MODELS)
def towers(request, tmp_path):
    """Folder with a checkpoint of both towers, folder with that of the image tower alone."""
    model_class, config_class, image = MODELS[request.param]
    config = config_class(vision_config={**image, "hidden_act": "gelu"}, text_config=TEXT)
    model = perturb(model_class(config))
    model.save_pretrained(tmp_path / "both")
    model.vision_model.save_pretrained(tmp_path / "alone")
    return tmp_path / "both", tmp_path / "alone"


def images(side=16):
    return torch.randn(3, 3, side, side)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def in_shards(folder):
    """Split a checkpoint into a file of the image tower, and one of all else, which is then taken away."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + (not name.startswith('vision_model.'))}-of-2.safetensors" for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model-2-of-2.safetensors").unlink()


def test_the_image_tower_is_the_backbone(towers, tmp_path):
    both, alone = towers
    built = VPTSPModel.from_backbone(both, **FIELDS)
    reference = VPTSPModel.from_backbone(alone, **FIELDS)
    assert built.config.backbone_config.model_type == reference.config.backbone_config.model_type
    assert built.config.backbone_config.hidden_act == "gelu"  # what the checkpoint says, no default
    assert built.config.backbone_fingerprint == reference.config.backbone_fingerprint
    pixel_values = images()
    expected = reference.embed_with_backbone(pixel_values)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=0)
    built.save_pretrained(tmp_path / "retriever")
    saved = json.loads((tmp_path / "retriever" / "config.json").read_text())
    assert saved["backbone"] == "../both"
    assert saved["backbone_config"]["model_type"] == reference.config.backbone_config.model_type
    assert not any(".mlp.fc1.weight" in name for name in load_file(tmp_path / "retriever" / "model.safetensors"))
    expected = built(pixel_values).embeddings
    for loaded in (
        VPTSPModel.from_pretrained(tmp_path / "retriever"),
        remote_model(tmp_path / "retriever"),
        VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=alone),
    ):
        assert torch.equal(loaded(pixel_values).embeddings, expected)


def test_other_weights_of_the_tower_are_seen(towers, tmp_path):
    both, _ = towers
    VPTSPModel.from_backbone(both, **FIELDS).save_pretrained(tmp_path / "retriever")
    change_weights(
        both, lambda tensors: {name: tensor + name.startswith("text_model") for name, tensor in tensors.items()}
    )
    VPTSPModel.from_pretrained(tmp_path / "retriever")
    change_weights(
        both, lambda tensors: {name: tensor + name.startswith("vision_model") for name, tensor in tensors.items()}
    )
    with pytest.raises(ValueError, match="not those that the prompts were tuned with"):
        VPTSPModel.from_pretrained(tmp_path / "retriever")


def test_no_tensor_of_the_text_tower_is_read(towers, monkeypatch):
    both, _ = towers
    read = []

    class Counting:
        def __init__(self, *args, **kwargs):
            self.opened = safetensors.safe_open(*args, **kwargs)

        def __enter__(self):
            self.opened.__enter__()
            return self

        def __exit__(self, *exception):
            return self.opened.__exit__(*exception)

        def keys(self):
            return self.opened.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.opened.get_tensor(name)

    monkeypatch.setattr(loading_vptsp, "safe_open", Counting)
    VPTSPModel.from_backbone(both, **FIELDS)
    expected = {name for name in load_file(both / "model.safetensors") if name.startswith("vision_model.")}
    assert sorted(read) == sorted(expected)


def test_a_missing_shard_of_the_text_tower_is_not_missed(towers):
    both, alone = towers
    expected = VPTSPModel.from_backbone(alone, **FIELDS).config.backbone_fingerprint
    in_shards(both)
    assert VPTSPModel.from_backbone(both, **FIELDS).config.backbone_fingerprint == expected
    file = both / "model-1-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"are damaged: .*model-1-of-2\.safetensors"):
        VPTSPModel.from_backbone(both, **FIELDS)
    file.unlink()
    with pytest.raises(OSError, match=r"model-1-of-2\.safetensors"):
        VPTSPModel.from_backbone(both, **FIELDS)
    index = both / "model.safetensors.index.json"
    for text, message in (
        ('{"weight_map": {"vision_model.a": "../alone/model.safetensors"}}', "must name files beside it, got '../al"),
        ('{"weight_map": ["vision_model.a"]}', "must hold a weight_map"),
        ("{}", "must hold a weight_map"),
        ("{", "must hold a weight_map"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            VPTSPModel.from_backbone(both, **FIELDS)
    index.unlink()
    with pytest.raises(OSError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        VPTSPModel.from_backbone(both, **FIELDS)


def test_incomplete_and_surplus_tensors_are_named(towers):
    both, _ = towers
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    tensors = load_file(both / "model.safetensors")
    change_weights(both, lambda tensors: tensors | {"vision_model.embeddings.position_ids": torch.arange(4)})
    VPTSPModel.from_backbone(both, **FIELDS)  # as earlier versions of transformers wrote them
    change_weights(both, lambda _: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"/both' lacks {name}$"):
        VPTSPModel.from_backbone(both, **FIELDS)
    extra = "vision_model.encoder.layers.2.mlp.fc1.bias"
    change_weights(both, lambda _: {**tensors, extra: torch.zeros(40)})
    with pytest.raises(ValueError, match=rf"/both' has unknown {extra}$"):
        VPTSPModel.from_backbone(both, **FIELDS)
    change_weights(both, lambda _: {**tensors, name: torch.zeros(41)})
    with pytest.raises(ValueError, match=r"another shape: .*encoder\.layers\.1\.mlp\.fc1\.bias"):
        VPTSPModel.from_backbone(both, **FIELDS)


def test_half_precision_is_kept_and_no_digit_lost(towers):
    both, _ = towers
    change_weights(both, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    open_backbone = loading_vptsp.open_backbone
    found = loading_vptsp.find_backbone(both)
    backbone = open_backbone(found)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float16}
    assert not any(buffer.is_meta for buffer in backbone.buffers())
    name = "vision_model.post_layernorm.weight"
    wide = torch.rand(24)
    change_weights(both, lambda tensors: tensors | {name: wide})
    assert torch.equal(open_backbone(found).post_layernorm.weight, wide)


def test_a_configuration_without_its_tower_is_refused(towers):
    both, _ = towers
    path = both / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "vision_config": {**values["vision_config"], "model_type": "vit"}}))
    with pytest.raises(ValueError, match=r"vision_config in .*config\.json must be of model_type '\w+', got 'vit'"):
        VPTSPModel.from_backbone(both)
    del values["vision_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json must say in vision_config what the image tower is, got None"):
        VPTSPModel.from_backbone(both)


def test_mlcd_whose_configuration_is_nested(tmp_path):
    stock = perturb(MLCDVisionModel(MLCDVisionConfig(**IMAGE))).eval()
    stock.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mlcd", "vision_config": values}))
    change_weights(tmp_path, lambda tensors: {f"vision_model.{name}": tensor for name, tensor in tensors.items()})
    built, pixel_values = VPTSPModel.from_backbone(tmp_path, **FIELDS), images()
    expected = torch.nn.functional.normalize(stock(pixel_values).pooler_output, dim=-1)
    torch.testing.assert_close(built.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-5)


def test_the_image_processor_of_a_checkpoint_of_both(towers):
    both, _ = towers
    own = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27], "do_rescale": True}
    own |= {"image_processor_type": "CLIPImageProcessor", "do_normalize": True, "rescale_factor": 1 / 255}
    for file, content in {
        "preprocessor_config.json": {**own, "processor_class": "CLIPProcessor"},
        "processor_config.json": {"image_processor": own, "processor_class": "CLIPProcessor"},
    }.items():
        (both / file).write_text(json.dumps(content))
        processor = build_image_processor(16, 18, backbone=both)
        assert (*processor.image_mean, *processor.image_std) == (0.48, 0.45, 0.4, 0.26, 0.26, 0.27)
        (both / file).unlink()


def test_shards_of_the_text_tower_are_not_fetched_from_the_hub(tmp_path):
    config = CLIPConfig(vision_config=IMAGE, text_config=TEXT)
    perturb(CLIPModel(config)).save_pretrained(tmp_path / "both")
    in_shards(tmp_path / "both")
    files = {file.name: file.read_bytes() for file in (tmp_path / "both").iterdir()}
    files["model-2-of-2.safetensors"] = b"must not be asked for"
    with HubStandIn({"ann": "hf_ann"}) as hub:
        hub.repositories["ann/clip"] = repository = Repository(private=False)
        repository.add_commit("main", {path: hub.keep(content) for path, content in files.items()})
        package = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        run("hub_towers.py", tmp_path, environment={**hub.environment(tmp_path / "home"), **package}, cwd=tmp_path)
        asked = {path.rpartition("/")[2] for _, path in hub.requests}
    saved = json.loads((tmp_path / "retriever" / "config.json").read_text())
    assert (saved["backbone"], saved["backbone_revision"]) == ("ann/clip", repository.branches["main"])
    assert "model-1-of-2.safetensors" in asked
    assert "model-2-of-2.safetensors" not in asked
