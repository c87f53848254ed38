"""Runs on photos without labels: rounds, what is said of them, interruptions, several processes, what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_runs import write_colours
from safetensors.torch import load_file

from vptsp import train
from vptsp.training import cluster_rounds, unlabelled_run
from vptsp.training.checkpoints import load_tree


HERE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight classes of six photos."""
    return write_colours(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def arguments(images, backbone_folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    text = f"""
        --data_dir {images} --data_cache_dir {cache} --labels none --backbone {backbone_folder} --image_size 16
        --embedding_dim 12 --num_prompts 3 --num_class_prompts 2 --per_device_train_batch_size 4 --learning_rate 1e-2
        --proxy_learning_rate 1e-1 --num_train_epochs 4 --use_cpu true --disable_tqdm true --picture_queries 0
        --final_metrics retrieval --eval_strategy no --logging_steps 100
    """
    return text.split()


def rounds_of(output):
    return json.loads((output / "rounds.json").read_text())


WHOLE = ["--clusters", "6", "--rounds", "2", "--test_labels", "true", "--save_strategy", "steps", "--save_steps", "1"]
WHOLE += ["--save_total_limit", "100", "--rnn_dropout", "0.2"]


@pytest.fixture(scope="module", params=["dense", "offloaded"])
def whole(arguments, tmp_path_factory, request):
    """A run of two rounds, of 12 steps each, with a checkpoint of every step; and its arguments."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("whole") / "run"
    words = [*arguments, *WHOLE, "--class_prompt_store", request.param]
    train.main([*words, "--output_dir", str(output)])
    return output, words


def test_a_run_in_rounds(whole):
    output, _ = whole
    reports = rounds_of(output)
    assert [report["round"] for report in reports] == [1, 2]
    assert [report["epoch"] for report in reports] == [0, 2]
    assert reports[0]["moved"] is None
    assert reports[1]["moved"] > 0
    results = json.loads((output / "all_results.json").read_text())
    assert results["rounds"] == reports
    assert results["dataset"]["labels"] == "none"
    for name in ("view_agreement", "cluster_stability", "map_at_r"):
        assert {f"frozen_{name}", f"final_{name}"} <= set(results)
    for step, report in ((12, reports[0]), (13, reports[1]), (24, reports[1])):
        saved = load_tree(output / f"checkpoint-{step}", "clusters")
        sizes = np.bincount(saved["labels"])
        assert saved["round"] == report["round"]
        assert (len(sizes), sizes.min(), sizes.max()) == (6, report["smallest"], report["largest"])
        assert np.median(sizes) == report["median"]
    assert "Training had no labels: 6 clusters of its photos took the place" in (output / "README.md").read_text()
    splits = json.loads((output / "splits.json").read_text())["splits"]
    assert {name: len(files) for name, files in splits["train"]["classes"].items()} == {"unlabelled": 24}
    assert set(splits["test"]["classes"]) == {"class4", "class5", "class6", "class7"}


@pytest.mark.parametrize(
    "step", [5, 12, 13, 18]
)  # in round 1, at its end, after the first and in the midst of round 2
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(whole, tmp_path, step, capsys):
    output, words = whole
    shutil.copytree(output / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    train.main([*words, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"])
    assert f"going on from step {step} of 24" in capsys.readouterr().out
    for name in ("model.safetensors", "checkpoint-24/model.safetensors", "checkpoint-24/optimizer.safetensors"):
        expected, actual = load_file(output / name), load_file(tmp_path / "run" / name)
        assert set(actual) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(actual[key], tensor), (name, key)
    expected, actual = (load_tree(place / "checkpoint-24", "clusters") for place in (output, tmp_path / "run"))
    assert np.array_equal(expected["labels"], actual["labels"])
    assert rounds_of(tmp_path / "run") == rounds_of(output)


def refused(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(words)
    assert exit_info.value.code == 2
    return capsys.readouterr().err.strip().splitlines()


def test_a_checkpoint_of_another_run_is_refused(whole, arguments, tmp_path, capsys):
    output, words = whole
    shutil.copytree(output / "checkpoint-13", tmp_path / "run" / "checkpoint-13")
    words = [*words, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    lines = refused([*words, "--clusters", "7", "--rounds", "3"], capsys)
    assert any("settings.clusters: checkpoint 6, now 7" in line for line in lines)
    assert any("settings.rounds: checkpoint 2, now 3" in line for line in lines)
    lines = refused([*words, "--test_share", "0.3"], capsys)
    assert "has clusters of other photos: labels must be 36" in lines[-1]
    path = tmp_path / "run" / "checkpoint-13" / "clusters.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert "clusters.safetensors" in refused(words, capsys)[-1]


@pytest.mark.distributed
def test_two_processes_do_what_one_does(arguments, tmp_path):
    options = ["--clusters", "6", "--rounds", "2", "--test_labels", "true", "--optim", "sgd", "--save_strategy", "no"]
    options += ["--learning_rate", "1e-3"]
    command = [sys.executable, HERE / "cluster_runs.py", tmp_path, "1", "2", "--", *arguments, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert not [path.read_text() for path in tmp_path.glob("error-*.txt")], done.stderr[-2000:]
    assert rounds_of(tmp_path / "2") == rounds_of(tmp_path / "1")
    assert rounds_of(tmp_path / "1")[1]["moved"] > 0
    single, both = (load_file(tmp_path / name / "model.safetensors") for name in ("1", "2"))
    for name, tensor in single.items():
        assert torch.allclose(both[name], tensor, rtol=1e-5, atol=1e-5), name


def test_without_any_test(arguments, tmp_path, capsys):
    words = [*arguments, "--output_dir", str(tmp_path / "run"), "--save_strategy", "no"]
    train.main([*words, "--clusters", "5", "--num_train_epochs", "1"])
    printed = capsys.readouterr().out
    assert "evaluation        none: no labelled images to test on" in printed
    assert "round 1           5 clusters of" in printed
    assert printed.count("two views agree") == 3  # before, and side by side at the end
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert not [name for name in results if "recall" in name]
    assert results["dataset"]["train_images"] == 48


def test_photos_that_can_not_be_read_are_left_out(images, arguments, tmp_path):
    photos = shutil.copytree(images, tmp_path / "photos")
    (photos / "class3" / "2.png").write_bytes(b"no image")
    words = [*arguments, "--data_dir", str(photos), "--clusters", "5", "--rounds", "2", "--skip_corrupt", "true"]
    train.main([*words, "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "2"])
    assert [report["left_out"] for report in rounds_of(tmp_path / "run")] == [1, 1]
    saved = load_tree(tmp_path / "run" / "checkpoint-24", "clusters")
    assert np.flatnonzero(saved["labels"] < 0).tolist() == [3 * 6 + 2]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["dataset"]["skipped_images"] == [str(photos / "class3" / "2.png")]


def test_likeness_keeps_photos_together(arguments, tmp_path):
    words = [*arguments, "--link_similarity", "0.97", "--clusters", "5", "--rounds", "2", "--num_train_epochs", "2"]
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    saved = load_tree(tmp_path / "run" / "checkpoint-24", "clusters")
    linked, labels = saved["linked"], saved["labels"]
    assert 5 < linked.max() + 1 < 48
    for number in range(linked.max() + 1):
        assert len(set(labels[linked == number])) == 1
    again = shutil.copytree(tmp_path / "run" / "checkpoint-12", tmp_path / "again" / "checkpoint-12").parent
    train.main([*words, "--output_dir", str(again), "--resume_from_checkpoint", "true"])
    assert rounds_of(again) == rounds_of(tmp_path / "run")


def test_hdbscan_leaves_photos_out_and_keeps_room(arguments, tmp_path):
    words = [*arguments, "--clustering", "hdbscan", "--min_cluster_size", "3", "--rounds", "2"]
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    saved = load_tree(tmp_path / "run" / "checkpoint-48", "clusters")
    assert saved["capacity"] == 48 // 3
    report = rounds_of(tmp_path / "run")[-1]
    assert report["left_out"] == (saved["labels"] < 0).sum() > 0
    assert report["clusters"] == saved["labels"].max() + 1 < 16
    rows = load_file(tmp_path / "run" / "checkpoint-48" / "model.safetensors")["proxies.original_proxies"]
    assert len(rows) == 16


def test_instances(arguments, tmp_path):
    words = [*arguments, "--clustering", "instances", "--num_train_epochs", "1", "--save_strategy", "no"]
    train.main([*words, "--output_dir", str(tmp_path / "run"), "--proxy_update", "none"])
    report = rounds_of(tmp_path / "run")[0]
    assert (report["clusters"], report["largest"]) == (48, 1)


def test_partial_labels_and_groups(images, arguments, tmp_path):
    files = sorted(images.rglob("*.png"))
    rows = [
        f"{path},{path.parent.name if path.parent.name < 'class2' and number % 2 else ''},{number // 3}"
        for number, path in enumerate(files)
    ]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(["image,label,listing", *rows]) + "\n")
    words = [*arguments, "--dataset_name", "table", "--data_dir", str(table), "--labels", "partial", "--rounds", "2"]
    words += ["--group_column", "listing", "--clusters", "5", "--output_dir", str(tmp_path / "run")]
    train.main(words)
    saved = load_tree(tmp_path / "run" / "checkpoint-48", "clusters")
    labels = saved["labels"].reshape(16, 3)
    assert (labels == labels[:, :1]).all()  # a listing is one class
    assert labels[:4, 0].tolist() == [0, 0, 1, 1]
    assert set(labels[4:, 0]) == set(range(2, 7))
    assert rounds_of(tmp_path / "run")[1]["given_classes"] == 2


@pytest.mark.parametrize("by_likeness", [False, True])
def test_photos_of_two_classes_that_belong_together_are_named(
    images, arguments, tmp_path, capsys, monkeypatch, by_likeness
):
    """By file and class; groups that the table gives, before anything is embedded."""
    files = sorted(shutil.copytree(images, tmp_path / "images").rglob("*.png"))
    first, second, broken = files[5], files[9], files[0]
    if by_likeness:
        shutil.copyfile(first, second)
        broken.write_bytes(b"no image")  # rows that are embedded are fewer than those of the table
    else:
        monkeypatch.setattr(unlabelled_run, "VPTSPTrainer", lambda **_: pytest.fail("photos are embedded"))
    classes, listing = {first: "mug", second: "cup"}, {first: 1, second: 1}
    rows = [f"{path},{classes.get(path, '')},{'' if by_likeness else listing.get(path, '')}" for path in files]
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(["image,label,listing", *rows]) + "\n")
    words = [*arguments, "--dataset_name", "table", "--data_dir", str(table), "--labels", "partial"]
    words += ["--output_dir", str(tmp_path / "run"), "--clusters", "5"]
    words += ["--link_similarity", "0.9999", "--skip_corrupt"] if by_likeness else ["--group_column", "listing"]
    (line,) = [line for line in refused(words, capsys) if "error: " in line]
    assert f"the photos {first} (class 'mug') and {second} (class 'cup') belong together" in line


@pytest.mark.parametrize(
    "options,message",
    [
        ("--rounds 5 --clusters 5", "rounds must be at most the 4 epochs, got 5"),
        ("--clusters 49", "clusters must be at most the 48 photos or groups to cluster, got 49"),
        ("--clustering hdbscan --clusters 4", "clusters is not read by clustering hdbscan, got 4"),
        ("--clustering instances --rounds 2", "rounds is not read by clustering instances, got 2"),
        ("--min_cluster_size 4", "min_cluster_size is not read by clustering kmeans, got 4"),
        ("--clusters 1", "clusters must be an integer >= 2, got 1"),
        ("--labels given --rounds 2", "rounds is of training without labels, got 2 with labels given"),
        ("--clusters 5 --rounds 2 --loss pml.ProxyAnchorLoss --proxy_update none", "rounds must be 1 with the loss"),
    ],
)
def test_what_is_refused(arguments, tmp_path, capsys, options, message):
    words = [*arguments, "--output_dir", str(tmp_path / "run"), *options.split()]
    assert message in " ".join(refused(words, capsys))


def test_a_round_that_has_too_few_clusters_ends_the_run(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        cluster_rounds,
        "_agreed",
        lambda args, images, *_: np.zeros(48, dtype=int) + (images.num_active == 0) * np.arange(48) % 6,
    )
    lines = refused([*arguments, "--clusters", "6", "--rounds", "2", "--output_dir", str(tmp_path / "run")], capsys)
    assert "round 2 can't begin: batch_size 4 / images_per_class 2 asks for 2 different classes" in lines[-1]
    assert (tmp_path / "run" / "checkpoint-24").is_dir()


def test_no_gain_is_said(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(unlabelled_run, "FEW_STEPS", 2)  # those of the run are enough
    words = [
        *arguments,
        "--clusters",
        "5",
        "--num_train_epochs",
        "1",
        "--save_strategy",
        "no",
        "--test_labels",
        "true",
    ]
    train.main([*words, "--learning_rate", "0", "--output_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    said = "tuning seems not to have helped: MAP@R" in capsys.readouterr().err
    assert said == (results["final_map_at_r"] <= results["frozen_map_at_r"])


def test_few_steps_are_no_proof(capsys):
    scores = {"frozen_view_agreement": 0.5, "final_view_agreement": 0.4}
    unlabelled_run.warn_if_no_gain(scores, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "so few steps (2) can't tell: agreement of views 50.0 with the backbone alone, 40.0 tuned" in line
    unlabelled_run.warn_if_no_gain(scores, 100)
    assert "tuning seems not to have helped: agreement of views 50.0" in capsys.readouterr().err
    unlabelled_run.warn_if_no_gain({**scores, "final_view_agreement": 0.6}, 2)
    assert capsys.readouterr().err == ""


def test_a_run_without_a_test_has_no_pictures_and_says_so(arguments, tmp_path, capsys, caplog):
    logging.Logger.warning_once.cache_clear()
    output = tmp_path / "run"
    words = ["--clusters", "6", "--max_steps", "2", "--picture_queries", "4", "--output_dir", str(output)]
    train.main([*arguments, *words, "--image_size", "24"])
    said = [record for record in caplog.records if "was trained with images of 16" in record.getMessage()]
    assert len(said) == 1  # though the backbone is opened twice, first to cluster
    assert "no pictures: there are no test images" in capsys.readouterr().out
    assert not (output / "pictures").exists()


@pytest.mark.parametrize(
    "words, named",
    [
        (["--rounds", "5"], "rounds must be at most the 4 epochs, got 5"),
        (["--rounds", "2", "--optim", "adafactor"], "optim must be one of adamw_torch"),
    ],
)
def test_rounds_that_can_not_be_are_refused_before_anything_is_embedded(
    arguments, tmp_path, capsys, monkeypatch, words, named
):
    monkeypatch.setattr("vptsp.training.unlabelled_run.VPTSPTrainer", None)
    with pytest.raises(SystemExit) as error:
        train.main([*arguments, *words, "--output_dir", str(tmp_path / "run")])
    assert error.value.code == 2
    assert named in capsys.readouterr().err
