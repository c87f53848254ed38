import io
import logging
import os
from decimal import Decimal

import numpy as np
import pytest
from data_fixtures import SHARED_DATA, write_archive, write_classes, write_files, write_image
from PIL import Image

from vptsp import DataError, ImageDataset, ImageError, ImageFolders, load_splits
from vptsp.data_scripts.class_split import split_classes


LETTERS = dict.fromkeys("abcdef", 2)


def names(split):
    return split.features["label"].names


def rows(split):
    """(class name, path) per row."""
    return [(names(split)[row["label"]], row["image"]["path"]) for row in split]


@pytest.fixture
def load(tmp_path):
    def load_folder(root, **options):
        return load_splits("folder", root, cache_dir=tmp_path / "cache", **options)

    return load_folder


# ---- splitting classes


def slow_split(names, share, class_split):
    """The documented rule, one position at a time, in exact decimals."""
    names, share = sorted(names), Decimal(str(share))
    if class_split == "first":
        num_test = int(len(names) * share)
        return names[: len(names) - num_test], names[len(names) - num_test :]
    train, test = [], []
    for i, name in enumerate(names):
        (test if int((i + 1) * share) > int(i * share) else train).append(name)
    return train, test


@pytest.mark.parametrize("class_split", ["first", "alternate"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.29, 0.3, 0.7, 0.25, 0.9])
@pytest.mark.parametrize("count", [10, 11, 81, 100])
def test_split_by_share(count, share, class_split):
    classes = [f"{(i * 37) % 1000:03d}" for i in range(count)]
    assert split_classes(classes, test_share=share, class_split=class_split) == slow_split(classes, share, class_split)


def test_alternate_halves_are_even_and_odd_positions():
    train, test = split_classes("gfedcba", class_split="alternate")
    assert (train, test) == (list("aceg"), list("bdf"))


def test_random_split_depends_on_its_seed_only():
    classes = [str(i) for i in range(100)]
    first = split_classes(classes, class_split="random", test_share=0.29, split_seed=1)
    assert first == split_classes(classes[::-1], class_split="random", test_share=0.29, split_seed=1)
    assert first != split_classes(classes, class_split="random", test_share=0.29, split_seed=2)
    assert len(first[1]) == 29
    assert sorted(first[0] + first[1]) == sorted(classes)
    assert first[0] == sorted(first[0]) and first[1] == sorted(first[1])


