"""`VPTSPTrainer` takes tables of the library `datasets` as they are, and computes what it does of `ImageDataset`."""

import datasets
import pytest
import torch
from data_fixtures import jpeg_bytes

from vptsp import (
    DataError,
    EvalTransform,
    ImageDataset,
    SampleKey,
    TrainTransform,
    VPTSPForMetricLearning,
    VPTSPTrainer,
    VPTSPTrainingArguments,
)
from vptsp.data_scripts.preprocessing import build_image_processor, geometry_of


def plain(labels, feature=None, image="image", label="label"):
    features = {
        image: datasets.Image(),
        label: feature or datasets.Value("string"),
        "price": datasets.Value("float32"),
    }
    rows = {
        image: [{"path": None, "bytes": jpeg_bytes(i, (30, 24))} for i in range(len(labels))],
        label: labels,
        "price": [1.0] * len(labels),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def make_trainer(backbone_folder, tmp_path, train, test, processor=None):
    torch.manual_seed(0)
    values = {"num_classes": 2, "embedding_dim": 12, "num_prompts": 2, "num_class_prompts": 2}
    args = VPTSPTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, save_strategy="no",
        load_best_model_at_end=False, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    model = VPTSPForMetricLearning.from_backbone(backbone_folder, **values)
    return VPTSPTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=processor)


@pytest.mark.parametrize("image, label", [("image", "label"), ("photo", "product")])
def test_it_trains_as_with_image_datasets(backbone_folder, tmp_path, image, label):
    labels, others = ["b", "a", "b", "a"], ["y", "x", "y", "x"]
    names = datasets.ClassLabel(names=["a", "b"])
    numbers = [1, 0, 1, 0]
    given = make_trainer(
        backbone_folder, tmp_path / "a", plain(labels, None, image, label), plain(others, None, image, label)
    )
    own = make_trainer(
        backbone_folder,
        tmp_path / "b",
        ImageDataset(plain(numbers, names), TrainTransform(16)),
        ImageDataset(plain(numbers, names), EvalTransform(18, 16)),
    )
    assert given.train_dataset.class_names == ["a", "b"] and given.eval_dataset.class_names == ["x", "y"]
    assert given.train_dataset.labels.tolist() == numbers
    for trainer in (given, own):
        trainer.train()
    assert all(map(torch.equal, given.model.state_dict().values(), own.model.state_dict().values()))
    assert given.evaluate()["eval_recall_at_1"] == own.evaluate()["eval_recall_at_1"]
    query = {"query": plain(others, None, image, label), "gallery": plain(others, None, image, label)}
    assert given.evaluate(query)["eval_num_queries"] == 4
    embeddings, found = given.embed(plain(others, None, image, label))
    assert embeddings.shape == (4, 12) and found.tolist() == numbers


def test_images_are_cut_as_the_processor_does(backbone_folder, tmp_path):
    processor = build_image_processor(16, 20)
    trainer = make_trainer(backbone_folder, tmp_path, plain(["a", "b"] * 2), plain(["x", "y"] * 2), processor)
    assert (trainer.eval_dataset.transform.resize, trainer.eval_dataset.transform.size) == (20, 16)
    assert trainer.train_dataset[SampleKey(0, 1)]["pixel_values"].shape == (3, 16, 16)
    assert geometry_of(None, 112) == (112, 128)


def test_what_can_not_be_taken_is_said(backbone_folder, tmp_path):
    for table, message in (
        (plain(["a", None, "b", "a"]), "train_dataset: row 1 has the label None"),
        (plain(["a", "b"] * 2, None, "image", "who"), "train_dataset: no column is called label, class or product"),
        (plain(["a", "b"] * 2).to_iterable_dataset(), "train_dataset is a stream .* give StreamedImages"),
        (datasets.Dataset.from_dict({"label": ["a"]}), "train_dataset: no column is called image, file or path"),
        (datasets.Dataset.from_dict({"image": ["a.jpg"], "label": ["a"]}), "image_column 'image' must hold images"),
    ):
        with pytest.raises(DataError, match=message):
            make_trainer(backbone_folder, tmp_path, table, None)
    three = plain(["a", "b", "c", "a"])
    with pytest.raises(ValueError, match=r"labels of train_dataset must be in 0\.\.1"):
        make_trainer(backbone_folder, tmp_path, three, plain(["x", "x"]))


def test_the_record_of_splits_is_of_this_run_and_stays_here(backbone_folder, tmp_path):
    """Another run's is taken away; what is uploaded has none, as it names files."""
    trainer = make_trainer(backbone_folder, tmp_path / "run", plain(["a", "b"] * 2), plain(["x", "y"] * 2))
    (tmp_path / "run").mkdir(exist_ok=True)
    path = tmp_path / "run" / "splits.json"
    path.write_text("of an earlier run")
    trainer.save_model()
    assert not path.exists()
    trainer.split_record = {"splits": {}}
    trainer.save_model()
    assert path.read_text().startswith("{")
    trainer._write_retriever(tmp_path / "upload", None)
    assert (tmp_path / "upload" / "config.json").is_file() and not (tmp_path / "upload" / "splits.json").exists()


def test_a_data_set_of_ones_own_gets_integers(backbone_folder, tmp_path):
    """As the docstring promises: rows, a length and `labels` are all that it needs, for a list as for an array."""

    asked = []

    class Own:
        labels = torch.arange(8) % 2
        pixels = torch.rand(8, 3, 16, 16).tolist()

        def __len__(self):
            return 8

        def __getitem__(self, row):
            asked.append(row)
            return {"pixel_values": torch.tensor(self.pixels[row]), "labels": int(self.labels[row])}

    trainer = make_trainer(backbone_folder, tmp_path, Own(), None)
    trainer.train()
    assert set(asked) <= set(range(8)) and all(isinstance(row, int) for row in asked)
