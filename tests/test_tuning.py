"""What is tuned besides prompts: adapters, shallow prompts, LoRA, the whole backbone."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_vit_config
from remote_code import remote_model
from safetensors.torch import load_file, save_file
from test_modeling_exact import K2, assert_same_step, make_model

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel


NO_PROMPTS = {"num_prompts": 0, "bitfit": False, "proxy_update": "none"}
METHODS = {
    "full": {**NO_PROMPTS, "tune_backbone": True},
    "linear_probe": NO_PROMPTS,
    "bitfit": {**NO_PROMPTS, "bitfit": True},
    "adapter": {**NO_PROMPTS, "adapter_layers": 2, "adapter_dim": 8},
    "adapter_sequential": {"adapter_layers": 4, "adapter_dim": 8, "adapter_mode": "sequential", "adapter_norm": "pre"},
    "lora": {**NO_PROMPTS, "lora_rank": 3, "lora_alpha": 6},
    "lora_bitfit": {"lora_rank": 2, "lora_targets": ["q_proj", "mlp.fc1"]},
    "vpt_shallow": {**NO_PROMPTS, "prompt_mode": "shallow", "num_prompts": 5},
    "vptsp_g": {"bitfit": False, "num_prompts": 5},
}
FIELDS = {"embedding_dim": 10, "num_classes": 3}


def perturb(model):
    """Move what starts at zero, so that nothing hides behind it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name or "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def from_backbone(folder, name):
    torch.manual_seed(0)
    model = perturb(VPTSPForMetricLearning.from_backbone(folder, **FIELDS, **METHODS[name]))
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if parameter.requires_grad and tensor_name not in ("proxies.original_proxies",):
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize("layers, pooling", [(1, "cls"), (3, "cls+mean")])
def test_adapters(mode, norm, layers, pooling):
    fields = {"adapter_layers": layers, "adapter_dim": 7, "adapter_mode": mode, "adapter_norm": norm}
    model = perturb(make_model(**fields, adapter_scale=0.5, pooling=pooling, bitfit=layers == 1))
    assert_same_step(model, K2, images_per_class=2)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("update", ["gru_relu", "none"])
def test_shallow_prompts(pooling, update):
    model = make_model(prompt_mode="shallow", pooling=pooling, proxy_update=update)
    assert model.vptsp.prompts.lengths == (5,)
    assert_same_step(model, K2, images_per_class=2)


def test_shallow_prompts_go_through_all_layers():
    """Not VPT-deep with prompts in the first layer only, which throws their outputs away."""
    shallow, deep = make_model(prompt_mode="shallow"), make_model(prompt_depth=1, class_prompt_depth=1)
    deep.load_state_dict(shallow.state_dict())
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert (shallow(pixel_values).embeddings - deep(pixel_values).embeddings).abs().max() > 1e-3


@pytest.mark.parametrize("update", ["gru_relu", "none"])
def test_full_fine_tuning(update):
    model = make_model(tune_backbone=True, proxy_update=update)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.vptsp.backbone.training
    assert_same_step(model, K2, images_per_class=2)
    assert all(parameter.grad is not None for parameter in model.vptsp.backbone.parameters())


def test_full_fine_tuning_learns_from_the_semantic_pass_too():
    model = make_model(tune_backbone=True)
    pixel_values = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    model(pixel_values, K2, images_per_class=2).proxy_rows.square().sum().backward()
    weights = [layer.mlp.fc1.weight for layer in model.vptsp.backbone.layers]
    assert all(weight.grad.norm() > 0 for weight in weights)


@pytest.mark.parametrize("targets", [None, ["k_proj", "o_proj", "fc1", "fc2"]])
def test_lora(targets):
    model = perturb(make_model(lora_rank=2, lora_alpha=3, lora_targets=targets, bitfit=targets is None))
    assert_same_step(model, K2, images_per_class=2)


def test_lora_is_the_model_with_merged_weights():
    model = perturb(make_model(lora_rank=3, lora_alpha=6.0, lora_targets=["v_proj", "fc1"])).eval()
    plain = make_model().eval()
    state = model.state_dict()
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if name.endswith("base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            tensor = tensor + 2.0 * state[f"{stem}lora_B.default.weight"] @ state[f"{stem}lora_A.default.weight"]
        merged[name.replace("base_layer.", "")] = tensor
    plain.load_state_dict(merged, strict=True)
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(pixel_values).embeddings, plain(pixel_values).embeddings)