def test_split_by_lists(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\ufeffc\n\n  a \n", encoding="utf-8")
    assert split_classes("abcd", train_classes=["c", "a"]) == (["a", "c"], ["b", "d"])
    assert split_classes("abcd", test_classes=["c", "a"]) == (["b", "d"], ["a", "c"])
    assert split_classes("abcd", train_classes=["d"], test_classes=["b"]) == (["d"], ["b"])
    assert split_classes("abcd", train_classes=str(file)) == (["a", "c"], ["b", "d"])
    assert split_classes("abcd", test_classes=[str(file)]) == (["b", "d"], ["a", "c"])
    assert split_classes(["caf\u0065\u0301", "b"], train_classes=["caf\u00e9"]) == (["caf\u0065\u0301"], ["b"])


def test_split_errors(tmp_path):
    classes = ["Red-Apple", "Green-Apple", "Pear", "Plum"]
    with pytest.raises(DataError, match=r"test_classes names unknown classes: 'Red-Aple' \(near: 'Red-Apple'"):
        split_classes(classes, test_classes=["Pear", "Red-Aple"])
    with pytest.raises(DataError, match=r"train_classes names unknown.*and 2 more; the 4 classes are 'Green-Apple'"):
        split_classes(classes, train_classes=list("1234567"))
    with pytest.raises(DataError, match="'Pear' is in both train_classes and test_classes"):
        split_classes(classes, train_classes=["Pear", "Plum"], test_classes=["Pear"])
    with pytest.raises(DataError, match="train_classes names all 4 classes, so no test class is left"):
        split_classes(classes, train_classes=classes)
    with pytest.raises(DataError, match="test_classes names all 4 classes, so no training class is left"):
        split_classes(classes, test_classes=classes)
    with pytest.raises(DataError, match="train_classes names 'Pear' more than once"):
        split_classes(classes, train_classes=["Pear", "Pear"])
    with pytest.raises(DataError, match="train_classes names no class"):
        split_classes(classes, train_classes=[])
    with pytest.raises(DataError, match=r"test_classes: expected a text file .* at .*absent.txt"):
        split_classes(classes, test_classes=str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"test_share 0\.2 of 4 classes gives 4 training and 0 test"):
        split_classes(classes, test_share=0.2)
    with pytest.raises(DataError, match=r"test_share must be between 0 and 1.* got 1"):
        split_classes(classes, test_share=1)
    with pytest.raises(
        DataError, match=r"test_classes says which .* but test_share 0 lets all classes train: give one"
    ):
        split_classes(classes, test_classes=["Pear"], test_share=0)
    with pytest.raises(DataError, match=r"train_classes says which .* but class_split 'seen' lets all train and test"):
        split_classes(classes, train_classes=["Pear"], class_split="seen")
    with pytest.raises(DataError, match="class_split must be one of first, alternate, random, seen, got 'even'"):
        split_classes(classes, class_split="even")


# ---- layouts


def test_classes_layout(tmp_path, load, capfd):
    root = write_classes(tmp_path / "root", LETTERS)
    write_image(root / "b/more/deep.JPG")
    write_image(root / "a/._000.png")
    (root / "__MACOSX").mkdir()
    splits = load(root)
    assert list(splits) == ["train", "test"]
    assert names(splits["train"]) == list("abc")
    assert names(splits["test"]) == list("def")
    expected = [(c, str(root / c / file)) for c in "abc" for file in ("000.png", "001.png")]
    expected.insert(4, ("b", str(root / "b/more/deep.JPG")))
    assert rows(splits["train"]) == expected
    assert all(row["image"]["bytes"] is None for row in splits["train"])
    assert splits["test"]["label"][:] == [0, 0, 1, 1, 2, 2]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""  # small folders are prepared in silence


def test_class_options_reach_the_folder(tmp_path, load):
    root = write_classes(tmp_path / "root", LETTERS)
    assert names(load(root, class_split="alternate")["test"]) == list("bdf")
    assert names(load(root, train_classes=["f", "b"])["train"]) == list("bf")
    assert names(load(root, test_share=0.2)["test"]) == ["f"]


@pytest.mark.parametrize("upper", [False, True])
def test_train_test_layout(tmp_path, load, upper):
    root = tmp_path / "root"
    write_classes(root / ("Train" if upper else "train"), {"x": 2, "y": 1})
    write_classes(root / ("Test" if upper else "test"), {"a": 1, "b": 3})
    splits = load(root)
    assert {name: [row[0] for row in rows(split)] for name, split in splits.items()} == {
        "train": ["x", "x", "y"],
        "test": ["a", "b", "b", "b"],
    }


def test_query_gallery_layout(tmp_path, load, caplog):
    root = tmp_path / "root"
    write_classes(root / "train", {"x": 2, "y": 1})
    write_classes(root / "query", {"a": 1, "c": 1})
    write_classes(root / "gallery", {"a": 2, "b": 1})
    with caplog.at_level(logging.WARNING):
        splits = load(root)
    assert list(splits) == ["train", "query", "gallery"]
    assert names(splits["train"]) == ["x", "y"]
    assert names(splits["query"]) == names(splits["gallery"]) == ["a", "b", "c"]
    assert splits["query"]["label"][:] == [0, 2]
    assert splits["gallery"]["label"][:] == [0, 0, 1]
    assert "1 query classes have no image in the gallery" in caplog.text and "'c'" in caplog.text


def test_layouts_can_be_forced(tmp_path, load):
    root = tmp_path / "root"
    for split, name in (("train", "x"), ("test", "t"), ("query", "q"), ("gallery", "q")):
        write_classes(root / split, {name: 1})
    with pytest.raises(DataError, match="train, test, query and gallery: say layout"):
        load(root)
    assert list(load(root, layout="train_test")) == ["train", "test"]
    assert list(load(root, layout="query_gallery")) == ["train", "query", "gallery"]
    with pytest.raises(DataError, match="expected layout='train_test' or layout='query_gallery'"):
        load(root, layout="classes")


def test_one_image_classes_are_allowed_on_both_sides(tmp_path, load):
    splits = load(write_classes(tmp_path / "root", {"a": 1, "b": 2, "c": 1, "d": 2}))
    assert splits["train"]["label"][:] == [0, 1, 1]
    assert splits["test"]["label"][:] == [0, 1, 1]


def test_what_is_left_out_is_said(tmp_path, load, caplog):
    root = write_classes(tmp_path / "root", {"a": 1, "b": 1, "c": 1, "d": 1, "empty": 0})
    (root / "notes").mkdir()
    (root / "notes/read.txt").write_text("hello")
    write_image(root / "overview.jpg")
    with caplog.at_level(logging.WARNING):
        splits = load(root)
    assert names(splits["train"]) + names(splits["test"]) == list("abcd")
    assert "2 class folders hold no images and are left out: 'empty', 'notes'" in caplog.text
    assert "1 images lie beside the class folders" in caplog.text
    write_classes(tmp_path / "two/train", {"x": 1})
    write_classes(tmp_path / "two/test", {"y": 1})
    write_classes(tmp_path / "two/val", {"z": 1})
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "two")
    assert "the folder 'val' is not part of the layout 'train_test'" in caplog.text
    assert "there is one test class" in caplog.text


