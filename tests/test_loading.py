"""What is loaded is all that was saved, and nothing else: tensors, shapes, dtypes, names, damaged files."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_vit_config
from remote_code import remote_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTForImageClassification, ViTModel

from vptsp import VPTSPForMetricLearning, VPTSPModel
from vptsp.files.atomic import write_json
from vptsp.files.digests import folder_record
from vptsp.loading_vptsp import name_before, name_today


FIELDS = {"num_prompts": 2, "embedding_dim": 6}


def by_auto_model(folder, **options):
    return remote_model(folder, **options)


LOADERS = {
    "VPTSPModel": VPTSPModel.from_pretrained,
    "VPTSPForMetricLearning": lambda folder: VPTSPForMetricLearning.from_pretrained(folder, num_classes=3),
    "AutoModel": by_auto_model,
}


@pytest.fixture
def retriever(backbone_folder):
    """A retriever that nothing of the backbone can stand in for: every tuned tensor differs from the frozen one."""
    model = VPTSPModel.from_backbone(backbone_folder, bitfit=True, **FIELDS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture
def pixel_values():
    return torch.randn(2, 3, 16, 16)


def rewrite(folder, change):
    """Replace the tensors of a folder by what `change` makes of them."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- Missing and surplus tensors


def test_any_tuned_tensor_that_is_missing_is_named(retriever, tmp_path):
    for name in retriever.tuned_names():
        retriever.save_pretrained(tmp_path)
        rewrite(tmp_path, without(name))
        with pytest.raises(ValueError, match=rf"{tmp_path.name}' lacks {name}$"):
            VPTSPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("loader", LOADERS)
def test_all_tuned_biases_missing_at_once(retriever, tmp_path, loader):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {name: tensor for name, tensor in t.items() if not name.startswith("backbone.")})
    with pytest.raises(ValueError, match=r"lacks (vptsp\.)?backbone\.embeddings\.\S+\.bias, .* and \d+ more$"):
        LOADERS[loader](tmp_path)


def test_missing_bias_of_a_training_checkpoint(backbone_folder, tmp_path):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    model.save_pretrained(tmp_path)
    name = "vptsp.backbone.layers.1.attention.q_proj.bias"
    rewrite(tmp_path, without(name))
    for load in (VPTSPForMetricLearning.from_pretrained, VPTSPModel.from_pretrained, model.load_saved):
        with pytest.raises(ValueError, match=r"lacks (vptsp\.)?backbone\.layers\.1\.attention\.q_proj\.bias$"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["embeddings.cls_token", "layers.0.mlp.fc1.weight", "layernorm.bias"])
def test_missing_tensor_of_a_backbone_saved_along(retriever, tmp_path, name):
    retriever.save_pretrained(tmp_path, save_backbone=True)
    rewrite(tmp_path, without(f"backbone.{name}"))
    with pytest.raises(ValueError, match=rf"lacks backbone\.{name}$"):
        VPTSPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("surplus", ["surplus", "backbone.layers.0.mlp.fc1.weight", "backbone.layers.4.mlp.fc1.bias"])
def test_tensors_that_are_not_tuned_are_unknown(retriever, tmp_path, surplus):
    """A weight of the backbone among them would take the place of the one that the fingerprint was taken of."""
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {surplus: torch.zeros(40, 24)})
    with pytest.raises(ValueError, match=f"has unknown {surplus}"):
        VPTSPModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has unknown {surplus}"):
        retriever.load_saved(tmp_path)


# ---- Shapes and dtypes


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["prompts.tokens", "backbone.layernorm.bias"])
def test_another_shape_is_named(retriever, tmp_path, name, loader):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=rf"has (vptsp\.)?{name} \(3, 5\) instead of \(.*24"):
        LOADERS[loader](tmp_path)


def test_arguments_that_would_be_ignored_are_refused(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    refused = {"ignore_mismatched_sizes": True, "variant": "fp16", "from_tf": True, "from_flax": True}
    refused |= {"key_mapping": {"a": "b"}, "gguf_file": "a.gguf", "state_dict": {"a": torch.zeros(1)}}
    for option in ({name: value} for name, value in refused.items()):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is not for VPTSPModel"):
            VPTSPModel.from_pretrained(tmp_path, **option)
    with pytest.raises(ValueError, match="use_safetensors must be true, got False"):
        VPTSPModel.from_pretrained(tmp_path, use_safetensors=False)
    VPTSPModel.from_pretrained(tmp_path, use_safetensors=True, from_tf=False, key_mapping=None)
    with pytest.raises(ValueError, match="leave max_shard_size out"):
        retriever.save_pretrained(tmp_path, max_shard_size="1MB")


@pytest.mark.parametrize("loader", LOADERS)
def test_integers_are_no_weights(retriever, tmp_path, loader):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"prompts.tokens": tensors["prompts.tokens"].to(torch.int8)})
    with pytest.raises(ValueError, match=r"prompts\.tokens in torch\.int8 instead of torch\.float32"):
        LOADERS[loader](tmp_path)


