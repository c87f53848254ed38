"""What `evaluate` and `compare` score of a run: the images that it kept apart; what `embed` and `index` take: all."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from data_fixtures import write_classes, write_image

from vptsp import DataArguments, DataError, EmbeddingStore, RetrievalIndex, image_datasets, train
from vptsp.data_scripts.split_record import record_splits
from vptsp.files.atomic import write_json
from vptsp.search.commands import main
from vptsp.search.run_splits import recorded_sources


PRESET = Path(__file__).resolve().parents[2] / "configs" / "folder.yaml"
CLASSES = {"a": 3, "b": 3, "c": 3, "d": 3, "e": 3, "f": 3}


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", CLASSES)


@pytest.fixture
def trained(backbone_folder, tmp_path):
    """Train for a step; gives the run's folder."""

    def run(data_dir, *options):
        words = (
            f"--image_size 16 --embedding_dim 12 --num_prompts 2 --num_class_prompts 2 --num_train_epochs 1 --seed 1 \
            --picture_queries 0 --final_metrics retrieval --use_cpu --disable_tqdm true --output_dir {tmp_path}/run \
            --data_cache_dir {tmp_path}/cache --backbone {backbone_folder} --data_dir {data_dir}".split()
        )
        train.main([str(PRESET), *words, *options])
        return tmp_path / "run"

    return run


@pytest.fixture
def score(tmp_path):
    def run(command, *words):
        common = ["--output", tmp_path / "scores", "--embeddings_cache", tmp_path / "embeddings", "--quiet"]
        if command == "evaluate":
            common += ["--no_clustering", "--no_geometry", "--map_at"]
        shutil.rmtree(tmp_path / "scores", ignore_errors=True)
        status = main([str(word) for word in (command, *words, *common)])
        name = "metrics.json" if command == "evaluate" else "comparison.json"
        path = tmp_path / "scores" / name
        return status, json.loads(path.read_text()) if path.is_file() else None

    return run


@pytest.mark.parametrize(
    "split", [["--class_split", "alternate"], ["--class_split", "seen"], ["--test_share", "0.34"]]
)
def test_the_run_s_own_test_images_are_scored(photos, trained, score, split):
    run = trained(photos, *split)
    expected = json.loads((run / "all_results.json").read_text())
    status, report = score("evaluate", "--model", run)
    assert status == 0
    assert report["metrics"]["recall_at_1"] == pytest.approx(expected["final_recall_at_1"])
    assert report["metrics"]["num_queries"] == expected["final_num_queries"]
    description = report["data"]["queries"]["description"]
    assert "splits.json" in description
    assert ("classes that training has seen" in description) == ("seen" in split)


def test_later_photos_change_nothing_and_missing_ones_are_named(photos, trained, score, tmp_path, capsys):
    run = trained(photos)
    _, before = score("evaluate", "--model", run)
    write_classes(photos, {"0 new": 3})  # comes first, so that options alone would now split otherwise
    write_image(photos / "f/new.png")
    _, after = score("evaluate", "--model", run)
    assert after == before
    moved = photos.rename(tmp_path / "moved")
    assert score("evaluate", "--model", run)[0] == 2
    assert "--data_dir says where they are now" in capsys.readouterr().err
    _, there = score("evaluate", "--model", run, "--data_dir", moved)
    assert there["metrics"] == before["metrics"]
    (moved / "f/001.png").unlink()
    assert score("evaluate", "--model", run, "--data_dir", moved)[0] == 2
    assert "1 of the 9 images are no longer there: 'f/001.png'" in capsys.readouterr().err


def test_other_options_split_anew_and_trained_classes_are_said(photos, trained, score, caplog):
    run = trained(photos)
    status, report = score("evaluate", "--model", run, "--data_dir", photos, "--class_split", "alternate")
    assert status == 0 and "splits.json" not in report["data"]["queries"]["description"]
    assert "1 of the 3 classes ('b') are called as classes that" in caplog.text
    caplog.clear()
    assert score("evaluate", "--model", run, "--images", photos)[0] == 0
    assert "3 of the 6 classes ('a', 'b', 'c') are called as classes that" in caplog.text


