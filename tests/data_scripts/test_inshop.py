import pytest
from data_fixtures import jpeg_bytes, rows_of, write_archive, write_files

from vptsp import DataArguments, DataError, InShop, check_data_arguments, load_splits


ROWS = [
    ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
    ("img/WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "train"),
    ("img/WOMEN/Tees_Tanks/id_00000007/01_1_front.jpg", "id_00000007", "query"),
    ("img/MEN/Denim/id_00000001/02_1_front.jpg", "id_00000001", "query"),
    ("img/WOMEN/Tees_Tanks/id_00000007/01_2_side.jpg", "id_00000007", "gallery"),
    ("img/WOMEN/Tees_Tanks/id_00000007/01_3_back.jpg", "id_00000007", "gallery"),
    ("img/MEN/Denim/id_00000001/02_7_additional.jpg", "id_00000001", "gallery"),
    ("img/MEN/Shorts/id_00000010/02_7_additional.jpg", "id_00000010", "train"),
]
IMAGES = {path: jpeg_bytes(seed) for seed, (path, _, _) in enumerate(ROWS)}
EXPECTED = {  # item and row, in class order
    "train": [("id_00000002", 0), ("id_00000002", 1), ("id_00000010", 7)],
    "query": [("id_00000001", 3), ("id_00000007", 2)],
    "gallery": [("id_00000001", 6), ("id_00000007", 4), ("id_00000007", 5)],
}


def list_text(rows=ROWS, announced=None):
    """The official format: columns padded with blanks."""
    lines = [f"{path:<70} {item} {status}\n" for path, item, status in rows]
    return f"{len(rows) if announced is None else announced}\nimage_name item_id evaluation_status\n{''.join(lines)}"


LIST = list_text()


@pytest.fixture
def load(tmp_path):
    def load_inshop(root, **options):
        return load_splits("inshop", root, cache_dir=tmp_path / "cache", **{"verify_counts": False, **options})

    return load_inshop


def check(splits):
    assert list(splits) == ["train", "query", "gallery"]
    for split, expected in EXPECTED.items():
        rows = [(name, content) for name, _, content in rows_of(splits[split])]
        assert rows == [(item, IMAGES[ROWS[row][0]]) for item, row in expected]
    assert splits["train"].features["label"].names == ["id_00000002", "id_00000010"]
    assert splits["query"].features == splits["gallery"].features
    assert splits["query"].features["label"].names == ["id_00000001", "id_00000007"]


def files_of(layout):
    lists, images = {"research": ("", ""), "official": ("Eval/", "Img/"), "older": ("Anno/", "Img/")}[layout]
    return {
        f"{lists}list_eval_partition.txt": LIST,
        **{f"{images}{path}": content for path, content in IMAGES.items()},
        f"{images}img/WOMEN/._Dresses": b"x",
    }


@pytest.mark.parametrize("layout", ["research", "official", "older"])
def test_folders(tmp_path, load, layout):
    root = write_files(tmp_path / "root", files_of(layout))
    check(load(root))
    check(load(root, streaming=True))
    with pytest.raises(
        DataError, match=r"query: found 2 images of 2 classes, expected 14,218 of 3,985; gallery: found"
    ):
        load(root, verify_counts=True)


@pytest.mark.parametrize("images", ["", "Img/"])
@pytest.mark.parametrize("lists", ["", "Eval/", "my lists/"])
def test_the_large_images(tmp_path, load, images, lists, caplog):
    """They have the same names, below img_highres; the list goes on saying img."""
    large = {f"{images}{path.replace('img/', 'img_highres/', 1)}": content for path, content in IMAGES.items()}
    root = write_files(tmp_path / "root", {f"{lists}list_eval_partition.txt": LIST} | large)
    check_data_arguments(DataArguments(dataset_name="inshop", data_dir=str(root)))
    check(load(root))
    check(load(root, streaming=True))
    archive = tmp_path / "packed" / images / "img_highres.zip"
    write_files(tmp_path / "packed", {f"{lists}list_eval_partition.txt": LIST})
    write_archive(archive, {path.removeprefix(images): content for path, content in large.items()})
    check(load(tmp_path / "packed"))
    if lists != "my lists/":  # above the archive, only the official folders are looked at
        check(load(archive))
    assert "the images are those of" not in caplog.text
    write_files(root, {f"{images}{path}": content for path, content in IMAGES.items()})
    check(load(root))
    assert f"{root}: the images are those of {root}/{images}img, not of {root}/{images}img_highres" in caplog.text


@pytest.mark.parametrize("where", ["", "Img/"])
@pytest.mark.parametrize("lists", ["", "Eval/"])
def test_archive(tmp_path, load, where, lists):
    root = write_files(tmp_path / "root", {f"{lists}list_eval_partition.txt": LIST})
    archive = write_archive(root / f"{where}img.zip", {**IMAGES, "__MACOSX/img/WOMEN/._Dresses": b"x"})
    for data_dir in (root, archive):
        check(load(data_dir))
        check(load(data_dir, streaming=True))
    assert load(root)["query"][0]["image"]["path"] == "img.zip/img/MEN/Denim/id_00000001/02_1_front.jpg"


def test_a_tar_gives_query_and_gallery_too(tmp_path, load):
    root = write_files(tmp_path / "root", {"list_eval_partition.txt": LIST})
    write_archive(root / "img.tar.gz", IMAGES)
    splits, stream = load(root), load(root, streaming=True)
    for split, expected in EXPECTED.items():
        rows = [(name, content) for name, _, content in rows_of(splits[split])]
        wanted = sorted((row, item) for item, row in expected)  # in the archive's order
        assert rows == [(item, IMAGES[ROWS[row][0]]) for row, item in wanted]
        assert rows_of(stream[split]) == rows_of(splits[split])


def test_windows_lists(tmp_path, load):
    text = LIST.replace("/", "\\").replace("\n", "\r\n")
    check(load(write_files(tmp_path / "root", {**files_of("research"), "list_eval_partition.txt": text})))


@pytest.mark.parametrize(
    "row, message",
    [
        (("img/a/b.jpg", "id_00000009", "val"), r":11: expected an image, an item like id_00000002, and train, query"),
        (("img/a/b.jpg", "nine", "train"), r":11: expected an image, an item like id_00000002.* got 'img/a/b.jpg"),
        (("", "id_00000009", "train"), r":11: expected an image, an item"),
        (("../b.jpg", "id_00000009", "train"), r":11: expected a path within the data set, got '../b.jpg'"),
        ((ROWS[0][0], "id_00000009", "train"), r":11: the image 'WOMEN/.*/02_1_front.jpg' was named before, at .*:3"),
        (("img/a/b.jpg", "id_00000002", "gallery"), r":11: the class 'id_00000002' is in the training list too"),
        (("img/a/b.jpg", "id_00000009", "train"), r"1 of the 9 images that In-Shop Clothes names are missing in"),
    ],
)
def test_lines_that_are_wrong(tmp_path, load, row, message):
    files = {**files_of("official"), "Eval/list_eval_partition.txt": list_text([*ROWS, row])}
    with pytest.raises(DataError, match=message):
        load(write_files(tmp_path / "root", files), verify_counts=True)


def test_a_list_that_was_cut_off(tmp_path, load):
    root = write_files(tmp_path / "root", {**files_of("research"), "list_eval_partition.txt": list_text(announced=9)})
    with pytest.raises(DataError, match=r"its first line announces 9 images, but it names 8; the download may be cut"):
        load(root, verify_counts=True)
    check(load(root))


def test_wrong_folder(tmp_path, load):
    root = write_files(tmp_path / "high/root", files_of("official"))
    for low in (root / "Img", root / "Eval", root / "Img/img", root / "Img/img/WOMEN"):
        with pytest.raises(DataError, match=rf"{low} is too low: did you mean {root}\?"):
            load(low)
    with pytest.raises(DataError, match=rf"high is too high: did you mean {root}\?"):
        load(tmp_path / "high")
    with pytest.raises(DataError, match=r"holds list_eval_partition.txt, but no images: expected img/, Img/img/"):
        load(write_files(tmp_path / "bare", {"Eval/list_eval_partition.txt": LIST}))
    with pytest.raises(DataError, match=r"list_eval_partition.txt is missing: expected it beside .*img.zip"):
        load(write_archive(tmp_path / "alone/Img/img.zip", IMAGES))
    with pytest.raises(DataError, match=r"expected list_eval_partition.txt and img/ or img.zip in .*; found 'img'"):
        load(write_files(tmp_path / "images", {"img/x.jpg": b"x"}))


def test_full_size(tmp_path):
    """As many rows as the published list: 25,882 of 3,997 items to train, 14,218 and 12,612 of 3,985 to test."""
    rows, image = [], 0
    for status, count, items, first in (
        ("train", 25882, 3997, 1),
        ("query", 14218, 3985, 3998),
        ("gallery", 12612, 3985, 3998),
    ):
        for i in range(count):
            image += 1
            item = f"id_{first + i % items:08d}"
            rows.append((f"img/WOMEN/Dresses/{item}/{image:05d}.jpg", item, status))
    write_files(tmp_path, {"list_eval_partition.txt": list_text(rows)})
    write_archive(tmp_path / "img.zip", {path: b"" for path, _, _ in rows})
    listing = InShop.list_splits(str(tmp_path))
    assert {split: tuple(listing.counts(split)) for split in listing.splits} == {
        "train": (25882, 3997),
        "query": (14218, 3985),
        "gallery": (12612, 3985),
    }
    found = {
        (file, listing.class_names[group][label], split)
        for group, splits in (("train", ["train"]), ("test", ["query", "gallery"]))
        for split in splits
        for file, label in zip(*listing.splits[split], strict=True)
    }
    assert found == {(f"{tmp_path}/img.zip/{path}", item, status) for path, item, status in rows}
