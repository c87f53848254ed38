"""Photos without labels as data: folders and tables of which nobody, or somebody in part, says the classes."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import write_classes, write_image

from vptsp import DataArguments, DataError, check_data_arguments
from vptsp.data_scripts.image_datasets import image_datasets
from vptsp.data_scripts.sampler import ClassBalancedBatchSampler, SampleKey
from vptsp.data_scripts.split_record import record_splits


@pytest.fixture
def root(tmp_path):
    return write_classes(tmp_path / "photos", {"x": 3, "y": 4, "z": 2, "w": 3})


@pytest.fixture
def load(tmp_path):
    def of(name, place, **options):
        return image_datasets(
            DataArguments(name, str(place), str(tmp_path / "cache"), image_size=16, **{"labels": "none", **options})
        )

    return of


def write_table(path, rows, columns=("image", "label", "listing", "split")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def stored(images):
    return sorted(images.stored_images())


def test_all_photos_below_a_folder_train(load, root, tmp_path):
    images = load("folder", root)
    assert list(images) == ["train"]
    assert stored(images["train"]) == sorted(map(str, root.rglob("*.png")))
    assert images["train"].labels.tolist() == [-1] * 12
    flat = tmp_path / "flat"
    for number in range(3):
        write_image(flat / f"{number}.png", seed=number)
    write_image(flat / "deep" / "down" / "3.png", seed=9)
    assert stored(load("folder", flat)["train"]) == sorted(map(str, flat.rglob("*.png")))
    check_data_arguments(DataArguments(data_dir=str(flat), labels="none"))  # what a run asks first
    write_image(tmp_path / "flatter" / "1.png", seed=1)
    check_data_arguments(DataArguments(data_dir=str(tmp_path / "flatter"), labels="none"))
    with pytest.raises(DataError, match="no class folders"):
        check_data_arguments(DataArguments(data_dir=str(tmp_path / "flatter")))


def test_labels_are_there_to_test_on_alone(load, root):
    images = load("folder", root, test_labels=True, class_split="alternate")
    labelled = load("folder", root, labels="given", class_split="alternate")
    assert set(images) == {"train", "test"}
    for name, part in labelled.items():
        assert list(part.stored_images()) == list(images[name].stored_images())
    assert images["test"].labels.tolist() == labelled["test"].labels.tolist()
    assert images["train"].given.tolist() == [-1] * len(labelled["train"])
    assert images["train"].fingerprint()["names"] == labelled["train"].fingerprint()["names"]


def test_a_folder_test_beside_photos(load, tmp_path):
    root = tmp_path / "splits"
    write_classes(root / "test", {"p": 2, "q": 2})
    write_image(root / "train" / "1.png")
    write_image(root / "train" / "march" / "2.png", seed=2)
    images = load("folder", root)
    assert stored(images["train"]) == [f"{root}/train/1.png", f"{root}/train/march/2.png"]
    assert (images["test"].class_names, images["test"].labels.tolist()) == (["p", "q"], [0, 0, 1, 1])
    assert len(load("folder", root, layout="classes")["train"]) == 6  # said to be no splits
    with pytest.raises(DataError, match=r"test_labels splits labelled images, but .* has a test of its own"):
        load("folder", root, test_labels=True)


def test_tables(load, root, tmp_path):
    files = sorted(root.rglob("*.png"))
    bare = write_table(tmp_path / "bare.csv", [[path] for path in files], ["image"])
    assert stored(load("table", bare)["train"]) == sorted(map(str, files))
    rows = [[path, path.parent.name, number // 2 or "", ""] for number, path in enumerate(files)]
    table = write_table(tmp_path / "table.csv", [row[:3] for row in rows], ["image", "label", "listing"])
    assert list(load("table", table)) == ["train"]
    tested = load("table", table, test_labels=True)
    assert tested["test"].class_names == ["y", "z"]
    assert len(tested["train"]) == 6
    grouped = load("table", table, group_column="listing")["train"]
    assert grouped.groups.tolist() == [-1, -1, *np.repeat(range(5), 2)]
    with pytest.raises(DataError, match=r"has no column 'shop'; its further columns are listing"):
        load("table", table, group_column="shop")


def test_partial_labels(load, root, tmp_path):
    files = sorted(root.rglob("*.png"))
    rows = [
        [path, path.parent.name if number % 2 or path.parent.name == "z" else "", "", "train"]
        for number, path in enumerate(files)
    ]
    images = load(
        "table", write_table(tmp_path / "a.csv", [r[:2] for r in rows], ["image", "label"]), labels="partial"
    )
    train = images["train"]
    assert train.given_names == ["w", "x", "y", "z"]
    expected = [train.given_names.index(row[1]) if row[1] else -1 for row in rows]
    assert train.given.tolist() == train.labels.tolist() == expected
    for row in rows[-2:]:
        row[3] = "test"
    images = load("table", write_table(tmp_path / "b.csv", rows), labels="partial")
    assert images["test"].class_names == ["z"]
    assert images["train"].given_names == ["w", "x", "y"]
    rows[-1][1] = ""
    with pytest.raises(DataError, match="split test: row 1 has the label None"):
        load("table", write_table(tmp_path / "c.csv", rows), labels="partial")
    rows[-1][1], rows[0][1] = "z", "z"
    with pytest.raises(DataError, match=r"1 classes of .* are in both training and test \('z'\)"):
        load("table", write_table(tmp_path / "d.csv", rows), labels="partial")
    rows[0][1] = "unlabelled"
    with pytest.raises(DataError, match="row 0 has the class 'unlabelled', a name that stands for no class"):
        load("table", write_table(tmp_path / "e.csv", rows), labels="partial")
    with pytest.raises(DataError, match="labels partial needs a column of labels"):
        load("table", write_table(tmp_path / "f.csv", [row[:1] for row in rows], ["image"]), labels="partial")


def test_a_list_of_paths(load, root, tmp_path):
    files = sorted(root.rglob("*.png"))
    listed = tmp_path / "photos.txt"
    listed.write_text("# from March\n\n" + "".join(f"{path}\n" for path in files[:-1]), encoding="utf-8-sig")
    images = load("table", listed)
    assert list(images) == ["train"] and stored(images["train"]) == sorted(map(str, files[:-1]))
    with pytest.raises(DataError, match=r"photos.txt: no column is called label"):
        load("table", listed, labels="given")
    listed.write_text(f"{files[0]}\n\nnowhere.png\n")
    with pytest.raises(DataError, match=r"1 of the 2 images .*'nowhere.png' \(.*photos.txt:3\)"):
        load("table", listed)


def test_partial_labels_of_a_folder(load, root):
    loose = [root / f"loose{number}.png" for number in range(3)]
    for path in loose:
        shutil.copy(next((root / "w").iterdir()), path)
    images = load("folder", root, labels="partial")
    assert list(images) == ["train"]
    train = images["train"]
    assert train.given_names == ["w", "x", "y", "z"]
    paths = map(Path, train.stored_images())
    names = [path.parent.name if path.parent != root else None for path in paths]
    assert [train.given_names[given] if given >= 0 else None for given in train.given] == names
    assert names.count(None) == 3
    (root / "unlabelled").mkdir()
    with pytest.raises(DataError, match="unlabelled has a name that stands for no class"):
        load("folder", root, labels="partial")


def test_partial_labels_of_a_folder_with_a_test(load, root, tmp_path):
    for split, classes in {"train": "wx", "test": "yz"}.items():
        for name in classes:
            shutil.copytree(root / name, tmp_path / "parts" / split / name)
    shutil.copy(next((root / "w").iterdir()), tmp_path / "parts" / "train" / "loose.png")
    images = load("folder", tmp_path / "parts", labels="partial")
    assert images["train"].given_names == ["w", "x"] and images["test"].class_names == ["y", "z"]
    assert (images["train"].given == -1).sum() == 1
    shutil.copy(next((root / "w").iterdir()), tmp_path / "parts" / "test" / "loose.png")
    assert len(load("folder", tmp_path / "parts", labels="partial")["test"]) == len(
        images["test"]
    )  # left out, and said


def test_data_sets_whose_images_all_have_labels():
    images = image_datasets(DataArguments("digits", labels="none", image_size=16))
    assert images["train"].given_names == []
    assert set(images) == {"train", "test"}
    with pytest.raises(DataError, match="'digits' has no option 'labels'"):
        image_datasets(DataArguments("digits", labels="partial", image_size=16))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"labels": "some"}, "labels must be one of given, none, partial, got 'some'"),
        ({"test_labels": True, "labels": "given"}, "test_labels goes with labels none, got labels given"),
        ({"group_column": "a", "labels": "given"}, "group_column is of training without labels"),
        ({"streaming": True}, "labels none reads photos by row, several times, which a stream can't"),
        ({"test_share": 0.3}, "test_share splits classes, but with labels none all images of .* train"),
        ({"labels": "partial"}, "labels partial: no image lies in .* beside the class folders"),
        ({"labels": "partial", "test_share": 0.3}, "test_share splits classes, but with labels partial all images"),
        ({"labels": "partial", "class_split": "seen"}, "class_split 'seen' splits labelled images"),
        ({"group_column": "a"}, "group_column: .* has no column 'a'; it has no further columns"),
    ],
)
def test_what_is_refused(load, root, options, message):
    with pytest.raises(DataError, match=message):
        load("folder", root, **options)


def test_labels_of_a_round(load, root):
    images = load("folder", root)["train"]
    with pytest.raises(ValueError, match="labels must be below 0, got 1"):
        images.assign(np.arange(12) % 2)
    labels = np.array([0, 1, -1] * 4)
    before = images.fingerprint()
    images.assign(labels, 3)
    assert (images.num_classes, images.num_active) == (3, 2)
    assert images.class_names == ["cluster 0", "cluster 1", "cluster 2"]
    assert images[SampleKey(4, 7)]["labels"] == 1
    assert images.eval_view[2]["labels"] == 0
    assert images.fingerprint() == before
    with pytest.raises(ValueError, match="labels must be 12"):
        images.assign(labels[:3])


def test_batches_are_drawn_from_the_labels_of_the_epoch(load, root):
    images = load("folder", root)["train"]
    images.assign(np.array([0, 1, -1] * 4), 2)
    sampler = images.batch_sampler(batch_size=4, images_per_class=2, seed=3)
    kept = np.flatnonzero(images.labels >= 0)
    for epoch in range(2):
        if epoch:
            images.assign(np.array([-1, 1, 0] * 4))
            kept = np.flatnonzero(images.labels >= 0)
        sampler.set_epoch(epoch)
        plain = ClassBalancedBatchSampler(images.labels[kept], 4, 2, seed=3, num_batches=3)
        rows, seeds = plain.epoch_batches(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3  # of all 12 photos, whoever is left out
        assert [[key.index for key in batch] for batch in batches] == kept[rows].tolist()
        assert [[key.augmentation_seed for key in batch] for batch in batches] == seeds.tolist()


def test_the_record_of_splits_has_no_clusters(load, root, tmp_path):
    arguments = DataArguments("folder", str(root), str(tmp_path / "cache"), image_size=16, labels="none")
    images = image_datasets(arguments)
    images["train"].assign(np.array([0, 1, -1] * 4), 2)
    record = record_splits(arguments, images)
    assert record["data"]["labels"] == "none"
    assert {name: len(files) for name, files in record["splits"]["train"]["classes"].items()} == {"unlabelled": 12}
