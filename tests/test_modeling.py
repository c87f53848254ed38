"""Models beyond their values: freezing, saving and loading, remote code, errors."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import tiny_vit_config
from remote_code import remote_model
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel
from vptsp.backbones_vptsp import FAMILIES


FIELDS = {"embedding_dim": 10, "num_prompts": 5, "prompt_step": 1}


@pytest.fixture
def retriever(backbone_folder):
    return VPTSPModel.from_backbone(backbone_folder, **FIELDS).eval()


@pytest.fixture
def pixel_values():
    return torch.randn(3, 3, 16, 16)


def train_a_step(model, seed=0):
    """One step of SGD on noise, so that every tuned tensor differs from its initial value."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model.train()(torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 2, 2]), images_per_class=2)
    output.loss.backward()
    model.commit_proxies(output)
    optimizer.step()
    return model.eval()


def test_embeddings_are_normalised_and_named_as_auto_models_name_them(retriever, pixel_values):
    output = retriever(pixel_values)
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(3))
    assert output.pooler_output is output.embeddings
    assert output[0] is output.embeddings
    assert output.embeddings.shape == (3, 10)
    as_tuple = retriever(pixel_values, return_dict=False)
    torch.testing.assert_close(as_tuple[0], output.embeddings)


def test_without_prompts_the_backbone_is_the_stock_one(backbone_folder, pixel_values):
    retriever = VPTSPModel.from_backbone(backbone_folder, num_prompts=0, embedding_dim=10).eval()
    expected = ViTModel.from_pretrained(backbone_folder).eval()(pixel_values).last_hidden_state[:, 0]
    torch.testing.assert_close(retriever.encode(retriever.embed_patches(pixel_values)), expected)
    alone = retriever.embed_with_backbone(pixel_values)
    torch.testing.assert_close(alone, torch.nn.functional.normalize(expected, dim=-1))


def test_other_image_sizes_by_interpolation(retriever, backbone_folder):
    large = torch.randn(2, 3, 32, 24)
    with pytest.raises(ValueError, match="doesn't match model"):
        retriever(large)
    backbone = ViTModel.from_pretrained(backbone_folder).eval()
    expected = backbone(large, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    tokens = retriever.embed_patches(large, interpolate_pos_encoding=True)
    torch.testing.assert_close(retriever.encode(tokens), expected)
    assert retriever(large, interpolate_pos_encoding=True).embeddings.shape == (2, 10)


@pytest.mark.parametrize("bitfit", [True, False])
def test_only_what_is_tuned_gets_gradients(backbone_folder, bitfit):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, bitfit=bitfit, **FIELDS)
    for name, parameter in model.named_parameters():
        in_backbone = ".backbone." in name
        assert parameter.requires_grad == (not in_backbone or (bitfit and name.endswith(".bias"))), name


def test_backbone_stays_in_evaluation_mode(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS).train()
    assert model.training
    assert model.vptsp.embedding_dropout.training
    assert not any(module.training for module in model.vptsp.backbone.modules())


def test_step_leaves_frozen_weights_alone_and_moves_the_rest(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_a_step(model)
    tuned = model.tuned_names()
    for name, tensor in model.state_dict().items():
        if name not in tuned:
            assert torch.equal(tensor, before[name]), name
        elif not name.endswith("k_proj.bias"):
            assert not torch.equal(tensor, before[name]), name


def test_initial_values():
    torch.manual_seed(0)
    config = VPTSPConfig(
        backbone_config=tiny_vit_config(hidden_size=96, num_attention_heads=4),
        num_classes=200,
        num_prompts=40,
        num_class_prompts=6,
        embedding_dim=64,
    )
    model = VPTSPForMetricLearning(config)
    xavier_normal = (2 / (40 + 96)) ** 0.5
    assert model.vptsp.prompts.tokens.std().item() == pytest.approx(xavier_normal, rel=0.02)
    assert model.class_prompts.tokens.std().item() == pytest.approx((2 / (6 + 96)) ** 0.5, rel=0.02)
    bound = (6 / (200 + 64)) ** 0.5 / 8
    assert 0.99 * bound < model.proxies.original_proxies.abs().max() <= bound
    torch.testing.assert_close(model.proxies.state.norm(dim=-1), torch.ones(200))
    gate_bound = (6 / 128) ** 0.5
    for weight in (model.proxies.gru.input_weight, model.proxies.gru.state_weight):
        for gate in weight.chunk(3):
            assert 0.99 * gate_bound < gate.abs().max() <= gate_bound
    head_bound = (6 / (96 + 64)) ** 0.5
    assert 0.99 * head_bound < model.vptsp.head.projection.weight.abs().max() <= head_bound
    zeros = (model.proxies.gru.bias, model.vptsp.head.projection.bias, model.proxy_head.projection.bias)
    assert all((bias == 0).all() for bias in zeros)


@pytest.mark.parametrize("bitfit", [True, False])
def test_save_only_what_is_tuned_and_load_it_back(backbone_folder, tmp_path, pixel_values, bitfit):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, bitfit=bitfit, **FIELDS)
    retriever = train_a_step(model).retriever
    retriever.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == retriever.tuned_names()
    assert any(name.startswith("backbone.") for name in saved) == bitfit
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)
    assert not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == loaded.tuned_names()


