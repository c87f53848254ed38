import importlib
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from data_fixtures import write_archive, write_classes, write_files, write_image
from transformers import HfArgumentParser

from vptsp import (
    DATASETS,
    DataArguments,
    DataError,
    ImageFolders,
    check_data_arguments,
    load_splits,
    register_dataset,
)
from vptsp.data_scripts.builder import ClassSplitConfig
from vptsp.data_scripts.data_arguments import BUILDER_OPTIONS
from vptsp.data_scripts.dataset_registry import DatasetEntry, builder_class


def parse(*words):
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(list(words))
    return args


def test_command_line():
    assert parse() == DataArguments()
    words = "--dataset_name digits --train_classes 0 1 2 --test_classes 7 8 --digit_size 16 --image_size 112"
    words += " --no_horizontal_flip --verify_counts False --crop_scale_min 0.2 --split_seed 3"
    words += " --class_split random --validation_share 0.2"
    args = parse(*words.split())
    assert args.train_classes == ["0", "1", "2"] and args.test_classes == ["7", "8"]
    assert (args.digit_size, args.image_size, args.resize_size, args.split_seed) == (16, 112, 128, 3)
    assert args.horizontal_flip is False and args.verify_counts is False
    assert all(field.metadata["help"] for field in DataArguments.__dataclass_fields__.values())


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: digits\ntrain_classes: [0, 1]\ntest_classes: some/list.txt\nresize_size: 250\n")
    (args,) = HfArgumentParser(DataArguments).parse_yaml_file(str(file))
    assert args.train_classes == ["0", "1"] and args.test_classes == ["some/list.txt"]
    assert args.resize_size == 250


@pytest.mark.parametrize("size, resize", [(224, 256), (112, 128), (32, 37), (64, 73)])
def test_resize_follows_image_size(size, resize):
    assert DataArguments(image_size=size).resize_size == resize


@pytest.mark.parametrize(
    "values, message",
    [
        ({"layout": "flat"}, "layout must be one of auto, classes, train_test, query_gallery, got 'flat'"),
        ({"class_split": "even"}, "class_split must be one of first, alternate, random, seen, got 'even'"),
        ({"test_share": -0.1}, "test_share must be between 0 and 1 (0: no test; 1 excluded), got -0.1"),
        ({"test_share": 1.0}, "test_share must be between 0 and 1 (0: no test; 1 excluded), got 1.0"),
        ({"dataset_revision": 1234567}, "dataset_revision must be text, got the number 1234567: put it in quotes"),
        ({"digit_size": 7}, "digit_size must be >= 8, got 7"),
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"resize_size": 100}, "resize_size must be >= image_size 224, got 100"),
        ({"crop_scale_min": 0.0}, "crop_scale_min must be above 0 and at most 1, got 0.0"),
        ({"train_classes": "rose"}, "train_classes must be a list of names or the path of a .txt file, got 'rose'"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ValueError) as caught:
        DataArguments(**values)
    assert message in str(caught.value)


def test_arguments_load_what_they_say(tmp_path):
    root = write_classes(tmp_path / "root", dict.fromkeys("abcd", 1))
    args = DataArguments(data_dir=str(root), data_cache_dir=str(tmp_path / "cache"), class_split="alternate")
    assert args.builder_options() == {"class_split": "alternate"}
    check_data_arguments(args)
    assert args.load_splits()["train"].features["label"].names == ["a", "c"]
    assert any((tmp_path / "cache").rglob("*.arrow"))
    assert [row["label"] for row in replace(args, streaming=True).load_splits()["test"]] == [0, 1]


def test_registry_agrees_with_the_builders():
    for name, entry in DATASETS.items():
        module, _, class_name = entry.builder.partition(":")
        builder = getattr(importlib.import_module(f"vptsp.data_scripts.{module}"), class_name)
        assert set(entry.options) == set(builder.BUILDER_CONFIG_CLASS.option_names()), name
        config, args = builder.BUILDER_CONFIG_CLASS(), DataArguments()
        assert all(getattr(config, option) == getattr(args, option) for option in entry.options), name
        for option in entry.options:  # written once: the very same field
            own = builder.BUILDER_CONFIG_CLASS.__dataclass_fields__[option]
            assert own is DataArguments.__dataclass_fields__[option], (name, option)
        assert entry.description
    assert {option for entry in DATASETS.values() for option in entry.options} == set(BUILDER_OPTIONS)


def test_a_builder_is_registered_with_its_own_options(monkeypatch):
    monkeypatch.setattr(DATASETS, "entries", dict(DATASETS))

    @dataclass
    class TintConfig(ClassSplitConfig):
        tint: str = "red"

    @register_dataset("tints", "tints", "folder or archive", ("tints.txt",))
    class Tints(ImageFolders):
        BUILDER_CONFIG_CLASS = TintConfig

    options = ("train_classes", "test_classes", "test_share", "class_split", "split_seed", "tint")
    assert DATASETS["tints"] == DatasetEntry(Tints, "tints", options, "folder or archive", ("tints.txt",))
    assert builder_class("tints") is Tints
    with pytest.raises(DataError, match=r"'tints' has no option 'layout'; its options are train_classes, .*, tint$"):
        load_splits("tints", layout="auto")
    with pytest.raises(ValueError, match="there is a data set 'digits' already"):
        register_dataset("digits", "others")(Tints)


