import pytest
from data_fixtures import jpeg_bytes, rows_of, split_list, write_archive, write_files

from vptsp import DataArguments, DataError, StanfordOnlineProducts, check_data_arguments, load_splits


HEADER = "image_id class_id super_class_id path\n"
TRAIN = HEADER + (
    "1 1 1 bicycle_final/111085122871_0.JPG\n"
    "2 1 1 bicycle_final/111085122871_1.JPG\n"
    "3 10 2 cabinet_final/110715681235_0.JPG\n"
    "4 2 1 bicycle_final/111265328556_0.JPG\n"
)
TEST = HEADER + "5 11319 1 bicycle_final/251952414262_0.JPG\n6 11320 2 cabinet_final/25194_0.JPG\n"
IMAGES = {
    line.split()[3]: jpeg_bytes(seed)
    for seed, line in enumerate(line for line in (TRAIN + TEST).splitlines() if line[0].isdigit())
}
EXPECTED = {
    "train": [
        ("bicycle 1", "bicycle_final/111085122871_0.JPG"),
        ("bicycle 1", "bicycle_final/111085122871_1.JPG"),
        ("bicycle 2", "bicycle_final/111265328556_0.JPG"),
        ("cabinet 10", "cabinet_final/110715681235_0.JPG"),
    ],
    "test": [
        ("bicycle 11319", "bicycle_final/251952414262_0.JPG"),
        ("cabinet 11320", "cabinet_final/25194_0.JPG"),
    ],
}
LISTS = {"Ebay_train.txt": TRAIN, "Ebay_test.txt": TEST}
OFFICIAL = {**LISTS, "Ebay_info.txt": HEADER, **IMAGES, "bicycle_final/._111085122871_0.JPG": b"x"}
INFO_FILES = {f"Info_Files/{name}": text for name, text in LISTS.items()}
RESEARCH = {**INFO_FILES, **{f"images/{path}": content for path, content in IMAGES.items()}}
MIXED = {**INFO_FILES, **IMAGES}


@pytest.fixture
def load(tmp_path):
    def load_sop(root, **options):
        return load_splits("sop", root, cache_dir=tmp_path / "cache", **{"verify_counts": False, **options})

    return load_sop


def check(splits, in_order=True):
    for split, expected in EXPECTED.items():
        rows = [(name, content) for name, _, content in rows_of(splits[split])]
        wanted = [(name, IMAGES[file]) for name, file in expected]
        assert (rows if in_order else sorted(rows)) == (wanted if in_order else sorted(wanted))
        assert splits[split].features["label"].names == list(dict.fromkeys(name for name, _ in expected))


@pytest.mark.parametrize("files", [OFFICIAL, RESEARCH, MIXED])
@pytest.mark.parametrize("top", ["", "Stanford_Online_Products/"])
def test_folders(tmp_path, load, files, top):
    root = write_files(tmp_path / "root", {f"{top}{name}": content for name, content in files.items()})
    splits = load(root)
    check(splits)
    assert all(row["image"]["bytes"] is None for row in splits["train"])
    check(load(root, streaming=True))
    if top:
        check(load(root / top))
    with pytest.raises(DataError, match=r"Stanford Online Products in .* test: found 2 images of 2 classes, expected"):
        load(root, verify_counts=True)


def test_lists_in_a_folder_beside_the_images(tmp_path, load):
    for images in ("Stanford_Online_Products/", "images/", ""):
        files = {f"my lists/{name}": text for name, text in LISTS.items()}
        files |= {f"{images}{path}": content for path, content in IMAGES.items()}
        root = write_files(tmp_path / f"root {images.strip('/')}", files)
        check_data_arguments(DataArguments(dataset_name="sop", data_dir=str(root)))
        check(load(root))
        with pytest.raises(DataError, match=rf"my lists is too low: did you mean {root}\?"):
            load(root / "my lists")