def test_save_with_backbone_needs_no_other_folder(retriever, tmp_path, pixel_values):
    retriever.save_pretrained(tmp_path, save_backbone=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"] = "nowhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)


def test_backbone_without_a_name_is_saved(tmp_path, pixel_values):
    retriever = VPTSPModel(VPTSPConfig(backbone_config=tiny_vit_config(), **FIELDS)).eval()
    retriever.save_pretrained(tmp_path)
    loaded = VPTSPModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)


def test_training_model_round_trip(backbone_folder, tmp_path, pixel_values):
    model = train_a_step(VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS))
    model.save_pretrained(tmp_path)
    loaded = VPTSPForMetricLearning.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_retriever_and_training_model_load_each_other(backbone_folder, tmp_path, pixel_values):
    model = train_a_step(VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS))
    model.save_pretrained(tmp_path / "training")
    model.retriever.save_pretrained(tmp_path / "retriever")
    expected = model.retriever(pixel_values).embeddings
    retriever = VPTSPModel.from_pretrained(tmp_path / "training")
    assert torch.equal(retriever(pixel_values).embeddings, expected)
    further = VPTSPForMetricLearning.from_pretrained(tmp_path / "retriever", num_classes=5)
    assert torch.equal(further(pixel_values).embeddings, expected)
    assert further.proxies.state.shape == (5, 10)
    torch.testing.assert_close(further.proxies.state.norm(dim=-1), torch.ones(5))


def test_folder_and_backbone_can_be_moved_together(backbone_folder, tmp_path, pixel_values):
    shutil.copytree(backbone_folder, tmp_path / "here" / "backbone")
    retriever = VPTSPModel.from_backbone(tmp_path / "here" / "backbone", **FIELDS).eval()
    retriever.save_pretrained(tmp_path / "here" / "retriever")
    assert json.loads((tmp_path / "here" / "retriever" / "config.json").read_text())["backbone"] == "../backbone"
    (tmp_path / "here").rename(tmp_path / "there")
    loaded = VPTSPModel.from_pretrained(tmp_path / "there" / "retriever")
    assert torch.equal(loaded(pixel_values).embeddings, retriever(pixel_values).embeddings)


def test_half_precision(retriever, tmp_path, pixel_values):
    retriever.save_pretrained(tmp_path)
    loaded = VPTSPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.backbone.layers[0].attention.q_proj.weight.dtype == torch.bfloat16
    embeddings = loaded(pixel_values).embeddings
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, retriever(pixel_values).embeddings, atol=0.03, rtol=0)