def test_load_splits_errors(tmp_path):
    with pytest.raises(DataError, match=r"unknown dataset_name 'digit'; did you mean 'digits'\? There are: folder \("):
        load_splits("digit")
    with pytest.raises(DataError, match=r"'folder' has no option 'colour'; its options are train_classes, .*layout"):
        load_splits("folder", tmp_path, colour="red")


def test_early_check(tmp_path):
    root = write_classes(tmp_path / "root", {"a": 1})
    check_data_arguments(DataArguments(data_dir=str(root)))  # that there is one class only, listing will tell
    check_data_arguments(DataArguments(dataset_name="digits"))
    write_classes(tmp_path / "birds/CUB_200_2011/images", {"001.a": 1})
    check_data_arguments(DataArguments(dataset_name="cub", data_dir=str(tmp_path / "birds")))
    for values, message in (
        ({"dataset_name": "cubs"}, r"unknown dataset_name 'cubs'; did you mean 'cub'\?"),
        ({}, "data_dir is missing: the data set 'folder' needs"),
        ({"data_dir": str(tmp_path / "absent")}, "absent does not exist"),
        ({"data_dir": str(write_image(tmp_path / "photo.png"))}, "must be a folder"),
        ({"data_dir": str(root / "a")}, "holds 1 images .* but no class folders"),
        ({"data_dir": str(root), "layout": "train_test"}, "layout 'train_test' needs the folders"),
        ({"data_dir": str(root), "train_classes": ["no.txt"]}, "train_classes: expected a text file .* at no.txt"),
        (
            {"data_dir": str(root), "dataset_name": "cub"},
            "expected images, CUB_200_2011/images, .* or CUB_200_2011.tgz",
        ),
        ({"data_dir": str(root), "dataset_name": "cub", "test_share": 0.4}, "'cub' has no option 'test_share'"),
        ({"data_dir": str(root), "digit_size": 16}, "'folder' has no option 'digit_size'"),
        ({"data_dir": str(root), "dataset_name": "digits"}, "'digits' has no data_dir, got"),
        ({"dataset_name": "cub"}, "the data set 'cub' needs the folder that holds its images, or its archive"),
        ({"dataset_name": "cub", "data_dir": str(tmp_path / "photo.png")}, "photo.png is neither a zip nor a tar"),
        ({"dataset_name": "cub", "data_dir": str(tmp_path / "birds/CUB_200_2011/images")}, "too low: did you mean"),
        ({"dataset_name": "cub", "data_dir": str(tmp_path)}, "is too high: did you mean .*birds"),
        ({"dataset_name": "sop", "data_dir": str(root)}, "expected Ebay_train.txt, Info_Files, .*Products.zip"),
        ({"dataset_name": "inshop", "data_dir": str(root)}, "list_eval_partition.txt"),
        ({"dataset_name": "cars", "data_dir": str(root)}, "expected images, cars196/images, car_ims, .*car_ims.tgz"),
        ({"dataset_name": "inaturalist", "data_dir": str(root)}, "expected Inaturalist_train_set1.txt"),
        ({"dataset_name": "inaturalist", "image_column": "img"}, "'inaturalist' has no option 'image_column'"),
        ({"dataset_name": "hub"}, "give either dataset_repo .* got neither"),
        (
            {"dataset_name": "hub", "data_dir": str(root), "dataset_repo": "a/b"},
            "give either dataset_repo .* got both",
        ),
        ({"dataset_name": "hub", "data_dir": str(tmp_path / "absent")}, "absent does not exist"),
        ({"dataset_repo": "a/b", "data_dir": str(root)}, "the data set 'folder' has no option 'dataset_repo'"),
    ):
        with pytest.raises(DataError, match=message):
            check_data_arguments(DataArguments(**values))


def test_early_check_takes_archives_and_repositories(tmp_path):
    archive = write_archive(tmp_path / "cub/CUB_200_2011.tgz", {"CUB_200_2011/images/001.a/1.jpg": b"x"})
    check_data_arguments(DataArguments(dataset_name="cub", data_dir=str(archive)))
    check_data_arguments(DataArguments(dataset_name="cub", data_dir=str(archive.parent)))
    for name, file in (
        ("cars", "car_ims.tgz"),
        ("sop", "Info_Files/Ebay_train.txt"),
        ("sop", "Stanford_Online_Products.zip"),
        ("inshop", "Eval/list_eval_partition.txt"),
        ("inaturalist", "Inaturalist_test_set1.txt"),
    ):
        root = write_files(tmp_path / name / file.replace("/", "-"), {file: b""})
        check_data_arguments(DataArguments(dataset_name=name, data_dir=str(root)))
    args = DataArguments(dataset_name="hub", dataset_repo="some/flowers", dataset_revision="v1", label_column="kind")
    check_data_arguments(args)
    assert args.builder_options() == {"dataset_repo": "some/flowers", "dataset_revision": "v1", "label_column": "kind"}


def test_early_check_imports_nothing_heavy(tmp_path):
    root = write_classes(tmp_path / "root", {"a": 1})
    code = (
        "import sys\n"
        "from vptsp import DataArguments, check_data_arguments\n"
        f"check_data_arguments(DataArguments(data_dir={str(root)!r}))\n"
        "print([name for name in ('torch', 'datasets', 'transformers', 'sklearn') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
