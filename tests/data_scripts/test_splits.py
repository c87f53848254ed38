"""Splits that fit the job: all classes train, known classes are asked for again; the same for folders and digits."""

import pytest
from data_fixtures import write_classes, write_image

from vptsp import DataError, load_splits
from vptsp.data_scripts.class_split import asked_images
from vptsp.data_scripts.command_check import main as check


@pytest.fixture
def load(tmp_path):
    return lambda root, **options: load_splits("folder", root, cache_dir=tmp_path / "cache", **options)


def files(splits):
    """Per split the names of its files, as class/file."""
    return {name: ["/".join(row["image"]["path"].split("/")[-2:]) for row in split] for name, split in splits.items()}


@pytest.mark.parametrize("streaming", [False, True])
def test_all_classes_train(tmp_path, load, streaming):
    root = write_classes(tmp_path / "root", {"a": 2, "b": 1, "c": 1})
    splits = load(root, test_share=0, streaming=streaming)
    assert files(splits) == {"train": ["a/000.png", "a/001.png", "b/000.png", "c/000.png"]}
    assert splits["train"].features["label"].names == ["a", "b", "c"]
    digits = load_splits("digits", cache_dir=tmp_path / "cache", test_share=0, streaming=streaming)
    assert list(digits) == ["train"]


@pytest.mark.parametrize("streaming", [False, True])
def test_known_classes_are_asked_for_by_another_image(tmp_path, load, streaming):
    root = write_classes(tmp_path / "root", {"a": 5, "b": 2, "lone": 1})
    splits = load(root, class_split="seen", test_share=0.4, streaming=streaming)
    found = files(splits)
    assert list(splits) == ["train", "query", "gallery"]
    assert found["train"] == found["gallery"]
    assert not set(found["train"]) & set(found["query"])
    together = sorted(found["train"] + found["query"])
    assert together == sorted(f"{p.parent.name}/{p.name}" for p in root.rglob("*.png"))
    asked = [name.partition("/")[0] for name in found["query"]]
    assert asked == ["a", "a", "b"]  # 0.4 of 5, at least one of 2, none of a lone one
    assert all(split.features["label"].names == ["a", "b", "lone"] for split in splits.values())
    other = files(load(root, class_split="seen", test_share=0.4, split_seed=3, streaming=streaming))
    assert other["query"] != found["query"]


def test_which_images_are_asked_depends_on_the_class_alone():
    assert asked_images(10, "a", 0.29) == asked_images(10, "a", 0.29)
    assert {len(asked_images(count, "a", 0.5)) for count in (2, 3)} == {1}
    assert [len(asked_images(10, "a", share)) for share in (0.01, 0.29, 0.3, 0.99)] == [1, 2, 3, 9]
    assert asked_images(1, "a", 0.9) == asked_images(0, "a", 0.5) == []


def test_known_classes_in_folders_of_their_own(tmp_path, load, caplog):
    root = tmp_path / "root"
    write_classes(root / "train", {"a": 2, "b": 1})
    write_classes(root / "test", {"a": 1, "new": 1})
    with pytest.raises(DataError, match=r"1 classes of .* are in both training and test \('a'\).*class_split 'seen'"):
        load(root)
    splits = load(root, class_split="seen")
    assert files(splits) == {
        "train": ["a/000.png", "a/001.png", "b/000.png"],
        "query": ["a/000.png", "new/000.png"],
        "gallery": ["a/000.png", "a/001.png", "b/000.png"],
    }
    assert splits["query"].features["label"].names == ["a", "b", "new"]
    assert "1 query classes have no image in the gallery, their queries can't be answered: 'new'" in caplog.text
    with pytest.raises(DataError, match="test_share splits the classes of the layout 'classes'"):
        load(root, class_split="seen", test_share=0.3)


def test_train_and_test_folders_need_no_options(tmp_path, load):
    root = tmp_path / "root"
    write_classes(root / "train", {"a": 2, "b": 1})
    write_classes(root / "test", {"c": 2})
    assert {name: len(split) for name, split in load(root).items()} == {"train": 3, "test": 2}


def test_one_photo_per_product_can_not_be_asked_again(tmp_path, load):
    root = write_classes(tmp_path / "root", {"a": 1, "b": 1})
    with pytest.raises(DataError, match="each of the 2 classes has one only; test_share 0 trains without a test"):
        load(root, class_split="seen")


def test_check_shows_each_kind_of_split(tmp_path, capsys):
    root = write_classes(tmp_path / "root", {"a": 4, "b": 2})
    words = ["folder", "--data_dir", str(root), "--max_classes", "0"]
    assert check([*words, "--test_share", "0"]) == 0
    printed = capsys.readouterr().out
    assert "train       6        2" in printed and "test" not in printed.partition("\n\n")[2]
    assert check([*words, "--class_split", "seen"]) == 0
    printed = capsys.readouterr().out
    assert "query         3        2" in printed and "gallery       3        2" in printed


def test_prepared_tables_of_another_split_are_not_taken(tmp_path, load):
    root = write_classes(tmp_path / "root", {"a": 4, "b": 4})
    first = files(load(root, class_split="seen"))
    assert files(load(root)) != first
    assert files(load(root, class_split="seen")) == first
    write_image(root / "a/999.png")
    assert len(load(root, class_split="seen")["train"]) == 5
