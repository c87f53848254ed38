"""`head_init`: where the embedding head's projection starts."""

import re

import numpy as np
import pytest
import torch
from conftest import tiny_vit_config
from test_trainer import make_args, make_model

from vptsp import EvalTransform, ImageDataset, VPTSPConfig, VPTSPForMetricLearning, VPTSPTrainer, train
from vptsp.loading_vptsp import find_backbone
from vptsp.training import run, run_arguments
from vptsp.training.head_start import principal_axes
from vptsp.training.run_errors import ConfigError


def start(backbone_folder, folder, dataset, how, eval_dataset=None, steps=1, model=None, **fields):
    """A trainer after a training whose rates are 0, so that the head is as it started."""
    model = make_model(backbone_folder, **fields) if model is None else model
    rates = {"learning_rate": 0.0, "proxy_learning_rate": 0.0, "max_steps": steps}
    trainer = VPTSPTrainer(model=model, args=make_args(folder, head_init=how, **rates), train_dataset=dataset)
    trainer.train()
    return trainer


def normed_features(model, dataset):
    """What the projection gets of the images, cut as for evaluation, by plain numpy from pooled features."""
    still = ImageDataset(dataset.hf_dataset, EvalTransform(18, 16))
    pixels = torch.stack([still[row]["pixel_values"] for row in range(len(still))]).float()
    with torch.no_grad():
        pooled = model.retriever.eval().encode(
            model.retriever.embed_patches((pixels / 255 - 0.5) / 0.5), model.retriever.prompts()
        )
    pooled = pooled.double().numpy()
    centred = pooled - pooled.mean(1, keepdims=True)
    return centred / np.sqrt(pooled.var(1, keepdims=True) + 1e-5), pixels


def test_identity_starts_as_the_backbone(backbone_folder, tmp_path, train_dataset):
    trainer = start(backbone_folder, tmp_path, train_dataset, "identity", embedding_dim=24)
    projection = trainer.model.retriever.head.projection
    assert torch.equal(projection.weight, torch.eye(24)) and not projection.bias.any()
    normed, pixels = normed_features(trainer.model, train_dataset)
    with torch.no_grad():
        found = trainer.model.retriever((pixels / 255 - 0.5) / 0.5).embeddings.numpy()
    np.testing.assert_allclose(found, normed / np.linalg.norm(normed, axis=1, keepdims=True), atol=1e-5)


def test_pca_is_that_of_the_training_features(backbone_folder, tmp_path, train_dataset):
    trainer = start(backbone_folder, tmp_path, train_dataset, "pca", embedding_dim=5)
    normed, pixels = normed_features(trainer.model, train_dataset)
    centred = normed - normed.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:5]
    axes *= np.sign(axes[np.arange(5), np.abs(axes).argmax(1)])[:, None]
    projection = trainer.model.retriever.head.projection
    np.testing.assert_allclose(projection.weight.detach().numpy(), axes, atol=1e-3)
    np.testing.assert_allclose(projection.bias.detach().numpy(), -axes @ normed.mean(0), atol=1e-3)
    expected = centred @ axes.T
    with torch.no_grad():
        found = trainer.model.retriever((pixels / 255 - 0.5) / 0.5).embeddings.numpy()
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3)
    again = start(backbone_folder, tmp_path, train_dataset, "pca", embedding_dim=5)
    assert torch.equal(again.model.retriever.head.projection.weight, projection.weight)


@pytest.mark.parametrize("how", ["identity", "pca"])
def test_two_class_tokens(tmp_path, train_dataset, how):
    from transformers import DeiTConfig, DeiTModel

    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=16, patch_size=8
    )
    folder = tmp_path / "deit"
    DeiTModel(config).save_pretrained(folder)
    trainer = start(folder, tmp_path / "run", train_dataset, how, embedding_dim=24 if how == "identity" else 4)
    head = trainer.model.retriever.head
    assert torch.equal(head.projection.weight, head.distillation_projection.weight)
    assert torch.equal(head.projection.bias, head.distillation_projection.bias)
    if how == "pca":
        features = trainer._head_inputs(ImageDataset(train_dataset.hf_dataset, EvalTransform(18, 16)))
        assert (features @ head.projection.weight.T + head.projection.bias).mean(0).abs().max() < 1e-4