def test_non_ascii_names(tmp_path, load):
    splits = load(write_classes(tmp_path / "ro ot", {"Äpfel, rot": 1, "梨": 1}))
    assert rows(splits["train"]) == [("Äpfel, rot", str(tmp_path / "ro ot/Äpfel, rot/000.png"))]
    assert rows(splits["test"]) == [("梨", str(tmp_path / "ro ot/梨/000.png"))]


# ---- the prepared tables


def test_prepared_tables_are_reused_and_never_stale(tmp_path, load):
    root = write_classes(tmp_path / "root", LETTERS)

    def tables():
        return sorted((tmp_path / "cache").rglob("*.arrow"))

    def fingerprint():
        return ImageFolders.list_splits(str(root)).fingerprint

    load(root)
    before, stamps = tables(), [path.stat().st_mtime_ns for path in tables()]
    load(root)
    assert tables() == before and [path.stat().st_mtime_ns for path in before] == stamps
    write_image(root / "a/new.png")
    assert len(load(root)["train"]) == 7
    old = fingerprint()
    os.utime(root / "a/new.png", ns=(1, 1))
    assert fingerprint() != old
    (root / "a/new.png").unlink()
    assert len(load(root)["train"]) == 6
    root.rename(tmp_path / "moved")
    assert load(tmp_path / "moved")["train"][0]["image"]["path"] == str(tmp_path / "moved/a/000.png")


def test_stream_gives_the_same_rows(tmp_path, load, monkeypatch):
    monkeypatch.setattr("vptsp.data_scripts.builder.SHARD_SIZE", 4)
    root = write_classes(tmp_path / "root", LETTERS)
    builder = ImageFolders("train", str(root), cache_dir=str(tmp_path / "cache"))
    stream = builder.as_streaming_dataset("train")
    assert stream.num_shards == 2
    assert list(stream) == list(load(root)["train"])
    with pytest.raises(DataError, match="group must be one of train, test, got 'query'"):
        ImageFolders("query", str(root))


# ---- errors