def test_digits_are_only_lost_when_asked_for(retriever, tmp_path, pixel_values):
    retriever.save_pretrained(tmp_path)
    change_config(tmp_path, dtype="bfloat16")
    for loaded in (VPTSPModel.from_pretrained(tmp_path), by_auto_model(tmp_path)):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)
    for loaded in (
        VPTSPModel.from_pretrained(tmp_path, dtype=torch.bfloat16),
        VPTSPModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16),
        by_auto_model(tmp_path, dtype=torch.bfloat16),
        by_auto_model(tmp_path, dtype="bfloat16"),
    ):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_half_precision_stays_what_it_was_saved_in(retriever, tmp_path):
    retriever.to(torch.bfloat16).save_pretrained(tmp_path)
    for loaded in (VPTSPModel.from_pretrained(tmp_path), by_auto_model(tmp_path)):
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert torch.equal(loaded.prompts.tokens, retriever.prompts.tokens)


def test_wider_numbers_are_not_rounded_into_a_model(retriever, tmp_path):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"prompts.tokens": tensors["prompts.tokens"].double()})
    with pytest.raises(ValueError, match=r"prompts\.tokens in torch\.float64 instead of torch\.float32"):
        retriever.load_saved(tmp_path)


def test_class_prompts_of_another_dtype_are_refused(backbone_folder, tmp_path):
    fields = {**FIELDS, "num_classes": 3, "class_prompt_store": "offloaded"}
    VPTSPForMetricLearning.from_backbone(backbone_folder, **fields).save_pretrained(tmp_path)
    path = tmp_path / "class_prompts.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(
        ValueError, match=r"tokens in .*class_prompts\.safetensors must be torch.float32, got torch.fl"
    ):
        VPTSPForMetricLearning.from_pretrained(tmp_path)


# ---- Damaged files, shards, custom code


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_damaged_files_are_named(retriever, tmp_path, backbone_folder):
    retriever.save_pretrained(tmp_path / "retriever")
    cut(tmp_path / "retriever" / "model.safetensors")
    for load in (VPTSPModel.from_pretrained, retriever.load_saved):
        with pytest.raises(ValueError, match=r"retriever/model\.safetensors is damaged"):
            load(tmp_path / "retriever")
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    cut(tmp_path / "backbone" / "model.safetensors")
    with pytest.raises(ValueError, match=r"weights of the backbone '.*/backbone' are damaged"):
        VPTSPModel.from_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / "config.json").write_text('{"model_type": "vit", ')
    with pytest.raises(ValueError, match=r"backbone/config\.json can't be read"):
        VPTSPModel.from_backbone(tmp_path / "backbone")


