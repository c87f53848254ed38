"""A retriever whose frozen weights are no longer the backbone's is never saved as if they were."""

import pytest
import torch

from vptsp import VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer, VPTSPTrainingArguments
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