def test_folder_errors(tmp_path, load):
    with pytest.raises(DataError, match="data_dir is missing"):
        load(None)
    with pytest.raises(DataError, match=r"absent/deep does not exist \(the nearest folder that does is .*\)"):
        load(tmp_path / "absent/deep")
    with pytest.raises(DataError, match=r"must be a folder, but .*photo.png is a file"):
        load(write_image(tmp_path / "photo.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is empty; expected one folder per class"):
        load(tmp_path / "empty")
    write_image(tmp_path / "flat/rose/a.png")
    with pytest.raises(
        DataError, match=r"holds 1 images \(a.png, ...\) but no class folders.*'rose' is itself a class"
    ):
        load(tmp_path / "flat/rose")
    (tmp_path / "bare/a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images in any of the 1 folders of .*bare \('a'\)"):
        load(tmp_path / "bare")
    with pytest.raises(DataError, match=r"holds one class only \('rose'\)"):
        load(tmp_path / "flat")
    with pytest.raises(DataError, match="layout must be one of auto, classes"):
        load(tmp_path / "flat", layout="flat")
    with pytest.raises(DataError, match=r"layout 'train_test' needs the folders train, test .* missing train, test"):
        load(tmp_path / "flat", layout="train_test")


@pytest.mark.parametrize("between", ["", "images/", "data/images/"])
def test_root_too_high(tmp_path, load, between):
    root = tmp_path / "root"
    write_classes(root / f"set/{between}", LETTERS)
    (root / "annotations").mkdir()
    meant = root / f"set/{between}"
    with pytest.raises(DataError, match=f"too high: its only folder with images is 'set'.*Did you mean {meant}\\?"):
        load(root)
    assert len(load(meant)["train"]) == 6


def test_split_folder_errors(tmp_path, load):
    root = tmp_path / "root"
    write_classes(root / "train", {"x": 2, "y": 1})
    with pytest.raises(DataError, match=r"has only 'train'; expected train and test, or train, query and gallery"):
        load(root)
    write_classes(root / "query", {"a": 1, "y": 1})
    with pytest.raises(DataError, match="has only 'query', 'train'"):
        load(root)
    write_classes(root / "gallery", {"b": 1})
    with pytest.raises(DataError, match=r"1 classes of .* are in both training and test \('y'\)"):
        load(root)
    (root / "query/y").rename(root / "query/z")
    with pytest.raises(DataError, match="share no class name: 'a', 'z' against 'b'"):
        load(root)
    (root / "query/a").rename(root / "query/b")
    with pytest.raises(DataError, match=r"test_share splits the classes of the layout 'classes', but"):
        load(root, test_share=0.3)
    (root / "gallery/b/000.png").unlink()
    with pytest.raises(DataError, match=r"no images in any of the 1 folders of .*gallery"):
        load(root)


def test_grocery_photos(load):
    root = SHARED_DATA / "grocery" / "images"
    if not root.is_dir():
        pytest.skip("needs the grocery photos")
    splits = load(root, class_split="alternate")
    assert {name: (len(split), len(names(split))) for name, split in splits.items()}["train"][1] == 41
    assert len(names(splits["test"])) == 40
    assert len(splits["train"]) + len(splits["test"]) == 2936
    assert names(splits["train"]) == sorted(folder.name for folder in root.iterdir())[::2]
    assert all(path.split("/")[-2] == name for name, path in rows(splits["test"]))


# ---- images of every kind, from a folder and from an archive


def odd_images():
    """Contents, and the RGB value that must come out at the top left."""

    def encode(image, kind, **options):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    grey16 = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16))
    turned = Image.new("RGB", (16, 8), (0, 0, 0))
    turned.paste((200, 200, 200), (0, 4, 16, 8))  # the lower half, which orientation 3 turns up
    exif = Image.Exif()
    exif[0x0112] = 3
    palette = Image.new("RGB", (8, 8), (250, 10, 20)).convert("P", palette=Image.Palette.ADAPTIVE)
    return {
        "grey.jpg": (encode(Image.new("L", (8, 8), 90), "JPEG"), (90, 90, 90)),
        "cmyk.jpg": (encode(Image.new("CMYK", (8, 8), (0, 0, 0, 155)), "JPEG"), (100, 100, 100)),
        "palette.png": (encode(palette, "PNG"), (250, 10, 20)),
        "sixteen.png": (encode(grey16, "PNG"), (128, 128, 128)),
        "turned.jpg": (encode(turned, "JPEG", exif=exif), (200, 200, 200)),
        "alpha.png": (encode(Image.new("RGBA", (8, 8), (7, 8, 9, 255)), "PNG"), (7, 8, 9)),
    }