@pytest.mark.parametrize("name", ["adapter", "adapter_sequential", "lora", "lora_bitfit"])
def test_what_is_added_starts_as_nothing(backbone_folder, name):
    pixel_values = torch.randn(2, 3, 16, 16)
    for norm in ("pre", "post", "none"):
        fields = {"embedding_dim": 10, **METHODS[name], "adapter_norm": norm, "num_prompts": 0}
        added = VPTSPModel.from_backbone(backbone_folder, **fields).eval()
        plain = VPTSPModel.from_backbone(backbone_folder, num_prompts=0, embedding_dim=10).eval()
        pooled = added.encode(added.embed_patches(pixel_values))
        torch.testing.assert_close(pooled, plain.encode(plain.embed_patches(pixel_values)))
    inner = [p for n, p in added.named_parameters() if "down.weight" in n or "lora_A" in n]
    assert inner
    for weight in inner:  # Kaiming uniform with a = sqrt(5)
        bound = weight.shape[1] ** -0.5
        assert 0.8 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("name", ["adapter_sequential", "lora_bitfit", "full", "vpt_shallow"])
def test_gradient_checkpointing(name):
    fields = {**METHODS[name], "proxy_update": "gru_relu"}
    model = perturb(make_model(**fields))
    model.gradient_checkpointing_enable()
    assert_same_step(model, K2, images_per_class=2)


@pytest.mark.parametrize("name", METHODS)
def test_names_of_what_is_tuned(backbone_folder, name):
    model = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, **METHODS[name])
    heads = ("head.", "adapters.", "prompts.")
    expected = set()
    for parameter in model.state_dict():
        bias = model.config.bitfit and parameter.endswith(".bias")
        if name == "full" or parameter.startswith(heads) or bias or "lora_" in parameter:
            expected.add(parameter)
    assert model.tuned_names() == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    parts = {"adapters." if n.startswith("adapters.") else "lora" if "lora_" in n else None for n in expected}
    assert ("adapters." in parts) == name.startswith("adapter")
    assert ("lora" in parts) == name.startswith("lora")
    if name == "linear_probe":
        assert {n.split(".")[0] for n in expected} == {"head"}


def test_dropout_of_the_backbone_only_where_it_is_tuned_as_a_whole():
    config = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
    pixel_values = torch.randn(2, 3, 16, 16)
    for tune_backbone in (True, False):
        model = VPTSPModel(
            VPTSPConfig(backbone_config=tiny_vit_config(**config), embedding_dim=10, tune_backbone=tune_backbone)
        )
        first, second = (model.train()(pixel_values).embeddings for _ in range(2))
        assert torch.equal(first, second) != tune_backbone
        first, second = (model.eval()(pixel_values).embeddings for _ in range(2))
        assert torch.equal(first, second)


def test_dropout_is_where_the_backbone_has_it():
    config = tiny_vit_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, attn_implementation="eager")
    model = VPTSPModel(
        VPTSPConfig(backbone_config=config, embedding_dim=10, tune_backbone=True, num_prompts=0)
    ).train()
    pixel_values = torch.randn(2, 3, 16, 16)
    torch.manual_seed(4)
    expected = model.backbone(pixel_values).last_hidden_state[:, 1:].mean(dim=1)
    model.config.pooling = "mean"  # all tokens of the last layer, so that the same numbers are drawn
    torch.manual_seed(4)
    torch.testing.assert_close(model.encode(model.embed_patches(pixel_values), model.prompts()), expected)


def test_backbone_alone_is_without_adapters(backbone_folder):
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = VPTSPModel.from_backbone(backbone_folder, num_prompts=0).eval().embed_with_backbone(pixel_values)
    for name in ("adapter", "vpt_shallow"):
        retriever = from_backbone(backbone_folder, name).retriever
        torch.testing.assert_close(retriever.embed_with_backbone(pixel_values), expected)