@pytest.mark.parametrize("load", ["from_backbone", "from_pretrained"])
def test_a_backbone_s_configuration_is_read_once(retriever, tmp_path, backbone_folder, monkeypatch, load):
    retriever.save_pretrained(tmp_path)
    read, opened = [], io.open

    def note(file, *args, **kwargs):
        read.append(str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr("io.open", note)
    monkeypatch.setattr("builtins.open", note)
    getattr(VPTSPModel, load)(backbone_folder if load == "from_backbone" else tmp_path)
    config = (backbone_folder / "config.json").resolve()
    assert [Path(path).resolve() for path in read if path.endswith("config.json")].count(config) == 1


@pytest.mark.parametrize("text, problem", [("{}", "None"), ('{"model_type": "vitt"}', "'vitt'")])
def test_a_backbone_of_no_known_type_is_named(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json must hold a model_type that transformers knows, got {problem}"):
        VPTSPModel.from_backbone(tmp_path)


def test_missing_shard_of_a_backbone_is_named(backbone_folder, tmp_path):
    backbone = ViTModel.from_pretrained(backbone_folder)
    backbone.save_pretrained(tmp_path, max_shard_size="20KB")
    whole = VPTSPModel.from_backbone(tmp_path, **FIELDS)
    assert whole.config.backbone_fingerprint == VPTSPModel.from_backbone(backbone_folder).config.backbone_fingerprint
    last = max(tmp_path.glob("model-*.safetensors"))
    last.unlink()
    with pytest.raises(OSError, match=last.name):
        VPTSPModel.from_backbone(tmp_path)


def test_backbone_with_other_tensors_is_refused(backbone_folder, tmp_path):
    shutil.copytree(backbone_folder, tmp_path / "short")
    change_config(tmp_path / "short", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"has unknown layers\.3\.attention\.k_proj\.bias, .*layers\.3\.mlp"):
        VPTSPModel.from_backbone(tmp_path / "short")
    shutil.copytree(backbone_folder, tmp_path / "registers")
    rewrite(tmp_path / "registers", lambda t: t | {"embeddings.register_tokens": torch.zeros(1, 4, 24)})
    with pytest.raises(ValueError, match=r"has unknown embeddings\.register_tokens$"):
        VPTSPModel.from_backbone(tmp_path / "registers")


def test_what_retrieval_has_no_use_for_is_left_out(tmp_path):
    """A classifier and a mask token, under the names that a classifier's checkpoint has."""
    classifier = ViTForImageClassification(tiny_vit_config())
    classifier.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"vit.embeddings.mask_token": torch.zeros(1, 1, 24)})
    loaded = VPTSPModel.from_backbone(tmp_path).backbone
    assert torch.equal(loaded.layernorm.weight, classifier.vit.layernorm.weight)
    change_config(tmp_path, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"has unknown vit\.layers\.3\.|has unknown layers\.3\."):
        VPTSPModel.from_backbone(tmp_path)


def test_custom_code_of_a_backbone_is_never_offered(backbone_folder, tmp_path, monkeypatch):
    shutil.copytree(backbone_folder, tmp_path / "backbone")
    change_config(
        tmp_path / "backbone",
        model_type="unheard-of",
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    )
    (tmp_path / "backbone" / "evil.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("offered to run the backbone's code"))
    with pytest.raises(ValueError, match="custom code"):
        VPTSPModel.from_backbone(tmp_path / "backbone")


# ---- Names of other versions of transformers


def test_retriever_saved_under_earlier_names(retriever, tmp_path, pixel_values):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name_before(name, "vit"): tensor for name, tensor in tensors.items()})
    assert "backbone.encoder.layer.0.attention.attention.query.bias" in load_file(tmp_path / "model.safetensors")
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)
    name = "backbone.encoder.layer.0.attention.attention.query.bias"
    rewrite(tmp_path, lambda t: t | {"backbone.layers.0.attention.q_proj.bias": t[name] + 1})
    with pytest.raises(ValueError, match=f"has unknown {name}"):
        VPTSPModel.from_pretrained(tmp_path)
    rewrite(tmp_path, without("backbone.layers.0.attention.q_proj.bias"))
    rewrite(tmp_path, without(name))
    with pytest.raises(ValueError, match=r"lacks backbone\.layers\.0\.attention\.q_proj\.bias$"):
        VPTSPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        ViTModel(tiny_vit_config(), add_pooling_layer=False),
        Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=28)),
    ],
    ids=["vit", "dinov2"],
)
def test_names_before_are_those_in_which_transformers_writes_checkpoints(model, tmp_path):
    """transformers still writes files under the names of its earlier versions: an independent source of them."""
    model.save_pretrained(tmp_path)
    model_type, today = model.config.model_type, set(model.state_dict())
    before = set(load_file(tmp_path / "model.safetensors"))
    assert today != before
    assert {name_before(name, model_type) for name in today} == before
    assert {name_today(name, model_type) for name in before} == today
    assert {name_today(name, model_type) for name in today} == today
    assert {name_before(name, model_type) for name in before} == before


# ---- Damage at the same size