@pytest.mark.parametrize("where", ["folder", "archive"])
def test_images_of_every_kind(tmp_path, load, where):
    odd = odd_images()
    files = {f"images/001.a/{name}": content for name, (content, _) in odd.items()}
    files["images/001.a/cut.jpg"] = odd["grey.jpg"][0][:-60]
    files["images/101.b/x.png"] = odd["alpha.png"][0]
    if where == "folder":
        splits = load(write_files(tmp_path / "root", files) / "images")
    else:
        archive = write_archive(tmp_path / "CUB_200_2011.tgz", files)
        splits = load_splits("cub", archive, cache_dir=tmp_path / "cache", verify_counts=False)
    images = ImageDataset(splits["train"], None)
    names = [row["image"]["path"].rpartition("/")[2] for row in splits["train"]]
    assert sorted(names) == sorted([*odd, "cut.jpg"])
    for row, name in enumerate(names):
        if name == "cut.jpg":
            with pytest.raises(ImageError, match=r"001.a/cut.jpg: can.t read this image .*[Tt]runcated"):
                images.open_image(row)
            continue
        image = images.open_image(row)
        assert image.mode == "RGB"
        assert np.abs(np.array(image.getpixel((0, 0))) - odd[name][1]).max() <= 2, name


def test_symbolic_links(tmp_path, load):
    root = write_classes(tmp_path / "root", {"a": 1, "b": 1, "c": 2})
    write_classes(tmp_path / "disk2", {"c": 2})
    (root / "a/link.png").symlink_to(tmp_path / "disk2/c/001.png")
    (root / "b/round").symlink_to(root / "b")
    (root / "b/above").symlink_to(root)
    splits = load(root, train_classes=["a", "b"])
    assert [path.removeprefix(f"{root}/") for _, path in rows(splits["train"])] == [
        "a/000.png",
        "a/link.png",
        "b/000.png",
    ]
    assert len(splits["test"]) == 2
    (root / "a/broken.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"a/broken.png is a broken link to nowhere.png"):
        load(root)


def test_files_of_both_sides_are_said(tmp_path, load, caplog):
    root = write_classes(tmp_path / "root", {"c0": 7, "c1": 2})
    (root / "c9").mkdir()
    for number, image in enumerate(sorted((root / "c0").iterdir())):
        (root / f"c9/{number}{image.suffix}").symlink_to(image)
    load(root, train_classes=["c0"], test_classes=["c1", "c9"])
    (warning,) = [record.message for record in caplog.records if "files that train too" in record.message]
    first = sorted((root / "c0").iterdir())[0]
    assert warning.startswith(f"{root}: 7 test images are files that train too, by links: '{root}/c9/0")
    assert f"is {first}'" in warning
    assert warning.endswith("and 2 more")
    caplog.clear()
    load(root, train_classes=["c0", "c9"], test_classes=["c1"])
    load(root, test_share=0)
    assert "files that train too" not in caplog.text
    root = write_classes(tmp_path / "known", {"a": 1})
    (root / "a/link.png").symlink_to(root / "a/000.png")
    write_classes(root, {"a": 1, "b": 4})
    load(root, class_split="seen")  # the gallery are the training images, which is meant; a query that is one is not
    assert f"{root}: 1 test images are files that train too" in caplog.text


def test_files_of_both_splits_are_said(tmp_path, load, caplog):
    root = write_files(tmp_path / "root", {})
    write_classes(root / "train", {"a": 2})
    write_classes(root / "test", {"b": 2})
    (root / "test/b/link.jpg").symlink_to(sorted((root / "train/a").iterdir())[0])
    load(root)
    assert (
        f"1 test images are files that train too, by links: '{root}/test/b/link.jpg is {root}/train/a/" in caplog.text
    )