@pytest.mark.parametrize("files", [OFFICIAL, MIXED])
@pytest.mark.parametrize("name", ["Stanford_Online_Products.zip", "Stanford_Online_Products.tar.gz"])
def test_archives(tmp_path, load, files, name):
    members = {f"Stanford_Online_Products/{member}": content for member, content in files.items()}
    members |= {f"__MACOSX/Stanford_Online_Products/._{member}": b"x" for member in LISTS}
    archive = write_archive(tmp_path / "packed" / name, members)
    for data_dir in (archive, archive.parent):
        check(load(data_dir), in_order=name.endswith(".zip"))
        stream = load(data_dir, streaming=True)
        assert stream["train"].num_shards == 1
        assert rows_of(stream["train"]) == rows_of(load(data_dir)["train"])
    path = load(archive)["test"][0]["image"]["path"]
    assert path == f"{name}/Stanford_Online_Products/bicycle_final/251952414262_0.JPG"


def test_lists_made_on_windows(tmp_path, load):
    text = "\ufeff" + TRAIN.replace("/", "\\").replace("\n", "\r\n") + "\r\n"
    check(load(write_files(tmp_path / "root", {**OFFICIAL, "Ebay_train.txt": text})))


@pytest.mark.parametrize(
    "name, line, message",
    [
        ("Ebay_train.txt", "5 x 1 a/b.JPG", r"train.txt:6: expected image_id class_id .* got '5 x 1 a/b.JPG'"),
        ("Ebay_train.txt", "5 1 1", r"train.txt:6: expected image_id class_id super_class_id path"),
        ("Ebay_test.txt", "7 11321 1 /a/b.JPG", r"test.txt:4: expected a path within the data set, got '/a/b.JPG'"),
        ("Ebay_test.txt", "7 11321 1 ../b.JPG", r"test.txt:4: expected a path within the data set, got '../b.JPG'"),
        ("Ebay_test.txt", "7 11321 1 C:\\b.JPG", r"test.txt:4: expected a path within the data set"),
        (
            "Ebay_test.txt",
            "7 11321 1 bicycle_final/111085122871_1.JPG",
            r"test.txt:4: the image 'bicycle_final/111085122871_1.JPG' was named before, at .*Ebay_train.txt:3",
        ),
        (
            "Ebay_train.txt",
            "2 1 1 bicycle_final/./111085122871_1.JPG",
            r"train.txt:6: the image 'bicycle_final/111085122871_1.JPG' was named before, at .*Ebay_train.txt:3",
        ),
        ("Ebay_test.txt", "7 2 1 bicycle_final/new.JPG", r"test.txt:4: the class 'bicycle 2' is in the training list"),
    ],
)
def test_lines_that_are_wrong(tmp_path, load, name, line, message):
    files = {**OFFICIAL, name: f"{LISTS[name]}{line}\n"}
    with pytest.raises(DataError, match=message):
        load(write_files(tmp_path / "root", files))
    members = {f"Stanford_Online_Products/{member}": content for member, content in files.items()}
    archive = write_archive(tmp_path / "Stanford_Online_Products.zip", members)
    with pytest.raises(DataError, match=rf"Products.zip/Stanford_Online_Products/Ebay_.*{message}"):
        load(archive)


def test_a_line_that_is_not_text(tmp_path, load):
    root = write_files(tmp_path / "root", {**OFFICIAL, "Ebay_test.txt": TEST.encode() + b"7 1 1 \xff\xfe.JPG\n"})
    with pytest.raises(DataError, match=r"Ebay_test.txt:4: the line is not valid UTF-8"):
        load(root)


def test_non_ascii_names_in_either_form(tmp_path, load):
    """The list has a composed letter, the file system the letter and the accent (as macOS unpacks)."""
    composed, separate = "caf\u00e9", "cafe\u0301"
    files = {
        **OFFICIAL,
        "Ebay_test.txt": f"{TEST}7 11321 1 mug_final/{composed}.JPG\n",
        f"mug_final/{separate}.JPG": jpeg_bytes(50),
    }
    splits = load(write_files(tmp_path / "root", files))
    assert rows_of(splits["test"])[-1] == (
        "mug 11321",
        f"{tmp_path}/root/mug_final/{separate}.JPG",
        jpeg_bytes(50),
    )