def test_other_data_are_no_fault(photos, trained, score, tmp_path):
    run = trained(photos)
    other = write_classes(tmp_path / "other", {"x": 2, "y": 2, "z": 2, "w": 2})
    status, report = score("evaluate", "--model", run, "--data_dir", other, "--data_cache_dir", tmp_path / "cache")
    assert status == 0 and report["data"]["queries"]["images"] == 4


def test_a_comparison_takes_the_record_of_either_model(photos, trained, score, backbone_folder):
    run = trained(photos, "--class_split", "alternate")
    status, _ = score("compare", backbone_folder, run, "--resize_size", "18")
    assert status == 0


def test_without_a_record_it_is_said(photos, trained, score, capsys):
    run = trained(photos)
    (run / "splits.json").unlink()
    assert score("evaluate", "--model", run)[0] == 2
    assert (
        "got neither (no model has a splits.json, by which a run says what it kept apart)" in capsys.readouterr().err
    )
    (run / "splits.json").write_text("{}")
    assert score("evaluate", "--model", run)[0] == 2
    assert "splits.json can't be read: expected what a run writes there" in capsys.readouterr().err


def test_streams_and_tables_are_found_again(photos, trained, score, tmp_path):
    run = trained(photos, "--streaming", "true")
    _, by_stream = score("evaluate", "--model", run)
    assert by_stream["metrics"]["num_queries"] == 9
    shutil.rmtree(run)
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    table = pd.DataFrame({"file": files, "label": [name[0] for name in files], "price": range(len(files))})
    table.to_csv(photos / "products.csv", index=False)
    run = trained(photos / "products.csv", "--dataset_name", "table")
    expected = json.loads((run / "all_results.json").read_text())
    _, report = score("evaluate", "--model", run)
    assert report["metrics"]["recall_at_1"] == pytest.approx(expected["final_recall_at_1"])
    table["image"] = [(photos / name).read_bytes() for name in files]
    table.drop(columns="file").to_parquet(tmp_path / "t.parquet")
    shutil.rmtree(run)
    run = trained(tmp_path / "t.parquet", "--dataset_name", "table")
    assert score("evaluate", "--model", run)[0] == 0
    table.iloc[1:].drop(columns="file").to_parquet(tmp_path / "t.parquet")
    assert score("evaluate", "--model", run)[0] == 2


@pytest.mark.parametrize("streaming", [False, True])
def test_images_without_files_must_be_what_they_were(tmp_path, streaming):
    arguments = DataArguments(dataset_name="digits", data_cache_dir=str(tmp_path / "cache"), streaming=streaming)
    record = record_splits(arguments, image_datasets(arguments))
    write_json(tmp_path / "splits.json", record)
    sources = recorded_sources(tmp_path, {})
    assert {name: len(source) for name, source in sources.items()} == {"train": 901, "test": 896}
    record["data"]["train_classes"] = ["0", "9"]  # as if the data were others now
    write_json(tmp_path / "splits.json", record)
    with pytest.raises(DataError, match="the split train are no longer those that"):
        recorded_sources(tmp_path, {})


def test_embedding_and_indexing_take_all_photos(photos, trained, tmp_path):
    run = trained(photos)
    data = ["--data_dir", str(photos), "--data_cache_dir", str(tmp_path / "cache"), "--quiet"]
    assert main(["embed", "--model", str(run), "--output", str(tmp_path / "store"), *data]) == 0
    store = EmbeddingStore.open(tmp_path / "store")
    assert len(store) == 18 and store.info.data["description"] == f"train, test of folder in {photos}"
    assert sorted(store.class_names) == sorted(name for name in CLASSES for _ in range(3))
    index = ["index", "--model", str(run), "--embeddings_cache", str(tmp_path / "embeddings")]
    assert main([*index, "--index", str(tmp_path / "index"), *data]) == 0
    assert len(RetrievalIndex.open(tmp_path / "index")) == 18
    assert main(["embed", "--model", str(run), "--output", str(tmp_path / "part"), "--split", "test", *data]) == 0
    assert len(EmbeddingStore.open(tmp_path / "part")) == 9
