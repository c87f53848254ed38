"""Which metrics VPTSPTrainer reports, and the same metrics for a plain Trainer."""

import functools
import shutil

import pytest
import torch
from data_fixtures import write_classes
from datasets import Dataset, Image
from transformers import EvalPrediction, Trainer, TrainingArguments

from vptsp import (
    EvalTransform,
    ImageDataset,
    VPTSPForMetricLearning,
    VPTSPModel,
    VPTSPTrainer,
    VPTSPTrainingArguments,
    compute_retrieval_metrics,
    embedding_metrics,
    retrieval_metrics,
    retrieval_scores,
)
from vptsp.data_scripts.image_files import list_images


class ReadyImages(torch.utils.data.Dataset):
    """Random images of a few classes, as floats."""

    def __init__(self, count, num_classes=4):
        self.labels = torch.arange(count) % num_classes
        self.pixels = torch.randn(count, 3, 16, 16) + torch.randn(num_classes, 3, 1, 1)[self.labels]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index].tolist(), "labels": int(self.labels[index])}

    def evaluation_batches(self, batch_size):
        return [rows.tolist() for rows in torch.arange(len(self)).split(batch_size)]


def collate(examples):
    return {name: torch.tensor([example[name] for example in examples]) for name in ("pixel_values", "labels")}


def make_args(folder, **fields):
    return VPTSPTrainingArguments(str(folder), eval_strategy="no", use_cpu=True, disable_tqdm=True, **fields)


def make_trainer(backbone_folder, tmp_path, **fields):
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, num_classes=3, embedding_dim=8, num_prompts=2)
    return VPTSPTrainer(model=model, args=make_args(tmp_path, **fields), data_collator=collate)


def test_retrieval_or_all_metrics(backbone_folder, tmp_path):
    trainer = make_trainer(backbone_folder, tmp_path, bootstrap_samples=50, recall_at=[1, 3], seed=7)
    dataset = ReadyImages(18)
    embeddings, labels = trainer.embed(dataset)

    def scores(metrics):
        times = ("runtime", "per_second", "unreadable")
        return {k.removeprefix("eval_"): v for k, v in metrics.items() if not k.endswith(times)}

    assert scores(trainer.evaluate(dataset)) == retrieval_metrics(embeddings, labels, recall_at=(1, 3))
    expected = embedding_metrics(
        embeddings, labels, recall_at=(1, 3), confidence=0.95, num_resamples=50, resample="classes", seed=7
    )
    assert {"map_at_1000", "nmi", "pairwise_f1", "spectral_decay", "map_at_r_low", "map_at_r_high"} <= set(expected)
    assert scores(trainer.evaluate(dataset, eval_metrics="all")) == expected
    trainer.args.eval_metrics = "all"
    assert scores(trainer.evaluate(dataset)) == expected
    trainer.args.bootstrap_samples = 0
    assert scores(trainer.evaluate(dataset)) == {
        name: value for name, value in expected.items() if not name.endswith(("_low", "_high"))
    }


def test_all_metrics_of_queries_and_gallery(backbone_folder, tmp_path):
    trainer = make_trainer(backbone_folder, tmp_path, bootstrap_samples=0, eval_metrics="all")
    sets = {"query": ReadyImages(9), "gallery": ReadyImages(14)}
    metrics = trainer.evaluate(sets)
    expected = embedding_metrics(*trainer.embed(sets["query"]), *trainer.embed(sets["gallery"]), seed=42)
    assert {name: metrics[f"eval_{name}"] for name in expected} == expected


