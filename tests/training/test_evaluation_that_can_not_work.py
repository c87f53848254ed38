"""Evaluation that can't work is refused when the trainer is made, before anything is trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from noise_runs import Images, make_args, make_model, make_trainer
from PIL import Image as PillowImage

from vptsp import ImageDataset, TrainTransform, VPTSPTrainer, register_metric
from vptsp.eval.metric_registry import METRICS


class Labelled(Images):
    """The same images with labels of the test's own."""

    def __init__(self, labels):
        self.labels = labels


class WithoutBatches(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


def training_transform():
    images = Images()
    images.transform = TrainTransform(16)
    return images


EVERY = {"eval_strategy": "epoch", "save_strategy": "epoch"}
ALONE = tuple(range(12))
BAD = {
    "metric": (
        {"metric_for_best_model": "recal_at_1"},
        Images,
        "recal_at_1 is none of what evaluation gives.*recall_at_1",
    ),
    "recall_at": (
        {"recall_at": [2, 4]},
        Images,
        "metric_for_best_model recall_at_1 .*recall_at_2, recall_at_4, map_at_r",
    ),
    "eval_ prefix": ({"metric_for_best_model": "eval_nmi"}, Images, "metric_for_best_model eval_nmi is none of"),
    "saving the best": (
        {"metric_for_best_model": "nmi", "save_strategy": "best", "load_best_model_at_end": False},
        Images,
        "metric_for_best_model nmi is none of",
    ),
    "published with a gallery": (
        {"metric_for_best_model": "map_at_r_published"},
        lambda: {"query": Images(), "gallery": Labelled(Images.labels[::-1])},
        "map_at_r_published is none of",
    ),
    "named sets": (
        {},
        lambda: {"birds": Images(), "cars": Images()},
        "recall_at_1 is none of what evaluation gives.*birds_recall_at_1.*cars_recall_at_1",
    ),
    "lone images": ({}, lambda: Labelled(ALONE), "eval_dataset: no class has two images, so no query can be answered"),
    "a lone set": (
        {"metric_for_best_model": "birds_map_at_r"},
        lambda: {"birds": Images(), "cars": Labelled(ALONE)},
        "eval_dataset 'cars': no class has two images",
    ),
    "a gallery of other classes": (
        {},
        lambda: {"query": Images(), "gallery": Labelled((7,) * 12)},
        "eval_dataset: no class of the queries is in the gallery, so no query can be answered",
    ),
    "names": ({}, lambda: {"query": Images()}, "must have query and gallery, or other names"),
    "not for evaluation": (
        {},
        WithoutBatches,
        r"eval_dataset must have evaluation_batches\(batch_size\), or rows and a length",
    ),
    "a training transform": ({}, training_transform, "eval_dataset has the transform TrainTransform.*EvalTransform"),
}


@pytest.mark.parametrize("fields, make_data, message", BAD.values(), ids=BAD)
def test_it_is_refused_at_once(backbone_folder, tmp_path, fields, make_data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_model(backbone_folder), tmp_path, {"eval_dataset": make_data()}, **EVERY | fields)


@pytest.mark.parametrize("given", ["x", None, 3, [1, 2], object(), {"a": "x"}, {"query": Images(), "gallery": None}])
def test_what_is_no_data_set_is_refused(backbone_folder, tmp_path, given):
    trainer = make_trainer(make_model(backbone_folder), tmp_path, {"eval_dataset": None}, eval_strategy="no")
    for name, where in (("predict", "test_dataset"), ("evaluate", "eval_dataset"), ("embed", "dataset")):
        pattern = rf"{where}.* must have evaluation_batches\(batch_size\), or rows and a length, as an ImageDataset"
        if name == "evaluate" and given is None:
            pattern = "evaluation needs an eval_dataset, got None"
        with pytest.raises(ValueError, match=pattern):
            getattr(trainer, name)(given)
    with pytest.raises(ValueError, match="test_dataset is empty"):
        trainer.predict([])


@pytest.mark.parametrize("given", ["x", 3, [], {"a": Images()}])
def test_what_can_not_be_trained_on_is_refused(backbone_folder, tmp_path, given):
    pattern = f"train_dataset must have `labels`, .* as an ImageDataset, .*; got {type(given).__name__}"
    with pytest.raises(ValueError, match=pattern):
        make_trainer(make_model(backbone_folder), tmp_path, {"train_dataset": given}, eval_strategy="no")


GOOD = {
    "default": ({}, Images),
    "of all": ({"eval_metrics": "all", "metric_for_best_model": "nmi", "bootstrap_samples": 10}, Images),
    "an interval": (
        {"eval_metrics": "all", "metric_for_best_model": "map_at_r_low", "bootstrap_samples": 10},
        Images,
    ),
    "a set's": ({"metric_for_best_model": "eval_birds_recall_at_1"}, lambda: {"birds": Images(), "cars": Images()}),
    "no metric": (
        {"recall_at": [2], "load_best_model_at_end": False, "metric_for_best_model": None},
        Images,
    ),
    "never evaluated": ({"recall_at": [2], "eval_strategy": "no"}, lambda: Labelled(ALONE)),
}


@pytest.mark.parametrize("fields, make_data", GOOD.values(), ids=GOOD)
def test_what_works_goes_on(backbone_folder, tmp_path, fields, make_data):
    trainer = make_trainer(
        make_model(backbone_folder), tmp_path, {"eval_dataset": make_data()}, **EVERY | {"max_steps": 1} | fields
    )
    trainer.train()
    assert (trainer.state.best_metric is None) == (fields.get("eval_strategy") == "no" or "recall_at" in fields)


def test_registered_and_own_metrics_are_known(backbone_folder, tmp_path):
    register_metric("spread")(lambda *sets: 1.0)
    try:
        fields = {**EVERY, "metric_for_best_model": "spread"}
        make_trainer(make_model(backbone_folder), tmp_path, **fields)
    finally:
        METRICS.entries.pop("spread")
    with pytest.raises(ValueError, match="metric_for_best_model spread is none of"):
        make_trainer(make_model(backbone_folder), tmp_path, **fields)
    own = {"compute_metrics": lambda prediction: {"spread": 1.0}}  # what it gives, nobody knows before
    make_trainer(make_model(backbone_folder), tmp_path, own, **fields)


def test_without_a_test_set_nothing_is_evaluated_and_it_is_said(backbone_folder, tmp_path, caplog):
    args = make_args(tmp_path, **EVERY, max_steps=1)
    with caplog.at_level("WARNING"):
        trainer = VPTSPTrainer(make_model(backbone_folder), args, Images())
    assert caplog.text.count("there is no eval_dataset: eval_strategy is no, and the last model is the result") == 1
    trainer.train()
    assert args.eval_strategy == "epoch" and args.load_best_model_at_end  # the caller's own are as they were
    VPTSPTrainer(make_model(backbone_folder), args, Images(), Images())
    for fields in ({"save_strategy": "best"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}):
        args = make_args(tmp_path, **EVERY | fields)
        with pytest.raises(ValueError, match="needs an eval_dataset, got None"):
            VPTSPTrainer(make_model(backbone_folder), args, Images())


def test_rows_and_a_length_are_enough(backbone_folder, tmp_path):
    class Plain(torch.utils.data.Dataset):
        labels = Images.labels

        def __len__(self):
            return 12

        def __getitem__(self, row):
            return Images()[row]

    trainer = make_trainer(make_model(backbone_folder), tmp_path, per_device_eval_batch_size=5)
    for found, expected in zip(trainer.embed(Plain()), trainer.embed(Images()), strict=True):
        assert torch.equal(found, expected)


def test_a_test_set_that_can_not_be_read_is_named(backbone_folder, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path in paths:
        Path(path).write_text("no image")
    table = Dataset.from_dict({"image": paths, "label": [0, 0, 1, 1]}).cast_column("image", Image())
    trainer = make_trainer(make_model(backbone_folder), tmp_path)
    resize = lambda image, rng: torch.tensor(np.asarray(image.resize((16, 16)))).permute(2, 0, 1)  # noqa: E731
    assert resize(PillowImage.new("RGB", (20, 20)), None).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="none of the 4 images of eval_dataset is readable"):
        trainer.evaluate(ImageDataset(table, resize, skip_corrupt=True))