def flipped(path, position):
    """Another value for one byte of a file's tensors: the size stays, and the file can still be read."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("position", [-1, -200])
def test_a_changed_byte_of_the_weights_is_noticed(retriever, tmp_path, position):
    retriever.save_pretrained(tmp_path / "retriever")
    flipped(tmp_path / "retriever" / "model.safetensors", position)
    with pytest.raises(ValueError, match=r"retriever/model\.safetensors is damaged: the SHA-256 of its tensors"):
        VPTSPModel.from_pretrained(tmp_path / "retriever")
    with pytest.raises(ValueError, match=r"retriever/model\.safetensors is damaged: the SHA-256 of its tensors"):
        retriever.load_saved(tmp_path / "retriever")


def test_a_changed_byte_of_a_backbone_saved_along_is_noticed(retriever, tmp_path):
    retriever.save_pretrained(tmp_path / "retriever", save_backbone=True)
    flipped(tmp_path / "retriever" / "model.safetensors", -1)
    with pytest.raises(ValueError, match=r"is damaged: the SHA-256"):
        VPTSPModel.from_pretrained(tmp_path / "retriever")


@pytest.mark.parametrize("file", ["model.safetensors", "class_prompts.safetensors"])
def test_a_changed_byte_of_a_checkpoint_is_noticed(backbone_folder, tmp_path, file):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=4, class_prompt_store="offloaded")
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "run.json", {"files": folder_record(tmp_path)})
    VPTSPForMetricLearning.from_pretrained(tmp_path)
    flipped(tmp_path / file, -1)
    with pytest.raises(ValueError, match=rf"{file} (is damaged|has another content)"):
        VPTSPForMetricLearning.from_pretrained(tmp_path)


def test_weights_that_another_tool_wrote_are_read(retriever, tmp_path, pixel_values):
    """Without a digest, as by earlier versions; and the digest is that of the tensors, not of their order."""
    retriever.eval().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    assert metadata["format"] == "pt" and re.fullmatch("[0-9a-f]{64}", metadata["vptsp_sha256"])
    changed = {name: tensor + 1 if name == "prompts.tokens" else tensor.clone() for name, tensor in tensors.items()}
    save_file(changed, file)
    assert not torch.equal(VPTSPModel.from_pretrained(tmp_path)(pixel_values)[0], retriever(pixel_values)[0])
    save_file({name: tensors[name].clone() for name in reversed(tensors)}, file, metadata=metadata)
    assert torch.equal(VPTSPModel.from_pretrained(tmp_path)(pixel_values)[0], retriever(pixel_values)[0])


def test_the_same_weights_are_the_same_bytes(retriever, tmp_path):
    written = set()
    for number in range(8):
        retriever.save_pretrained(tmp_path / str(number))
        written.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("loader", LOADERS)
def test_a_saved_configuration_without_a_backbone_is_named(retriever, tmp_path, loader):
    retriever.save_pretrained(tmp_path)
    change_config(tmp_path, backbone_config=None)
    with pytest.raises(ValueError, match=r"backbone_config in config\.json of .* must be a mapping .* got None"):
        LOADERS[loader](tmp_path)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_that_does_not_exist_is_named(retriever, tmp_path, backbone_folder, name):
    retriever.save_pretrained(tmp_path)
    for load in (VPTSPModel.from_pretrained, by_auto_model):
        with pytest.raises(
            ValueError, match="dtype must be None or a dtype of PyTorch such as float32, got 'nonsense'"
        ):
            load(tmp_path, **{name: "nonsense"})
        assert load(tmp_path, **{name: "float64"}).dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype must be None or a dtype of PyTorch .* got 'nonsense'"):
        VPTSPModel.from_backbone(backbone_folder, dtype="nonsense")
    assert VPTSPModel.from_backbone(backbone_folder, dtype="float64").dtype == torch.float64
    change_config(tmp_path, **{name: "nonsense"})
    with pytest.raises(ValueError, match=f"{name} must be None or a dtype of PyTorch .* got 'nonsense'"):
        VPTSPModel.from_pretrained(tmp_path)


def test_a_changed_byte_of_class_prompts_is_noticed(backbone_folder, tmp_path):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=4, class_prompt_store="offloaded")
    model.save_pretrained(tmp_path)
    loaded = VPTSPForMetricLearning.from_pretrained(tmp_path)
    assert torch.equal(loaded.class_prompts.tokens, model.class_prompts.tokens)
    flipped(tmp_path / "class_prompts.safetensors", -1)
    for load in (VPTSPForMetricLearning.from_pretrained, model.load_saved):
        with pytest.raises(ValueError, match=r"class_prompts\.safetensors is damaged: the SHA-256 of its tensors"):
            load(tmp_path)
    cut(tmp_path / "class_prompts.safetensors")
    with pytest.raises(ValueError, match=r"class_prompts\.safetensors is damaged"):
        VPTSPForMetricLearning.from_pretrained(tmp_path)
    save_file({"tokens": model.class_prompts.tokens}, tmp_path / "class_prompts.safetensors")  # an earlier version's
    VPTSPForMetricLearning.from_pretrained(tmp_path)