def test_queries_that_are_in_the_gallery_under_another_name(backbone_folder, tmp_path, caplog):
    """Noise for embeddings: whoever finds itself scores 100 %."""
    root = write_classes(tmp_path / "photos", dict.fromkeys("abcd", 5))
    shutil.copytree(root, tmp_path / "copies")
    sets = {}
    for name, folder in (("query", root), ("gallery", tmp_path / "copies")):
        paths = [str(folder / file.path) for file in list_images(folder)]
        table = Dataset.from_dict({"image": paths, "label": [row // 5 for row in range(20)]})
        sets[name] = ImageDataset(table.cast_column("image", Image()), EvalTransform(18, 16), skip_corrupt=True)
    (root / "b" / "002.png").write_bytes(b"no image")
    trainer = make_trainer(backbone_folder, tmp_path, eval_metrics="all", bootstrap_samples=0)
    embeddings, labels = torch.nn.functional.normalize(torch.randn(20, 8), dim=1), torch.arange(20) // 5
    read = torch.arange(20) != 7
    trainer._embed_all = lambda data, *_: (
        embeddings,
        labels,
        read if data is sets["query"] else torch.ones_like(read),
    )
    with caplog.at_level("WARNING"):
        metrics, again = trainer.evaluate(sets), trainer.evaluate(sets)
    alone = retrieval_scores(embeddings, labels)
    assert alone["recall_at_1"].mean() < 0.6
    for name in ("recall_at_1", "map_at_r", "r_precision"):
        expected = pytest.approx(alone[name][read].mean().item())
        assert metrics[f"eval_{name}"] == again[f"eval_{name}"] == expected
    assert (metrics["eval_num_in_gallery"], metrics["eval_num_unreadable"]) == (19, 1)
    assert metrics["eval_nmi"] == embedding_metrics(embeddings, labels, seed=42)["nmi"]  # each image once
    assert caplog.text.count("19 queries are in the gallery too: they are excluded there") == 1
    assert trainer.last_evaluated["excluded"].tolist() == [[row, row] for row in range(20) if row != 7]


class WithIds(ReadyImages):
    def stored_images(self):
        return [str(row) for row in range(len(self))]


@pytest.mark.parametrize("named", ["neither", "queries", "gallery"])
def test_data_sets_without_names_are_compared_by_their_pixels(backbone_folder, tmp_path, caplog, named):
    """A gallery that has all queries but one, and some more, in another order."""
    trainer = make_trainer(backbone_folder, tmp_path)
    sets = {"query": (WithIds if named == "queries" else ReadyImages)(9)}
    sets["gallery"] = (WithIds if named == "gallery" else ReadyImages)(14)
    rows = torch.tensor([4, 2, 8, 0, 1, 3, 5, 7])
    sets["gallery"].pixels[3:11], sets["gallery"].labels[3:11] = sets["query"].pixels[rows], sets["query"].labels[rows]
    with caplog.at_level("WARNING"):
        metrics, again = trainer.evaluate(sets), trainer.evaluate(sets)
    embedded = (*trainer.embed(sets["query"]), *trainer.embed(sets["gallery"]))
    expected = retrieval_metrics(*embedded, excluded=torch.stack([rows, torch.arange(3, 11)], dim=1))
    assert expected["recall_at_1"] < retrieval_metrics(*embedded)["recall_at_1"]  # had they found themselves
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    assert again["eval_recall_at_1"] == metrics["eval_recall_at_1"] and metrics["eval_num_in_gallery"] == 8
    assert caplog.text.count("known by their pixels alone") == 1
    assert caplog.text.count("8 queries are in the gallery too") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eval_metrics": "some"}, "eval_metrics must be one of retrieval, all, got 'some'"),
        ({"bootstrap_samples": -1}, "bootstrap_samples must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **fields)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_compute_metrics_of_a_prediction(as_tuple):
    embeddings = torch.nn.functional.normalize(torch.randn(30, 6), dim=1)
    labels = torch.arange(30) % 5
    predictions = (embeddings.numpy(), torch.randn(30, 2).numpy()) if as_tuple else embeddings.numpy()
    prediction = EvalPrediction(predictions=predictions, label_ids=labels.numpy())
    assert compute_retrieval_metrics(prediction) == retrieval_metrics(embeddings, labels)
    options = {"recall_at": (1, 10), "map_at": (5,)}
    assert compute_retrieval_metrics(prediction, **options) == retrieval_metrics(embeddings, labels, **options)
    with pytest.raises(ValueError, match="must be L2-normalised"):
        compute_retrieval_metrics(EvalPrediction(predictions=2 * embeddings.numpy(), label_ids=labels.numpy()))


class Embedder(torch.nn.Module):
    """A model of the plain Trainer's kind: a loss and embeddings."""

    def __init__(self, retriever):
        super().__init__()
        self.retriever = retriever

    def forward(self, pixel_values, labels=None):
        embeddings = self.retriever(pixel_values).embeddings
        return {"loss": embeddings.sum(), "embeddings": embeddings}


def test_compute_metrics_of_a_plain_trainer(backbone_folder, tmp_path):
    retriever = VPTSPModel.from_backbone(backbone_folder, embedding_dim=8).eval()
    dataset = ReadyImages(18)
    trainer = Trainer(
        Embedder(retriever),
        TrainingArguments(tmp_path, use_cpu=True, disable_tqdm=True, remove_unused_columns=False),
        data_collator=collate,
        eval_dataset=dataset,
        compute_metrics=functools.partial(compute_retrieval_metrics, recall_at=(2,)),
    )
    metrics = trainer.evaluate()
    with torch.inference_mode():
        expected = retrieval_metrics(retriever(dataset.pixels).embeddings, dataset.labels, recall_at=(2,))
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