@pytest.fixture(scope="module")
def saved(backbone_folder, tmp_path_factory):
    """A retriever and a training model of every method, saved, with the embeddings of the same images."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(3)
    pixel_values = torch.randn(2, 3, 16, 16)
    embeddings = {}
    for name in METHODS:
        model = from_backbone(backbone_folder, name)
        model.save_pretrained(root / f"training-{name}")
        model.retriever.save_pretrained(root / name)
        embeddings[name] = model(pixel_values).embeddings.detach()
    save_file({"pixel_values": pixel_values, **embeddings}, root / "expected.safetensors")
    return root


@pytest.mark.parametrize("name", METHODS)
def test_save_and_load(saved, backbone_folder, name):
    model = from_backbone(backbone_folder, name)
    written = load_file(saved / name / "model.safetensors")
    assert set(written) == model.retriever.tuned_names()
    expected = load_file(saved / "expected.safetensors")
    loaded = VPTSPForMetricLearning.from_pretrained(saved / f"training-{name}")
    loaded_state = loaded.state_dict()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(loaded_state[tensor_name], tensor), tensor_name
    retriever = VPTSPModel.from_pretrained(saved / name)
    assert set(retriever.state_dict()) == set(model.retriever.state_dict())
    torch.testing.assert_close(retriever(expected["pixel_values"]).embeddings, expected[name])
    assert {n for n, p in retriever.named_parameters() if p.requires_grad} == retriever.tuned_names()
    model.load_saved(saved / f"training-{name}")


def test_remote_code_without_the_package(saved):
    """AutoModel in a process that can't import vptsp, and peft not before a retriever with LoRA."""
    script = """
import sys
class Block:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "vptsp":
            raise ImportError(name)
sys.meta_path.insert(0, Block)
sys.modules["peft"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModel
expected = load_file("expected.safetensors")
names = sorted(set(expected) - {"pixel_values"}, key=lambda name: "lora" in name)
for name in names:
    if "lora" in name and sys.modules.get("peft", 0) is None:
        try:
            AutoModel.from_pretrained(name, trust_remote_code=True)
            raise SystemExit("must not load without peft")
        except ImportError as error:
            assert "needs the package peft: pip install peft" in str(error), error
        del sys.modules["peft"]
    embeddings = AutoModel.from_pretrained(name, trust_remote_code=True)(expected["pixel_values"]).embeddings
    torch.testing.assert_close(embeddings.detach(), expected[name])
    print(name, sys.modules.get("peft") is not None)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=saved, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(result.stdout.splitlines()) == sorted(f"{name} {'lora' in name}" for name in METHODS)


def test_lora_without_peft_is_refused_by_name(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="lora_rank is 3, which needs the package peft: pip install peft"):
        VPTSPModel.from_pretrained(saved / "lora")
    VPTSPModel.from_pretrained(saved / "adapter")


def test_fingerprint_is_that_of_the_pretrained_backbone(backbone_folder):
    fingerprints = {from_backbone(backbone_folder, name).config.backbone_fingerprint for name in METHODS}
    assert len(fingerprints) == 1
    assert None not in fingerprints


def test_a_tuned_backbone_is_always_saved(backbone_folder, tmp_path):
    model = from_backbone(backbone_folder, "full")
    assert model.config.save_backbone
    with pytest.raises(ValueError, match="save_backbone must be true with tune_backbone, got False"):
        model.save_pretrained(tmp_path, save_backbone=False)


def test_half_precision(saved):
    expected = load_file(saved / "expected.safetensors")
    for name in ("adapter", "lora_bitfit", "vpt_shallow"):
        loaded = VPTSPModel.from_pretrained(saved / name, dtype=torch.bfloat16)
        assert loaded.head.projection.weight.dtype == torch.bfloat16
        embeddings = loaded(expected["pixel_values"]).embeddings
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, expected[name], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"adapter_layers": 5}, "adapter_layers must be <= the backbone's 4 layers, got 5"),
        ({"adapter_layers": None}, "adapter_layers must be an integer >= 0, got None"),
        ({"adapter_dim": 0}, "adapter_dim must be an integer >= 1, got 0"),
        ({"adapter_mode": "behind"}, "adapter_mode must be one of parallel, sequential, got 'behind'"),
        ({"adapter_norm": "both"}, "adapter_norm must be one of pre, post, none, got 'both'"),
        ({"adapter_scale": 0}, "adapter_scale must be > 0, got 0"),
        ({"lora_rank": -1}, "lora_rank must be an integer >= 0, got -1"),
        ({"lora_alpha": "a"}, "lora_alpha must be > 0, got 'a'"),
        ({"lora_targets": "q_proj"}, "lora_targets must be None or a list of names of linear layers, got 'q_proj'"),
        ({"lora_targets": []}, r"lora_targets must be None or a list .* got \[\]"),
        ({"prompt_mode": "flat"}, "prompt_mode must be one of deep, shallow, got 'flat'"),
        ({"prompt_mode": "shallow", "prompt_depth": 3}, "prompt_depth must be None, 0 or 1 with prompt_mode shallow"),
        ({"tune_backbone": True, "lora_rank": 2}, "lora_rank must be 0 with tune_backbone, got 2"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        VPTSPConfig(backbone_config=tiny_vit_config(), **fields)


def test_lora_targets_that_do_not_exist_are_named():
    config = VPTSPConfig(backbone_config=tiny_vit_config(), lora_rank=2, lora_targets=["q_proj", "query"])
    message = r"must name linear layers of the backbone \(fc1, fc2, k_proj, o_proj, q_proj, v_proj\), got 'query'"
    with pytest.raises(ValueError, match=message):
        VPTSPModel(config)


# ---- DoRA


DORA = {"lora_rank": 3, "lora_alpha": 6.0, "use_dora": True}


def norms(backbone):
    """Name of a layer with DoRA -> its tuned norms, and those of its weights' rows."""
    return {
        name: (module.lora_magnitude_vector["default"].weight, module.base_layer.weight.square().sum(1).sqrt())
        for name, module in backbone.named_modules()
        if hasattr(module, "lora_magnitude_vector")
    }


