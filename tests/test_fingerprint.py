"""The fingerprint of a backbone: every value counts, no name does; those of the first kind are still checked."""

import hashlib
import json
import random

import pytest
import torch
from conftest import tiny_vit_config
from oracle import first_fingerprint
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from vptsp import VPTSPModel
from vptsp.loading_vptsp import name_before
from vptsp.modeling_vptsp import backbone_fingerprint


FIELDS = {"num_prompts": 2, "embedding_dim": 6}


@pytest.fixture
def weights():
    return ViTModel(tiny_vit_config(), add_pooling_layer=False).state_dict()


@pytest.fixture
def old_retriever(backbone_folder, tmp_path):
    """Folder of a retriever with a fingerprint of the first kind, taken under any names."""

    def save(rename=lambda name: name):
        VPTSPModel.from_backbone(backbone_folder, **FIELDS).save_pretrained(tmp_path / "old")
        stored = ViTModel.from_pretrained(backbone_folder, add_pooling_layer=False).state_dict()
        path = tmp_path / "old" / "config.json"
        fingerprint = first_fingerprint({rename(name): tensor for name, tensor in stored.items()})
        config = {**json.loads(path.read_text()), "backbone_fingerprint": fingerprint}
        path.write_text(json.dumps(config))
        return tmp_path / "old"

    return save


def test_definition(weights):
    digests = []
    for name, tensor in weights.items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else -1
        digests.append((layer, hashlib.sha256(tensor.numpy().tobytes()).digest()))
    joined = b"".join(str(layer).encode() + b" " + digest for layer, digest in sorted(digests))
    expected = hashlib.sha256(joined).hexdigest()
    assert backbone_fingerprint(weights) == f"v2:{expected}"


def test_names_and_their_order_do_not_count(weights):
    expected = backbone_fingerprint(weights)
    items = list(weights.items())
    random.Random(0).shuffle(items)
    assert backbone_fingerprint(dict(items)) == expected
    assert backbone_fingerprint({name_before(name, "vit"): tensor for name, tensor in items}) == expected
    other = {".".join(p if p.isdigit() else f"{p}{i}" for p in n.split(".")): t for i, (n, t) in enumerate(items)}
    assert backbone_fingerprint(other) == expected


def test_layers_that_changed_places_are_seen(weights):
    swap = {"layers.0": "layers.1", "layers.1": "layers.0"}
    swapped = {
        ".".join(
            [swap.get(".".join(name.split(".")[:2]), ".".join(name.split(".")[:2])), *name.split(".")[2:]]
        ): tensor
        for name, tensor in weights.items()
    }
    assert swapped.keys() == weights.keys()
    assert backbone_fingerprint(swapped) != backbone_fingerprint(weights)


def test_every_value_counts(weights):
    expected = backbone_fingerprint(weights)
    for name, tensor in weights.items():
        for place in {0, 1, tensor.numel() // 2 + 1, tensor.numel() - 1}:
            changed = tensor.clone()
            changed.view(-1)[place] = torch.nextafter(changed.view(-1)[place], torch.tensor(9.0))
            assert backbone_fingerprint({**weights, name: changed}) != expected, (name, place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_does_not_count_where_it_holds_the_same_values(weights, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in weights.items()}
    fingerprints = {
        backbone_fingerprint({name: tensor.to(wider) for name, tensor in stored.items()})
        for wider in (dtype, torch.float32, torch.float64)
    }
    assert len(fingerprints) == 1


def test_all_digits_of_float64_count(weights):
    changed = {name: tensor.double() for name, tensor in weights.items()}
    changed["layernorm.weight"][3] += 1e-12
    assert backbone_fingerprint(changed) != backbone_fingerprint(weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_same_checkpoint_however_it_is_loaded(backbone_folder, tmp_path, stored):
    ViTModel.from_pretrained(backbone_folder, dtype=stored).save_pretrained(tmp_path / "backbone")
    fingerprints = [VPTSPModel.from_backbone(tmp_path / "backbone", **FIELDS).config.backbone_fingerprint]
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"image_size": 32}, {"lora_rank": 2}):
        model = VPTSPModel.from_backbone(tmp_path / "backbone", **FIELDS, **options)
        fingerprints.append(model.config.backbone_fingerprint)
    try:
        torch.set_default_dtype(torch.float64)
        model = VPTSPModel.from_backbone(tmp_path / "backbone", **FIELDS)
        fingerprints.append(model.config.backbone_fingerprint)
        model.save_pretrained(tmp_path / "retriever")
        VPTSPModel.from_pretrained(tmp_path / "retriever", dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(set(fingerprints)) == 1
    assert fingerprints[0].startswith("v2:")


@pytest.mark.parametrize("rename", [lambda name: name, lambda name: name_before(name, "vit")], ids=["today", "before"])
def test_fingerprints_of_the_first_kind_are_checked_under_all_names(old_retriever, rename, tmp_path):
    folder = old_retriever(rename)
    saved = json.loads((folder / "config.json").read_text())["backbone_fingerprint"]
    assert len(saved) == 64
    loaded = VPTSPModel.from_pretrained(folder)
    assert loaded.config.backbone_fingerprint == saved, "what it was tuned with is known no better than before"
    torch.manual_seed(7)
    ViTModel(tiny_vit_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=f"not those that the prompts were tuned with .*{saved[:12]} expected"):
        VPTSPModel.from_pretrained(folder, backbone=tmp_path / "other")


def test_what_the_first_kind_can_not_tell(old_retriever, backbone_folder, tmp_path):
    backbone = ViTModel.from_pretrained(backbone_folder)
    name = "layers.0.mlp.fc1.weight"
    tensor = backbone.state_dict()[name]
    step = tensor.numel() // 64
    tensor.view(-1)[step + 1] += 1  # between two samples
    backbone.save_pretrained(tmp_path / "changed")
    VPTSPModel.from_pretrained(old_retriever(), backbone=tmp_path / "changed")
    VPTSPModel.from_backbone(backbone_folder, **FIELDS).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=r"not those that the prompts were tuned with .*v2:"):
        VPTSPModel.from_pretrained(tmp_path / "new", backbone=tmp_path / "changed")


def test_the_right_backbone_under_earlier_names(backbone_folder, tmp_path):
    """A checkpoint that was written by an earlier transformers is the same backbone."""
    VPTSPModel.from_backbone(backbone_folder, **FIELDS).save_pretrained(tmp_path / "retriever")
    ViTModel.from_pretrained(backbone_folder).save_pretrained(tmp_path / "today", save_original_format=False)
    stored = load_file(tmp_path / "today" / "model.safetensors")
    assert "layers.0.attention.q_proj.weight" in stored
    VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=tmp_path / "today")
    before = {name_before(name, "vit"): tensor for name, tensor in stored.items()}
    save_file(before, tmp_path / "today" / "model.safetensors", metadata={"format": "pt"})
    VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=tmp_path / "today")
