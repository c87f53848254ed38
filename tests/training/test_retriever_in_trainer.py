"""A saved retriever is evaluated with the Trainer, without the training model; and `predict` on several sets."""

import numpy as np
import pytest
import torch
from remote_code import remote_model
from test_trainer import make_args, make_model
from transformers import ViTConfig, ViTModel

from vptsp import VPTSPForMetricLearning, VPTSPModel, VPTSPTrainer


@pytest.fixture
def saved(backbone_folder, tmp_path):
    model = make_model(backbone_folder).eval()
    with torch.no_grad():
        model.retriever.head.projection.bias.normal_()
    model.retriever.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def scores(metrics):
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}


@pytest.mark.parametrize("load", ["own", "remote code"])
def test_a_retriever_scores_as_its_training_model(saved, tmp_path, eval_dataset, load):
    retriever = VPTSPModel.from_pretrained(saved) if load == "own" else remote_model(saved)
    trainer = VPTSPTrainer(model=retriever, args=make_args(tmp_path / "run"), eval_dataset=eval_dataset)
    training = VPTSPForMetricLearning.from_pretrained(saved, num_classes=5)
    expected = VPTSPTrainer(model=training, args=make_args(tmp_path / "other"), eval_dataset=eval_dataset)
    assert scores(trainer.evaluate()) == scores(expected.evaluate())
    assert torch.equal(trainer.embed(eval_dataset)[0], expected.embed(eval_dataset)[0])
    trainer.save_retriever(tmp_path / "again")
    again = VPTSPModel.from_pretrained(tmp_path / "again")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, retriever.state_dict()[name]), name


def test_without_arguments(saved, tmp_path, eval_dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = VPTSPTrainer(model=VPTSPModel.from_pretrained(saved), eval_dataset=eval_dataset).evaluate()
    assert 0 <= metrics["eval_recall_at_1"] <= 1


def test_a_retriever_is_not_trained(saved, tmp_path, train_dataset, eval_dataset):
    retriever = VPTSPModel.from_pretrained(saved)
    with pytest.raises(TypeError, match="must be a VPTSPForMetricLearning where there is a train_dataset, got VPTSPM"):
        VPTSPTrainer(model=retriever, args=make_args(tmp_path), train_dataset=train_dataset)
    trainer = VPTSPTrainer(model=retriever, args=make_args(tmp_path), eval_dataset=eval_dataset)
    with pytest.raises(TypeError, match="model is a VPTSPModel, which can be evaluated: training needs"):
        trainer.train()
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=16)
    with pytest.raises(TypeError, match="or a VPTSPModel to evaluate, got ViTModel"):
        VPTSPTrainer(model=ViTModel(config), args=make_args(tmp_path))


@pytest.mark.parametrize("cls, fields", [(VPTSPModel, {}), (VPTSPForMetricLearning, {"num_classes": 5})])
def test_the_backbone_of_a_tuned_model_is_no_line_to_beat(saved, tmp_path, eval_dataset, cls, fields):
    """Its biases came out of the file, so its scores would be called those of the frozen backbone."""
    model = cls.from_pretrained(saved, **fields)
    trainer = VPTSPTrainer(model=model, args=make_args(tmp_path), eval_dataset=eval_dataset)
    with pytest.raises(ValueError, match="the backbone itself has been tuned"):
        trainer.evaluate_backbone()


def test_prediction_of_query_and_gallery(backbone_folder, tmp_path, train_dataset, eval_dataset):
    args = make_args(tmp_path, per_device_eval_batch_size=5)
    trainer = VPTSPTrainer(
        model=make_model(backbone_folder), args=args, compute_metrics=lambda pair: {"images": len(pair.label_ids)}
    )
    query, gallery = torch.utils.data.Subset(eval_dataset, [3, 1, 7]), eval_dataset
    output = trainer.predict({"query": query, "gallery": gallery})
    assert list(output) == ["query", "gallery"]
    embeddings, labels = trainer.embed(eval_dataset)
    np.testing.assert_allclose(output["query"].predictions, embeddings[[3, 1, 7]], atol=1e-6)
    np.testing.assert_allclose(output["gallery"].predictions, embeddings, atol=1e-6)
    assert output["query"].label_ids.tolist() == labels[[3, 1, 7]].tolist()
    assert output["query"].metrics["test_query_images"] == 3
    assert output["gallery"].metrics["test_gallery_images"] == len(eval_dataset)
    named = trainer.predict({"birds": {"query": query, "gallery": gallery}, "all": eval_dataset})
    assert np.array_equal(named["birds"]["query"].predictions, output["query"].predictions)
    assert named["birds"]["query"].metrics["test_birds_query_images"] == 3
    assert "test_all_images" in named["all"].metrics
    with pytest.raises(ValueError, match="must have query and gallery, or other names, got"):
        trainer.predict({"query": query, "birds": gallery})
