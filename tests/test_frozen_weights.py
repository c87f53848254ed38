"""A retriever whose frozen weights are no longer the backbone's is never saved as if they were."""

import pytest
import torch
import torch.nn.utils.prune

from vptsp import VPTSPConfig, VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer, VPTSPTrainingArguments, modeling_vptsp
from vptsp.training.half_precision import frozen_weights_in


MESSAGE = r"frozen weights .* are not those of the backbone .*\(.*\)"
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def make_model(backbone_folder, **fields):
    fields = {"num_classes": 3, "num_prompts": 2, "embedding_dim": 6, "bitfit": False, **fields}
    return VPTSPForMetricLearning.from_backbone(backbone_folder, **fields)


def change(name):
    """One value of a tensor of the backbone, by a way that no version counter sees."""

    def apply(model):
        tensor = model.retriever.backbone.state_dict()[name]
        tensor.data.view(-1)[-1] += 1e-3
        return model

    return apply


def merged_lora(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return wrapped.merge_and_unload()


def trained_module(model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fc1"])
    wrapped = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    return wrapped.unload()


CHANGES = {
    "merge_and_unload": merged_lora,
    "modules_to_save": trained_module,
    "a weight": change("layers.1.mlp.fc1.weight"),
    "a bias": change("layers.3.mlp.fc2.bias"),
    "the positions": change("embeddings.position_embeddings"),
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_not_saved_as_frozen(backbone_folder, tmp_path, changed):
    model = make_model(backbone_folder)
    trainer = VPTSPTrainer(model, VPTSPTrainingArguments(str(tmp_path / "run"), use_cpu=True, eval_strategy="no"))
    model = changed(model)
    for part in (model, model.retriever):
        with pytest.raises(ValueError, match=MESSAGE):
            part.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match=MESSAGE):
            part.push_to_hub("ann/birds")
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.save_model()
    assert not (tmp_path / "saved").exists() and not (tmp_path / "run" / "config.json").exists()
    model.retriever.save_pretrained(tmp_path / "whole", save_backbone=True)  # then it is all there
    loaded = VPTSPModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(PIXELS).embeddings, model.retriever.eval()(PIXELS).embeddings)


def test_modules_of_the_head_may_be_trained_by_peft(backbone_folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(backbone_folder)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(model.retriever, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    retriever = wrapped.unload().eval()
    retriever.save_pretrained(tmp_path / "saved")
    assert torch.equal(VPTSPModel.from_pretrained(tmp_path / "saved")(PIXELS).embeddings, retriever(PIXELS).embeddings)


UNCHANGED = {
    "plain": ({}, None),
    "bitfit": ({"bitfit": True}, None),
    "lora": ({"lora_rank": 2}, None),
    "adapters": ({"adapter_layers": 2, "adapter_dim": 3}, None),
    "all tuned": ({"tune_backbone": True}, None),
    "another size": ({"image_size": 24}, None),
    "half": ({}, torch.bfloat16),
    "half, bitfit": ({"bitfit": True}, torch.float16),
    "double": ({}, torch.float64),
}


@pytest.mark.parametrize("fields, dtype", UNCHANGED.values(), ids=UNCHANGED)
def test_what_is_as_it_was_is_saved_time_and_again(backbone_folder, tmp_path, fields, dtype):
    if fields.get("lora_rank"):
        pytest.importorskip("peft")
    model = make_model(backbone_folder, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    model = model.to(dtype or torch.float32)
    model.save_pretrained(tmp_path / "training")
    VPTSPForMetricLearning.from_pretrained(tmp_path / "training").save_pretrained(tmp_path / "again")
    model.retriever.save_pretrained(tmp_path / "one")
    once = VPTSPModel.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    pixels = torch.randn(2, 3, model.config.backbone_config.image_size, model.config.backbone_config.image_size)
    pixels = pixels.to(once.dtype)
    twice = VPTSPModel.from_pretrained(tmp_path / "two")
    assert torch.equal(once(pixels).embeddings, twice(pixels).embeddings)
    if dtype != torch.float16:
        once.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    else:  # of weights that were rounded twice, the backbone's once rounded are others
        with pytest.raises(ValueError, match=MESSAGE):
            once.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")


def test_checkpoints_of_mixed_precision_are_saved(backbone_folder, tmp_path):
    model = make_model(backbone_folder)
    with frozen_weights_in(torch.bfloat16, model):
        model.save_pretrained(tmp_path / "saved")
        change("layers.2.mlp.fc1.weight")(model)
        with torch.no_grad():
            model.retriever.backbone.state_dict()["layers.2.mlp.fc1.weight"].mul_(1.5)
        with pytest.raises(ValueError, match=MESSAGE):
            model.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("rounded", [False, True])
def test_what_was_changed_before_is_not_noted_by_mixed_precision(backbone_folder, tmp_path, rounded):
    model = make_model(backbone_folder)
    if rounded:
        with frozen_weights_in(torch.bfloat16, model):
            pass
    with torch.no_grad():
        model.retriever.backbone.state_dict()["layers.2.mlp.fc1.weight"].mul_(1.5)
    with frozen_weights_in(torch.bfloat16, model), pytest.raises(ValueError, match=MESSAGE):
        model.save_pretrained(tmp_path / "saved")


def prune(model):
    torch.nn.utils.prune.l1_unstructured(model.retriever.backbone.layers[0].mlp.fc1, "weight", 0.5)


def drop_layers(model):
    model.retriever.backbone.layers = model.retriever.backbone.layers[:2]


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.retriever.backbone.layers[0].mlp.fc1)


def forget_biases(model):  # which would be left out, tuned as they are
    model.config.bitfit = False


RENAMED = {
    "pruned": (prune, r"layers\.0\.mlp\.fc1\.weight, .*weight_mask, .*weight_orig"),
    "layers dropped": (drop_layers, r"layers\.2\."),
    "parametrized": (parametrize, r"parametrizations\.weight"),
    "biases no longer tuned": (forget_biases, r"\.bias"),
}


@pytest.mark.parametrize("change, names", RENAMED.values(), ids=RENAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lost_and_new_weights_are_refused(backbone_folder, tmp_path, change, names, dtype):
    model = make_model(backbone_folder, bitfit=change is forget_biases).to(dtype)
    change(model)
    for part in (model, model.retriever):
        with pytest.raises(ValueError, match=rf"are not those of the backbone .*{names}"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


UNKNOWN = "frozen weights of the model are not known to be those .*never loaded.* saved along .*save_backbone=True"


def test_weights_that_were_never_loaded_are_not_named(backbone_folder, tmp_path):
    config = make_model(backbone_folder).config
    model = VPTSPModel(VPTSPConfig(backbone_config=config.backbone_config, backbone=config.backbone))
    with pytest.raises(ValueError, match=UNKNOWN):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=UNKNOWN):
        model.push_to_hub("ann/birds")
    with frozen_weights_in(torch.bfloat16, model), pytest.raises(ValueError, match=UNKNOWN):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "saved", save_backbone=True)
    again = VPTSPModel.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(PIXELS).embeddings, model.eval()(PIXELS).embeddings)


def saved_along(model, folder, backbone_folder):
    """A retriever that holds its backbone and names it too, as those of the Hub do."""
    model.retriever.save_pretrained(folder, save_backbone=True)
    config = VPTSPConfig.from_pretrained(folder)
    config.backbone = str(backbone_folder)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"tune_backbone": True}, {"lora_rank": 2}], ids=str)