def test_remote_code_without_the_package(retriever, tmp_path, pixel_values, backbone_folder):
    """AutoModel in a new process that can't import vptsp: what is saved must be enough."""
    retriever.save_pretrained(tmp_path / "retriever")
    save_file({"pixel_values": pixel_values}, tmp_path / "images.safetensors")
    script = """
import sys
class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "vptsp":
            raise ImportError(name)
sys.meta_path.insert(0, Block)
from safetensors.torch import load_file, save_file
from transformers import AutoModel
model = AutoModel.from_pretrained("retriever", trust_remote_code=True)
assert "vptsp" not in sys.modules
save_file({"e": model(**load_file("images.safetensors")).embeddings.detach()}, "embeddings.safetensors")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    embeddings = load_file(tmp_path / "embeddings.safetensors")["e"]
    # not to the bit: how kernels round depends on the number of threads and on where tensors lie in memory
    torch.testing.assert_close(embeddings, retriever(pixel_values).embeddings, rtol=0, atol=1e-6)


def test_auto_model_reload_is_identical(retriever, tmp_path, pixel_values):
    retriever.save_pretrained(tmp_path)
    loaded = remote_model(tmp_path)
    assert torch.equal(loaded(pixel_values).pooler_output, retriever(pixel_values).pooler_output)
    loaded.save_pretrained(tmp_path / "again")
    again = remote_model(tmp_path / "again")
    assert torch.equal(again(pixel_values).embeddings, retriever(pixel_values).embeddings)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_and_unknown_tensors_are_named(retriever, tmp_path, backbone_folder):
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("prompts.tokens"))
    with pytest.raises(ValueError, match=r"lacks prompts\.tokens"):
        VPTSPModel.from_pretrained(tmp_path)
    retriever.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(ValueError, match="has unknown surplus"):
        VPTSPModel.from_pretrained(tmp_path)

    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("proxies.state"))
    with pytest.raises(ValueError, match=r"lacks proxies\.state"):
        VPTSPForMetricLearning.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks proxies\.state"):
        model.load_saved(tmp_path)


def test_tensor_of_another_shape_is_refused(backbone_folder, tmp_path):
    small = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    large = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=4, **FIELDS)
    small.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"proxies.original_proxies \(3, 10\) instead of \(4, 10\)"):
        large.load_saved(tmp_path)


def test_another_backbone_is_refused(retriever, tmp_path, pixel_values, backbone_folder):
    retriever.save_pretrained(tmp_path / "retriever")
    torch.manual_seed(5)
    ViTModel(tiny_vit_config()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not those that the prompts were tuned with"):
        VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=tmp_path / "other")
    with pytest.raises(OSError, match="neither a folder here nor to be had from the Hub"):
        VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=tmp_path / "nothing")
    moved = VPTSPModel.from_pretrained(tmp_path / "retriever", backbone=backbone_folder)
    assert torch.equal(moved(pixel_values).embeddings, retriever(pixel_values).embeddings)


def test_bad_input_is_named(retriever, backbone_folder):
    with pytest.raises(ValueError, match=r"must have shape \(B, 3, height, width\), got \(3, 16, 16\)"):
        retriever(torch.randn(3, 16, 16))
    with pytest.raises(ValueError, match="must be normalised floats"):
        retriever(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="VPTSPConfig has no field num_promts"):
        VPTSPModel.from_backbone(backbone_folder, num_promts=3)
    with pytest.raises(ValueError, match="num_classes must be set for training"):
        VPTSPForMetricLearning.from_backbone(backbone_folder)
    with pytest.raises(ValueError, match="backbone_config must be set"):
        VPTSPModel(VPTSPConfig())


def test_unsupported_backbone_is_named(tmp_path):
    from transformers import BertConfig

    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    expected = rf"backbone model type must be one of {', '.join(FAMILIES)}, got 'bert': .* The nearest name is \w+$"
    with pytest.raises(ValueError, match=expected):
        VPTSPModel.from_backbone(tmp_path)


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 0, 3, 3], r"labels must be in 0\.\.2, got 0\.\.3"),
        ([-1, -1, 1, 1], r"labels must be in 0\.\.2, got -1\.\.1"),
        ([0, 0], r"labels must have shape \(4,\), got \(2,\)"),
        ([0, 1, 0, 1], "labels must be class-major with 2 images of each class"),
        ([1, 1, 1, 1], "labels must be class-major with 2 images of each class"),
    ],
)
def test_bad_labels_are_named(backbone_folder, labels, message):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    with pytest.raises(ValueError, match=message):
        model(torch.randn(4, 3, 16, 16), torch.tensor(labels), images_per_class=2)


def test_batch_not_divisible_by_images_per_class(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    with pytest.raises(ValueError, match="batch size 3 is not divisible by images_per_class 2"):
        model(torch.randn(3, 3, 16, 16), torch.tensor([0, 0, 1]), images_per_class=2)


def test_reentrant_checkpointing_is_refused(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


def test_rows_that_are_not_finite_are_not_committed(backbone_folder):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, **FIELDS)
    before = model.proxies.state.clone()
    pixel_values = torch.randn(2, 3, 16, 16)
    pixel_values[1, 0, 0, 0] = torch.nan
    model.commit_proxies(model(pixel_values, torch.tensor([0, 2]), images_per_class=1))
    assert not torch.equal(model.proxies.state[0], before[0])
    assert torch.equal(model.proxies.state[1:], before[1:])


@pytest.mark.parametrize("proxy_update", ["gru_relu", "mean"])
def test_rnn_dropout_drops_before_normalising(backbone_folder, proxy_update):
    fields = {**FIELDS, "num_classes": 3, "rnn_dropout": 0.5, "proxy_update": proxy_update}
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, **fields).train()
    rows = model(torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]), images_per_class=2).proxy_rows
    assert 0.2 < (rows == 0).float().mean() < 0.8
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2))
    rows = model.eval()(torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 1, 1]), images_per_class=2).proxy_rows
    assert (rows != 0).all()


def test_what_other_tools_ask_a_model_for(retriever_folder):
    model = VPTSPModel.from_pretrained(retriever_folder)
    config = model.config
    assert (config.hidden_size, config.image_size, config.patch_size, config.projection_dim) == (24, 16, 8, 8)
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
    tokens = model.get_input_embeddings()(torch.zeros(1, 3, 16, 16))
    assert tokens.shape == (1, 4, 24)
    training = VPTSPForMetricLearning.from_pretrained(retriever_folder, num_classes=3)
    assert training.get_input_embeddings() is training.vptsp.backbone.get_input_embeddings()
