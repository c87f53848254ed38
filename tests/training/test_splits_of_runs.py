"""Runs on what people have: few classes, one photo each, no test, known classes; what they print and record."""

import json
import re
from pathlib import Path

import pytest
import yaml
from data_fixtures import jpeg_bytes, write_classes, write_retrieval_set

from vptsp import VPTSPModel, train
from vptsp.data_scripts.split_record import read_split_record
from vptsp.training.fitting import fit_to_data
from vptsp.training.run_arguments import parse_arguments


PRESET = Path(__file__).resolve().parents[2] / "configs" / "folder.yaml"


@pytest.fixture
def start(backbone_folder, tmp_path):
    """Run the preset `folder` on a folder, but for what takes long."""

    def run(root, *options):
        words = {
            "backbone": backbone_folder,
            "data_dir": root,
            "data_cache_dir": tmp_path / "cache",
            "image_size": 16,
            "embedding_dim": 12,
            "num_prompts": 2,
            "num_class_prompts": 2,
            "num_train_epochs": 1,
            "picture_queries": 0,
            "bootstrap_samples": 20,
            "output_dir": tmp_path / "run",
        }
        given = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
        train.main([str(PRESET), *given, "--use_cpu", "--disable_tqdm", "true", *options])
        return json.loads((tmp_path / "run" / "all_results.json").read_text())

    return run


def refused(start, capsys, root, *options):
    with pytest.raises(SystemExit) as exit_info:
        start(root, *options)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_twenty_classes(start, tmp_path, capsys):
    """The preset asks for 16 classes a batch, of 10."""
    root = write_classes(tmp_path / "photos", {f"c{i:02d}": 2 for i in range(20)})
    results = start(root)
    printed = capsys.readouterr().out
    assert (
        "batch             20 images, not 32: there are 10 training classes, and 2 images of each in a batch"
        in printed
    )
    assert results["steps"] == 1 and results["dataset"]["train_classes"] == 10
    assert "chosen            the best of its evaluations by recall_at_1, on these same test" in printed


def test_the_presets_split_as_everything_else_does():
    folder, table = (yaml.safe_load(PRESET.with_stem(name).read_text()) for name in ("folder", "table"))
    assert "class_split" not in folder
    own = {"dataset_name": "table", "output_dir": "runs/table"}
    assert table == folder | own  # the same setting


def test_train_and_test_folders(start, tmp_path):
    write_classes(tmp_path / "photos/train", {"a": 3, "b": 2, "c": 2})
    write_classes(tmp_path / "photos/test", {"x": 2, "y": 2})
    results = start(tmp_path / "photos")
    assert (results["dataset"]["train_classes"], results["dataset"]["test_images"]) == (3, 4)
    record = read_split_record(tmp_path / "run")
    assert record["splits"]["test"]["classes"] == {
        "x": ["test/x/000.png", "test/x/001.png"],
        "y": ["test/y/000.png", "test/y/001.png"],
    }


def test_all_classes_train(start, tmp_path, capsys):
    root = write_classes(tmp_path / "photos", {"a": 1, "b": 1, "c": 1})
    results = start(root, "--test_share", "0", "--picture_queries", "2")
    printed = capsys.readouterr().out
    assert "evaluation        none: all 3 classes train" in printed
    assert "no pictures: there are no test images" in printed
    assert not [name for name in results if name.startswith(("final_", "frozen_"))]
    assert results["steps"] == 1 and results["best_step"] is None
    assert VPTSPModel.from_pretrained(tmp_path / "run").config.embedding_dim == 12
    assert list(read_split_record(tmp_path / "run")["splits"]) == ["train"]
    assert "## Scores" not in (tmp_path / "run" / "README.md").read_text()


def test_known_classes(start, tmp_path, capsys):
    root = write_classes(tmp_path / "photos", {"a": 3, "b": 3, "c": 1})
    results = start(root, "--class_split", "seen")
    assert "test              classes that train too, asked for by other images of them" in capsys.readouterr().out
    assert results["dataset"]["seen_classes"] is True
    assert (results["dataset"]["train_images"], results["final_num_queries"]) == (5, 2)
    assert "the classes are those that training has seen" in (tmp_path / "run" / "README.md").read_text()
    record = read_split_record(tmp_path / "run")
    assert record["seen_classes"] is True
    assert record["splits"]["gallery"] == record["splits"]["train"]