@pytest.mark.parametrize("changed", [False, True])
def test_a_backbone_saved_along_may_be_another(backbone_folder, tmp_path, changed, fields):
    if fields.get("lora_rank"):
        pytest.importorskip("peft")
    model = make_model(backbone_folder, **fields)
    if changed:
        change("layers.1.mlp.fc1.weight")(model)
    folder = saved_along(model, tmp_path / "along", backbone_folder)
    loaded = VPTSPModel.from_pretrained(folder, tune_backbone=False)
    if changed:
        with pytest.raises(ValueError, match=UNKNOWN):
            loaded.save_pretrained(tmp_path / "saved", save_backbone=False)
        loaded.save_pretrained(tmp_path / "saved")  # still with its backbone
    else:
        loaded.save_pretrained(tmp_path / "saved", save_backbone=False)
    again = VPTSPModel.from_pretrained(tmp_path / "saved")
    assert again.config.save_backbone is changed
    assert torch.equal(again(PIXELS).embeddings, loaded(PIXELS).embeddings)


def lora_model(backbone_folder, size=0.1, dtype=torch.float32, **fields):
    pytest.importorskip("peft")
    model = make_model(backbone_folder, lora_rank=2, **fields).retriever
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval().to(dtype), [module for module in model.modules() if hasattr(module, "lora_A")]


SCALINGS = {
    "scaled": (lambda layer: layer.scale_layer(3.0), r"scaled by 12 "),
    "set": (lambda layer: layer.set_scale("default", 0.5), r"scaled by 2 "),
    "disabled": (lambda layer: layer.enable_adapters(False), "switched off"),
    "inactive": (lambda layer: layer.set_adapter([]), "switched off"),
}


@pytest.mark.parametrize("scale, found", SCALINGS.values(), ids=SCALINGS)
def test_lora_that_counts_otherwise_is_refused(backbone_folder, tmp_path, scale, found):
    model, layers = lora_model(backbone_folder)
    scale(layers[-1])
    for save_backbone in (False, True):
        with pytest.raises(ValueError, match=rf"LoRA of backbone\..* lora_alpha / lora_rank = 8 / 2, got it {found}"):
            model.save_pretrained(tmp_path / "saved", save_backbone=save_backbone)
    assert not (tmp_path / "saved").exists()
    layers[-1].enable_adapters(True)
    layers[-1].set_adapter("default")
    layers[-1].unscale_layer()
    model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_merged_lora_on_a_changed_weight_is_refused(backbone_folder, tmp_path, size, use_dora, dtype):
    model, layers = lora_model(backbone_folder, size, dtype, use_dora=use_dora)
    for layer in layers:
        layer.merge()
    model.save_pretrained(tmp_path / "merged")
    weight = layers[0].base_layer.weight.detach()
    kept = weight.clone()
    weight[0, 0] += weight.abs().max()
    with pytest.raises(ValueError, match=MESSAGE):
        model.save_pretrained(tmp_path / "saved")
    weight.copy_(kept)
    for layer in layers:
        layer.unmerge()
    model.save_pretrained(tmp_path / "unmerged")  # however large what was added
    layers[0].base_layer.weight.detach()[0, 0] += 10 * size**2
    with pytest.raises(ValueError, match=MESSAGE):
        model.save_pretrained(tmp_path / "saved")


def test_lora_tuned_while_merged_is_refused(backbone_folder, tmp_path):
    model, layers = lora_model(backbone_folder)
    layers[0].merge()
    layers[0].lora_B["default"].weight.data.mul_(2)
    with pytest.raises(ValueError, match=MESSAGE):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_model_is_saved_without_its_backbone_at_hand(backbone_folder, tmp_path, monkeypatch, dtype):
    model = make_model(backbone_folder, dtype=dtype)

    def refuse(*args, **kwargs):
        raise OSError("no token")

    monkeypatch.setattr(modeling_vptsp, "load_backbone", refuse)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").exists()