def test_dora_starts_as_the_pretrained_backbone(backbone_folder):
    """Its norms are of the weights that the model has in the end, not of those that it was built with."""
    pixel_values = torch.randn(2, 3, 16, 16)
    plain = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10)
    model = VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, **DORA)
    expected = plain.embed_with_backbone(pixel_values)
    torch.testing.assert_close(model.embed_with_backbone(pixel_values), expected, rtol=0, atol=1e-6)
    for cls in (VPTSPModel, VPTSPForMetricLearning):
        config = VPTSPConfig(backbone_config=tiny_vit_config(), num_classes=3, **DORA)
        found = norms(cls(config).retriever.backbone)
        assert len(found) == 2 * 4
        for tuned, pretrained in found.values():
            torch.testing.assert_close(tuned, pretrained)


@pytest.mark.parametrize("targets", [None, ["k_proj", "o_proj", "fc1", "fc2"]])
def test_dora(targets):
    model = perturb(make_model(**DORA, lora_targets=targets, bitfit=targets is None))
    tuned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("lora_magnitude_vector" in name for name in tuned) == 4 * len(targets or "qv")
    assert_same_step(model, K2, images_per_class=2)


def test_dora_is_the_model_with_merged_weights():
    model = perturb(make_model(**DORA, lora_targets=["v_proj", "fc1"])).eval()
    state, merged = model.state_dict(), {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if name.endswith("base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            tensor = tensor + 2.0 * state[f"{stem}lora_B.default.weight"] @ state[f"{stem}lora_A.default.weight"]
            tensor = tensor / tensor.square().sum(1, keepdim=True).sqrt()
            tensor = state[f"{stem}lora_magnitude_vector.default.weight"][:, None] * tensor
        merged[name.replace("base_layer.", "")] = tensor
    plain = make_model().eval()
    plain.load_state_dict(merged, strict=True)
    pixel_values = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(pixel_values).embeddings, plain(pixel_values).embeddings)


def test_dora_is_saved_and_loaded(backbone_folder, tmp_path):
    model = perturb(VPTSPModel.from_backbone(backbone_folder, embedding_dim=10, **DORA)).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = model(pixel_values).embeddings
    for save_backbone in (False, True):
        folder = tmp_path / str(save_backbone)
        model.save_pretrained(folder, save_backbone=save_backbone)
        loaded = VPTSPModel.from_pretrained(folder)
        assert loaded.config.use_dora
        assert torch.equal(loaded(pixel_values).embeddings, expected)
        assert torch.equal(remote_model(folder)(pixel_values).embeddings, expected)
    training = VPTSPForMetricLearning.from_pretrained(tmp_path / "False", num_classes=3).eval()
    assert torch.equal(training(pixel_values).embeddings, expected)
    name = "backbone.layers.1.attention.q_proj.lora_magnitude_vector.default.weight"
    tensors = load_file(tmp_path / "False" / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "False" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks {name}$"):
        VPTSPModel.from_pretrained(tmp_path / "False")


def test_dora_needs_lora():
    with pytest.raises(ValueError, match="use_dora must be false without lora_rank, got True"):
        VPTSPConfig(backbone_config=tiny_vit_config(), use_dora=True)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_by_peft(backbone_folder, tmp_path, use_dora):
    """The same model; but weights with LoRA in them are not saved beside LoRA, which would count twice."""
    fields = {**DORA, "use_dora": use_dora, "embedding_dim": 10}
    model = perturb(VPTSPModel.from_backbone(backbone_folder, **fields)).eval()
    pixel_values = torch.randn(2, 3, 16, 16)
    expected = model(pixel_values).embeddings
    layers = [module for module in model.backbone.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.merge()
    torch.testing.assert_close(model(pixel_values).embeddings, expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "tuned")  # the frozen weights come from the backbone
    torch.testing.assert_close(VPTSPModel.from_pretrained(tmp_path / "tuned")(pixel_values).embeddings, expected)
    with pytest.raises(ValueError, match=r"merged LoRA into backbone\.layers\.0\.attention\.q_proj, .* unmerge\(\)"):
        model.save_pretrained(tmp_path / "whole", save_backbone=True)
    for layer in layers:
        layer.unmerge()
    model.save_pretrained(tmp_path / "unmerged", save_backbone=False)
    torch.testing.assert_close(VPTSPModel.from_pretrained(tmp_path / "unmerged")(pixel_values).embeddings, expected)
    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    loaded = VPTSPModel.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(loaded(pixel_values).embeddings, expected, rtol=0, atol=1e-5)