def test_missing_images_and_links(tmp_path, load, caplog):
    root = write_files(tmp_path / "root", OFFICIAL)
    elsewhere = write_files(tmp_path / "disk2", {"cabinet_final/x": b""}) / "cabinet_final"
    (root / "cabinet_final/110715681235_0.JPG").rename(elsewhere / "110715681235_0.JPG")
    (root / "cabinet_final/25194_0.JPG").rename(elsewhere / "25194_0.JPG")
    (root / "cabinet_final").rmdir()
    (root / "cabinet_final").symlink_to(elsewhere)
    check(load(root))  # a folder on another disk
    link = root / "bicycle_final/251952414262_0.JPG"
    link.rename(elsewhere / "other.JPG")
    link.symlink_to(elsewhere / "other.JPG")
    check(load(root))
    (elsewhere / "other.JPG").unlink()
    with pytest.raises(DataError, match=rf"{link} is a broken link to .*other.JPG"):
        load(root)
    link.unlink()
    with pytest.raises(
        DataError,
        match=r"1 of the 6 images that Stanford Online Products names are missing in .*root: "
        r"'bicycle_final/251952414262_0.JPG' \(named at .*Ebay_test.txt:2\). verify_counts=False leaves them out",
    ):
        load(root, verify_counts=True)
    assert load(root)["test"].features["label"].names == ["cabinet 11320"]
    assert "1 of the 6 images" in caplog.text
    (elsewhere / "25194_0.JPG").unlink()
    with pytest.raises(DataError, match=r"root holds no test class of Stanford Online Products"):
        load(root)


def test_wrong_folder(tmp_path, load):
    root = write_files(tmp_path / "high/er/Stanford_Online_Products", RESEARCH)
    for low in (root / "Info_Files", root / "images", root / "images/bicycle_final"):
        with pytest.raises(DataError, match=rf"{low} is too low: did you mean {root}\?"):
            load(low)
    with pytest.raises(DataError, match=rf"high is too high: did you mean {root.parent}\?"):
        load(tmp_path / "high")
    (tmp_path / "bare").mkdir()
    (root / "Info_Files").rename(tmp_path / "bare/Info_Files")
    with pytest.raises(DataError, match=r"Info_Files holds the lists, but there are no image folders"):
        load(tmp_path / "bare")
    (tmp_path / "bare/Info_Files").rename(root / "Info_Files")
    (root / "Info_Files/Ebay_test.txt").unlink()
    with pytest.raises(DataError, match=r"Info_Files holds only one of the lists; Ebay_test.txt is missing"):
        load(root)
    with pytest.raises(DataError, match=r"holds no Ebay_train.txt; it is not the official archive"):
        load(write_archive(tmp_path / "other.zip", {"a/b.JPG": b"x"}))
    with pytest.raises(DataError, match=r"holds Ebay_train.txt at its top; expected it in a folder"):
        load(write_archive(tmp_path / "flat.zip", OFFICIAL))


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_full_size(tmp_path, packed):
    kinds, lists, files, expected = {}, {}, {}, {}
    image_id = 0
    for split in ("train", "test"):
        lines = [HEADER]
        for file, label in split_list(f"SOP_{split}.csv"):
            image_id += 1
            path = file.removeprefix("/data/Stanford_Online_Products/")
            kind = kinds.setdefault(path.partition("_final/")[0], len(kinds) + 1)
            lines.append(f"{image_id} {label} {kind} {path}\n")
            files[path] = b""
            expected[path] = (split, label)
        lists[f"Ebay_{split}.txt"] = "".join(lines)
    files = {f"Stanford_Online_Products/{name}": content for name, content in {**lists, **files}.items()}
    where = tmp_path / "Stanford_Online_Products.zip"
    if packed:
        write_archive(where, files)
    else:
        write_files(tmp_path, files)
    listing = StanfordOnlineProducts.list_splits(str(tmp_path), str(tmp_path / "cache"))
    prefix = f"{where if packed else tmp_path}/Stanford_Online_Products/"
    found = {
        file.removeprefix(prefix): (split, label + (1 if split == "train" else 11319))
        for split, rows in listing.splits.items()
        for file, label in zip(rows.files, rows.labels, strict=True)
    }
    assert found == expected
    assert listing.counts("train") == (59551, 11318) and listing.counts("test") == (60502, 11316)
    assert listing.class_names["test"][0] == "bicycle 11319" and listing.class_names["train"][-1] == "toaster 11318"