def test_what_was_on_which_side_is_recorded(start, tmp_path):
    root = write_classes(tmp_path / "photos", {"a": 2, "b": 2, "c": 2, "d": 2})
    start(root, "--class_split", "alternate")
    record = read_split_record(tmp_path / "run")
    assert record["data"]["data_dir"] == str(root) and record["data"]["class_split"] == "alternate"
    assert {name: part["classes"] for name, part in record["splits"].items()} == {
        side: {name: [f"{name}/000.png", f"{name}/001.png"] for name in names}
        for side, names in (("train", "ac"), ("test", "bd"))
    }
    assert record["seen_classes"] is False


def test_streams_record_their_classes(start, tmp_path):
    root = write_classes(tmp_path / "photos", {"a": 2, "b": 2, "c": 2, "d": 2})
    start(root, "--streaming", "true")
    record = read_split_record(tmp_path / "run")
    assert record["splits"]["test"]["classes"] == {"c": None, "d": None}


@pytest.mark.parametrize(
    "counts, options, message",
    [
        (
            {"a": 1, "b": 1, "c": 1, "d": 1},
            [],
            "no test class has two: .* or give --test_share 0 to train on all classes",
        ),
        (
            {"a": 3, "b": 3, "c": 3},
            [],
            "at least two test classes whose queries can be answered, got 1; .* --test_share",
        ),
        ({"a": 3, "b": 3}, [], r"training needs at least two classes, got 1 \(a\): .* --test_share 0 to train on all"),
        ({"a": 3, "b": 3, "c": 2, "d": 1}, [], "at least two test classes whose queries can be answered, got 1"),
        ({"a": 1, "b": 1}, ["--class_split", "seen"], "each of the 2 classes has one only; test_share 0"),
        (
            {"a": 2, "b": 2},
            ["--test_share", "0", "--save_strategy", "best"],
            "save_strategy must be epoch, steps or no",
        ),
    ],
)
def test_too_little_is_refused_before_anything_is_written(
    start, tmp_path, capsys, monkeypatch, counts, options, message
):
    root = write_classes(tmp_path / "photos", counts)
    monkeypatch.setattr("vptsp.training.run.build_model", lambda *_: pytest.fail("weights were loaded"))
    error = refused(start, capsys, root, *options)
    assert error.startswith("train.py: error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_four_classes(start, tmp_path, capsys):
    root = write_classes(tmp_path / "photos", {"a": 2, "b": 2, "c": 2, "d": 2})
    results = start(root)
    assert "batch             4 images, not 32: there are 2 training classes" in capsys.readouterr().out
    assert results["final_num_queries"] == 4


def test_a_later_run_leaves_no_old_record(start, tmp_path):
    root = write_classes(tmp_path / "photos", {"a": 2, "b": 2, "c": 2, "d": 2})
    start(root)
    before = read_split_record(tmp_path / "run")
    start(root, "--overwrite_output", "--class_split", "alternate")
    assert read_split_record(tmp_path / "run") != before


def test_batches_are_shared_out_among_processes():
    class Part:
        def __init__(self, count):
            self.num_classes, self.class_names = count, [str(i) for i in range(count)]

    _, args, *_ = parse_arguments(["--backbone", "x/y", "--use_cpu", "--test_share", "0"])
    fit_to_data(args, {"train": Part(7)})
    assert args.per_device_train_batch_size == 14
    assert not fit_to_data(args, {"train": Part(9)})[1:]  # nothing to say of the batch


def test_a_retrieval_set_tests(start, tmp_path, monkeypatch, capsys):
    """Scores are those of its queries, none of which finds itself, and the record says where it lies."""
    import datasets

    images = [{"bytes": jpeg_bytes(number), "path": None} for number in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 4}, features=features)
    rows.save_to_disk(tmp_path / "photos")
    tested = {number: jpeg_bytes(20 + number) for number in range(6)}
    qrels = [(f"q{x}", f"c{y}", 1) for x in tested for y in tested if x != y and x % 2 == y % 2]
    write_retrieval_set(
        tmp_path / "set", {f"q{x}": image for x, image in tested.items()}, {f"c{x}": tested[x] for x in tested}, qrels
    )
    monkeypatch.chdir(tmp_path)
    results = start(tmp_path / "photos", "--dataset_name", "hub", "--test_repo", "./set")
    assert results["final_num_queries"] == results["final_num_in_gallery"] == 6
    assert results["dataset"]["tested_on"] == [{"name": "set", "repo": None, "revision": None}]
    assert results["dataset"]["query_classes"] == 2
    assert read_split_record(tmp_path / "run")["data"]["test_repo"] == str(tmp_path / "set")