def test_a_run_that_goes_on_keeps_its_head(backbone_folder, tmp_path, train_dataset, monkeypatch):
    args = {"head_init": "pca", "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "save_total_limit": None}
    whole = VPTSPTrainer(make_model(backbone_folder), make_args(tmp_path, **args), train_dataset=train_dataset)
    whole.train()
    second = VPTSPTrainer(make_model(backbone_folder), make_args(tmp_path, **args), train_dataset=train_dataset)
    monkeypatch.setattr(type(second), "_head_inputs", lambda *_: pytest.fail("the head is started anew"))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_heads_that_can_not_start_so(backbone_folder, tmp_path, train_dataset):
    with pytest.raises(ConfigError, match=r"embedding_dim must be == 24, .* with head_init identity, got 12"):
        start(backbone_folder, tmp_path, train_dataset, "identity")
    with pytest.raises(ConfigError, match=r"embedding_dim must be <= 24, .* with head_init pca, got 30"):
        start(backbone_folder, tmp_path, train_dataset, "pca", embedding_dim=30)
    with pytest.raises(ValueError, match="head_init must be one of xavier, identity, pca, got 'zero'"):
        make_args(tmp_path, head_init="zero")
    trainer = start(backbone_folder, tmp_path, train_dataset, "pca")
    with pytest.raises(ConfigError, match="head_init pca is for a new model, but this one has been tuned"):
        trainer.train()
    trainer.save_retriever(tmp_path / "saved")
    model = VPTSPForMetricLearning.from_pretrained(tmp_path / "saved", num_classes=5)
    with pytest.raises(ConfigError, match="head_init pca is for a new model"):
        start(backbone_folder, tmp_path / "other", train_dataset, "pca", model=model)


LATE = {
    "pca": (
        {"head_init": "pca", "embedding_dim": 30},
        r"must be <= 24, .* pca, got 30: set --embedding_dim 24 or less",
    ),
    "identity": ({"head_init": "identity"}, r"must be == 24, .* identity, got 12: set --embedding_dim 24, or"),
    "depth": ({"prompt_depth": 9}, "prompt_depth must be .* <= the backbone's 4 layers, got 9"),
    "adapters": ({"adapter_layers": 9}, "adapter_layers must be <= the backbone's 4 layers, got 9"),
    "lora": ({"lora_rank": 2, "lora_targets": "q_prj"}, "got 'q_prj'; did you mean 'q_proj'"),
    "peft": (
        {"tuning": "peft", "peft_config": '{"peft_type": "LORA", "target_modules": ["q_prj"]}'},
        "got 'q_prj'; did you mean 'q_proj'",
    ),
    "kind": ({"tuning": "peft", "peft_config": '{"peft_type": "LORRA"}'}, "got 'LORRA'; did you mean 'LORA'"),
    "size": ({"image_size": 20, "resize_size": 20}, "20"),
}


@pytest.mark.parametrize("on_hub", [False, True])
@pytest.mark.parametrize("options, message", LATE.values(), ids=LATE)
def test_what_the_backbone_does_not_allow_is_said_once_it_is_known(
    backbone_folder, tmp_path, monkeypatch, capsys, on_hub, options, message
):
    """Before images are listed or weights are read; of a backbone on the Hub, by its configuration alone."""
    if "peft" in options.values() or "lora_rank" in options:
        pytest.importorskip("peft")
    found = find_backbone(backbone_folder)
    monkeypatch.setattr(run, "image_datasets", lambda *_: pytest.fail("images are listed"))
    monkeypatch.setattr(run, "build_model", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(run_arguments, "find_backbone", lambda *_, **__: found)
    (tmp_path / "photos" / "a").mkdir(parents=True)
    values = {"backbone": "somebody/vit" if on_hub else str(backbone_folder), "embedding_dim": 12, "image_size": 16}
    values |= {"resize_size": 18, "dataset_name": "folder", "data_dir": str(tmp_path / "photos"), **options}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_too_few_images_for_so_many_axes(backbone_folder, tmp_path, train_dataset, monkeypatch):
    monkeypatch.setattr(VPTSPTrainer, "_head_inputs", lambda *_: pytest.fail("images are embedded"))
    few = len(train_dataset.labels)
    pattern = rf"embedding_dim must be <= {few - 1} with head_init pca, got {few}: the {few} training images"
    config = VPTSPConfig(backbone_config=tiny_vit_config(hidden_size=3 * few), num_classes=5, embedding_dim=few)
    with pytest.raises(ConfigError, match=pattern):
        start(backbone_folder, tmp_path, train_dataset, "pca", model=VPTSPForMetricLearning(config))


def test_axes_that_are_not_there():
    features = torch.randn(3, 8)
    with pytest.raises(ConfigError, match=r"embedding_dim must be <= 2 with head_init pca, got 3: the 3 training"):
        principal_axes(features, 3)
    weight, _ = principal_axes(features, 2)
    torch.testing.assert_close(weight @ weight.T, torch.eye(2))
