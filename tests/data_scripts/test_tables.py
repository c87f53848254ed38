"""Tables of images: what is read from each kind, which columns are taken, and what is refused with its line."""

import csv
import json
import re

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from data_fixtures import jpeg_bytes, rows_of, write_files

from vptsp import DataArguments, DataError, ImageDataset, check_data_arguments, load_splits
from vptsp.data_scripts.command_check import main as check
from vptsp.search.image_sources import list_source
from vptsp.search.table_sources import table_source


NAMES = ["a/1.jpg", "a/2.jpg", "b/3.jpg", "c/4.jpg"]
LABELS = ["007", "007", "08", "mug"]
PRICES = [3.5, None, 2.0, 10.0]
CODES = ["01", "2", "", "x"]
STOCK = [1, 2, 3, None]


@pytest.fixture
def shop(tmp_path):
    """Four photos and who is on them."""
    return write_files(tmp_path / "shop", {name: jpeg_bytes(i) for i, name in enumerate(NAMES)})


@pytest.fixture
def load(tmp_path):
    return lambda place, name="table", **options: load_splits(name, place, cache_dir=tmp_path / "cache", **options)


def rows(**changes):
    columns = {"file": NAMES, "product": LABELS, "price": PRICES, "code": CODES, "stock": STOCK} | changes
    columns = {name: values for name, values in columns.items() if values is not None}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_csv(path, table, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)
    return path


def write_jsonl(path, table):
    path.write_text("\n\n".join(map(json.dumps, table)), encoding="utf-8")
    return path


def write_parquet(path, table):
    pd.DataFrame(table).to_parquet(path)
    return path


def write_arrow(path, table):
    pyarrow.feather.write_feather(pa.Table.from_pylist(table), str(path), compression="uncompressed")
    return path


WRITERS = {
    "t.csv": write_csv,
    "t.CSV": lambda path, table: write_csv(path, table, ";", "utf-8-sig"),
    "t.tsv": lambda path, table: write_csv(path, table, "\t"),
    "t.jsonl": write_jsonl,
    "t.parquet": write_parquet,
    "t.arrow": write_arrow,
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_holds_the_same(shop, load, name, streaming, caplog):
    place = WRITERS[name](shop / name, rows())
    splits = load(place, test_share=0.34, streaming=streaming)
    found = [(label, content) for label, _, content in rows_of(splits["train"])]
    assert found == [("007", jpeg_bytes(0)), ("007", jpeg_bytes(1)), ("08", jpeg_bytes(2))]
    assert splits["test"].features["label"].names == ["mug"]
    train = list(splits["train"])
    assert [row["price"] for row in train] == PRICES[:3]
    assert [row["code"] or "" for row in train] == CODES[:3]  # with their zeros
    assert [row["stock"] for row in train] == STOCK[:3]
    assert set(train[0]) == {"image", "label", "price", "code", "stock"}
    assert (
        "image_column is 'file', label_column 'product' (class_name in stores and indexes); "
        "along go price, code, stock" in caplog.text
    )
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1


def test_a_frame(shop, load, monkeypatch, tmp_path):
    frame = pd.DataFrame(rows())
    expected = [content for *_, content in rows_of(load(write_csv(shop / "t.csv", rows()), test_share=0)["train"])]
    splits = load(frame, test_share=0, image_root=str(shop))
    assert [content for *_, content in rows_of(splits["train"])] == expected
    assert [row["price"] for row in splits["train"]] == PRICES
    monkeypatch.chdir(shop)
    assert [content for *_, content in rows_of(load(frame, test_share=0)["train"])] == expected
    contents = pd.DataFrame({"image": [jpeg_bytes(i) for i in range(3)], "label": [2, 10, 2]}, index=[7, 7, 9])
    splits = load(contents)
    assert splits["train"].features["label"].names == ["10"]  # a class of a frame is a text
    assert [content for *_, content in rows_of(splits["test"])] == [jpeg_bytes(0), jpeg_bytes(2)]


def test_contents_in_parquet(tmp_path, load):
    table = [{"img": jpeg_bytes(i), "class": name} for i, name in enumerate("abab")]
    place = write_parquet(tmp_path / "t.parquet", table)
    splits = load(place, class_split="seen")
    assert {name: [content for *_, content in rows_of(split)] for name, split in splits.items()}["train"]
    assert splits["train"][0]["image"]["path"] == "t.parquet row 0" or splits["train"][0]["image"]["path"].startswith(
        "t."
    )
    images = ImageDataset(load(place, test_share=0)["train"], lambda image, rng: image)
    assert [images.open_image(i).size for i in range(4)] == [(6, 5)] * 4
    place = write_parquet(tmp_path / "u.parquet", [*table, {"img": b"", "class": "a"}])
    with pytest.raises(DataError, match=r"u.parquet, row 4: the image \('img'\) is empty"):
        load(place)
    broken = load(write_parquet(tmp_path / "v.parquet", [*table, {"img": b"no image", "class": "a"}]), test_share=0)
    with pytest.raises(DataError, match=r"v.parquet row 4"):
        images = ImageDataset(broken["train"], lambda image, rng: image)
        [images.open_image(i) for i in range(5)]


def test_images_of_datasets_in_parquet_and_on_disk(tmp_path, load):
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["z", "a"]),
            "price": datasets.Value("float64"),
            "box": datasets.List(datasets.Value("int64")),
        }
    )
    content = {"photo": [{"path": f"{i}.jpg", "bytes": jpeg_bytes(i)} for i in range(4)], "kind": [0, 1, 0, 1]}
    table = datasets.Dataset.from_dict({**content, "price": [1.0, 2.0, 3.0, 4.0], "box": [[1]] * 4}, features=features)
    table.to_parquet(tmp_path / "one.parquet")
    (tmp_path / "many").mkdir()
    table.to_parquet(tmp_path / "many/train-0.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table.select([0, 2]), "test": table.select([1, 3])}).save_to_disk(tmp_path / "two")
    for name, place in (
        ("table", "one.parquet"),
        ("table", "disk"),
        ("saved", "disk"),
        ("saved", "many"),
        ("saved", "two"),
    ):
        splits = load(tmp_path / place, name)
        assert splits["train"].features["label"].names == ["z"], place  # the order of the ClassLabel
        assert [row["price"] for row in splits["train"]] == [1.0, 3.0]
        assert [content for *_, content in rows_of(splits["test"])] == [jpeg_bytes(1), jpeg_bytes(3)]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_imagefolders(shop, load, ending):
    write = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}[ending]
    write(shop / f"metadata{ending}", [{"file_name": name, "title": f"t{i}"} for i, name in enumerate(NAMES)])
    splits = load(shop, "imagefolder", test_share=0)
    assert [(label, content) for label, _, content in rows_of(splits["train"])] == [
        (name[0], jpeg_bytes(i)) for i, name in enumerate(NAMES)
    ]  # the folder is the class, where no column is
    assert [row["title"] for row in splits["train"]] == ["t0", "t1", "t2", "t3"]
    write(shop / f"metadata{ending}", [{"file_name": name, "label": x} for name, x in zip(NAMES, "xyxy", strict=True)])
    assert load(shop, "imagefolder")["train"].features["label"].names == ["x"]


def test_images_that_metadata_do_not_name_are_said(shop, load, caplog):
    (shop / "note.txt").write_text("")
    write_csv(shop / "metadata.csv", [{"file_name": "a/1.jpg", "price": 1}, {"file_name": "./b/3.jpg", "price": 2}])
    assert load(shop, "imagefolder", test_share=0)["train"].features["label"].names == ["a", "b"]
    assert "2 images are not named in the metadata, left out: 'a/2.jpg', 'c/4.jpg'" in caplog.text
    assert "1 files are no images that can be read, left out: .txt 1" in caplog.text


def test_splits_that_nothing_takes_need_no_classes(tmp_path, load):
    part = datasets.Dataset.from_dict({"image": [jpeg_bytes(0), jpeg_bytes(1)], "label": ["a", "b"]})
    other = datasets.Dataset.from_dict({"image": [jpeg_bytes(2)], "label": ["c"]})
    unlabelled = datasets.Dataset.from_dict({"image": [jpeg_bytes(3)]})
    datasets.DatasetDict({"train": part, "test": other, "more": unlabelled}).save_to_disk(tmp_path / "disk")
    for streaming in (False, True):
        assert set(load(tmp_path / "disk", "saved", streaming=streaming)) == {"train", "test"}


def test_imagefolders_in_splits(tmp_path, load):
    files = {f"{split}/{i}.jpg": jpeg_bytes(i) for split, i in (("train", 0), ("train", 1), ("test", 2))}
    root = write_files(tmp_path / "root", files)
    write_csv(
        root / "train/metadata.csv", [{"file_name": "0.jpg", "label": "a"}, {"file_name": "1.jpg", "label": "b"}]
    )
    with pytest.raises(DataError, match="'train' have a metadata file, 'test' have none"):
        load(root, "imagefolder")
    write_csv(root / "test/metadata.csv", [{"file_name": "2.jpg", "label": "c"}])
    splits = load(root, "imagefolder")
    assert {name: [label for label, *_ in rows_of(split)] for name, split in splits.items()} == {
        "train": ["a", "b"],
        "test": ["c"],
    }


def test_a_split_column(shop, load, caplog):
    place = write_csv(shop / "t.csv", rows(split=["train", "Train", "test", "val"]))
    splits = load(place)
    assert {name: split.features["label"].names for name, split in splits.items()} == {
        "train": ["007"],
        "test": ["08"],
    }
    assert "the splits 'val' are not part of the layout 'train_test', ignored" in caplog.text
    assert "split" not in splits["train"].column_names
    place = write_csv(shop / "u.csv", rows(split=["train", "train", "", "test"]))
    with pytest.raises(
        DataError, match=r"u.csv:4: the column 'split' is empty; expected train, test or another split"
    ):
        load(place, split_column="split")
    place = write_csv(shop / "v.csv", rows(split=["yes", "yes", "no", "no"]))  # says something else
    assert load(place, test_share=0)["train"][0]["split"] == "yes"
    place = write_csv(shop / "w.csv", rows(part=["query", "gallery", "train", "train"]))
    splits = load(place, split_column="part")
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "query": 1, "gallery": 1}
    place = write_csv(shop / "x.csv", rows(split=["train", "test", "train", "train"]))
    with pytest.raises(DataError, match=r"1 classes of .*x.csv are in both .*class_split='seen'"):
        load(place)
    splits = load(place, class_split="seen")
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "query": 1, "gallery": 3}


def test_reserved_names_go_along_under_others(shop, load, caplog):
    place = write_csv(shop / "t.csv", rows(id=["1", "2", "3", "4"], label=["p", "q", "r", "s"]))
    row = load(place, test_share=0, label_column="product")["train"][0]
    assert (row["table_id"], row["table_label"]) == (1, "p")
    assert "the column 'id' goes along as 'table_id'" in caplog.text


def test_what_is_wrong_is_said_with_its_line(shop, load):
    def fails(message, table=None, name="t.csv", text=None, **options):
        place = shop / name
        if text is not None:
            place.write_bytes(text)
        else:
            WRITERS[name](place, table)
        with pytest.raises(DataError, match=message):
            load(place, **options)

    missing = "1 of the 4 images that .*t.csv names are not there: 'a/9.jpg' .*t.csv:3.*paths are relative to"
    fails(missing, rows(file=["a/1.jpg", "a/9.jpg", "b/3.jpg", "c/4.jpg"]))
    twice = ["a/1.jpg", "a/2.jpg", "a/1.jpg", "c/4.jpg"]
    fails(r"t.csv:4: the image 'a/1.jpg' was named before, at .*t.csv:2", rows(file=twice))
    fails(r"t.csv:3: the image './b/../a/1.jpg' was named before", rows(file=[NAMES[0], "./b/../a/1.jpg", *NAMES[2:]]))
    fails(r"t.jsonl:5: the image 'a/1.jpg' was named before, at .*t.jsonl:1", rows(file=twice), "t.jsonl")
    fails(r"t.parquet, row 2: the image 'a/1.jpg' was named before", rows(file=twice), "t.parquet")
    fails(r"t.csv:3: the label \('product'\) is empty", rows(product=["a", " ", "b", "c"]))
    fails(r"t.jsonl:3: the label \('product'\) is empty", rows(product=["a", None, "b", "c"]), "t.jsonl")
    fails(
        r"t.jsonl:1: the column 'product' must hold text, got the number 1.5", rows(product=[1.5, 1, 2, 3]), "t.jsonl"
    )
    fails(r"t.csv:2: the image has no path", rows(file=["", "a/2.jpg", "b/3.jpg", "c/4.jpg"]))
    fails(r"t.csv:2: 'https://x/1.jpg' is an address", rows(file=["https://x/1.jpg", *NAMES[1:]]))
    fails(r"t.csv:3: 1 values for the 2 columns file, label", text=b"file,label\na/1.jpg,x\na/2.jpg\n")
    fails(r"t.csv:2: the line is not valid UTF-8", text="file,label\na/1.jpg,\xfc\n".encode("latin-1"))
    fails(r"t.csv:1: each column must have a name of its own, got 'file'", text=b"file,file\na/1.jpg,x\n")
    fails("t.csv has no rows", text=b"file,label\n")
    fails("t.csv has no rows", text=b"")
    fails(r"t.jsonl:2: not JSON", name="t.jsonl", text=b'{"file": "a/1.jpg", "label": "x"}\n{"file"\n')
    fails(r"t.jsonl:1: expected a JSON object per line, got \[1\]", name="t.jsonl", text=b"[1]\n")
    fails("t.parquet can't be read", name="t.parquet", text=b"PAR1 no table")
    fails("there is no label_column 'kind'; the columns are file, product", rows(), label_column="kind")
    fails("label_column could be 'product' or 'category': say which", rows(category=LABELS))
    fails("no column is called label, class or product: give label_column", rows(product=None, who=LABELS))
    fails("no column is called image, file or path: give image_column", rows(file=None, where=NAMES))


def test_columns_of_other_kinds_are_left_out_and_said(shop, load, caplog):
    place = write_jsonl(
        shop / "t.jsonl", rows(box=[[1]] * 4, new=[True, None, False, True], mixed=["a", 1, 2.5, None])
    )
    row = load(place, test_share=0)["train"][2]
    assert "the column 'box' holds neither text nor numbers, left out" in caplog.text
    assert (row["new"], row["mixed"], "box" in row) == ("false", "2.5", False)


def test_stored_images_are_there(tmp_path, load):
    def write(name, stored):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"image": pa.array(stored, kind), "label": ["a", "b"]})
        pyarrow.parquet.write_table(table, tmp_path / name)
        return tmp_path / name

    there = {"path": "1.jpg", "bytes": jpeg_bytes(0)}
    assert len(load(write("a.parquet", [there, there]), test_share=0)["train"]) == 2
    gone = {"path": "/gone/1.jpg", "bytes": None}
    with pytest.raises(DataError, match=r"1 of the 2 images that .*names are not there: '/gone/1.jpg' .*row 1\)"):
        load(write("b.parquet", [there, gone]))
    for nothing in (None, {"path": None, "bytes": None}):
        with pytest.raises(DataError, match="row 1: there is no image in the column 'image'"):
            load(write("c.parquet", [there, nothing]))


def test_lines_are_those_of_the_file(shop, load):
    """A quoted value may span lines, and blank lines count."""
    (shop / "t.csv").write_text('file,label,note\na/1.jpg,x,"two\nlines"\n\nb/3.jpg,,\n')
    with pytest.raises(DataError, match=r"t.csv:5: the label"):
        load(shop / "t.csv")


def test_the_early_check_says_which_data_set_reads_a_place(shop, tmp_path):
    place = write_csv(shop / "t.csv", rows())
    check_data_arguments(DataArguments(dataset_name="table", data_dir=str(place)))
    datasets.Dataset.from_dict({"label": [1]}).save_to_disk(tmp_path / "disk")
    check_data_arguments(DataArguments(dataset_name="saved", data_dir=str(tmp_path / "disk")))
    (tmp_path / "empty").mkdir()
    for name, data_dir, message in (
        ("folder", place, "data_dir must be a folder, but .*t.csv is a table: give --dataset_name table"),
        ("folder", tmp_path / "disk", "save_to_disk of datasets wrote: give --dataset_name saved"),
        ("table", shop / "a/1.jpg", "1.jpg is no table: expected a file ending in .csv, .tsv"),
        ("table", tmp_path / "empty", "holds no table: expected metadata.csv"),
        ("table", tmp_path / "absent", "absent does not exist"),
        ("table", None, "data_dir is missing: give a table"),
    ):
        with pytest.raises(DataError, match=message):
            check_data_arguments(DataArguments(dataset_name=name, data_dir=data_dir and str(data_dir)))
    write_csv(shop / "metadata.csv", rows())
    with pytest.raises(DataError, match=r"is an imagefolder with metadata.csv: give --dataset_name imagefolder"):
        check_data_arguments(DataArguments(data_dir=str(shop)))


def test_check_takes_a_table(shop, tmp_path, capsys):
    place = write_csv(shop / "t.csv", rows())
    words = ["table", "--data_dir", str(place), "--decode", "--picture", str(tmp_path / "t.png")]
    assert check(words) == 0
    assert "All 4 images can be read." in capsys.readouterr().out


def places_of_labels(shop, labels):
    """The same labels in a table of every kind, and how each calls its second row."""
    columns = {"file": NAMES, "product": labels}
    table = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    frame = pd.DataFrame({**columns, "file": [str(shop / name) for name in NAMES]})
    places = {"t.csv": "t.csv:3", "t.tsv": "t.tsv:3", "t.jsonl": "t.jsonl:3", "t.parquet": "t.parquet, row 1"}
    datasets.Dataset.from_list(table).save_to_disk(shop / "disk")
    return [
        *((WRITERS[name](shop / name, table), where) for name, where in places.items()),
        (frame, "DataFrame, row 1"),
        (shop / "disk", "disk, split train, row 1"),
    ]


@pytest.mark.parametrize(
    "label", [-1, -20, "-1", "nan", "NaN", "null", "NULL", "None", "<NA>", "a\nb", "a\u2028b"], ids=ascii
)
def test_what_names_no_class_is_refused_everywhere(shop, load, label):
    labels = [7, label, 8, 9] if isinstance(label, int) else ["7", label, "8", "9"]
    for place, where in places_of_labels(shop, labels):
        if where.startswith(("t.csv", "t.tsv")) and label == "a\nb":  # the row ends on the next line
            where = where.replace(":3", ":4")
        is_number = isinstance(label, int) and where.endswith("row 1") and "DataFrame" not in where
        why = "with a line break in it" if len(str(label).splitlines()) > 1 else "which means no class in many tools"
        what = f"{label}; expected an integer >= 0" if is_number else f"{str(label)!r}, {why}"
        for read in (load, table_source):
            with pytest.raises(DataError, match=rf"{where}: .*'product' has the label {re.escape(what)}"):
                read(place)
    for name in ("none", "Nan", "-1a", "x-1", "-", "NULL 2"):
        place = write_csv(shop / "u.csv", rows(product=[name, name, "b", "c"]))
        assert name in load(place, test_share=0)["train"].features["label"].names


def test_texts_of_a_repository_are_checked_too(tmp_path, load):
    for label in ("-1", "nan"):
        part = datasets.Dataset.from_dict({"image": [jpeg_bytes(0), jpeg_bytes(1)], "label": ["a", label]})
        (tmp_path / label).mkdir()
        part.cast_column("image", datasets.Image()).to_parquet(tmp_path / label / "train.parquet")
        with pytest.raises(
            DataError, match=f"row 1 has the label '{label}', which means no class .*leave the row out"
        ):
            load(tmp_path / label, "hub", layout="classes", train_split="train")


def test_a_stray_pair_of_quotes_swallows_no_row(shop, load):
    place = shop / "t.csv"
    place.write_text('file,label\na/1.jpg,"a\na/2.jpg,b"\nb/3.jpg,c\n')
    with pytest.raises(
        DataError, match=r"t.csv:3: the column 'label' has the label 'a\\na/2.jpg,b', with a line break"
    ):
        load(place)
    place.write_text('label,file\na,"a/1.jpg\nb,a/2.jpg"\nc,b/3.jpg\n')
    with pytest.raises(DataError, match=r"t.csv:3: the path 'a/1.jpg\\nb,a/2.jpg' has a line break"):
        load(place)


def test_json_that_can_not_be_taken_as_it_stands(shop, load):
    place = shop / "t.jsonl"
    for line, message in (
        ('{"file": "a/2.jpg", "label": "x", "label": "y"}', r"t.jsonl:2: not JSON \('label' is there twice\)"),
        ('{"file": "a/2.jpg", "label": "x", "n": {"k": 1, "k": 2}}', r"t.jsonl:2: not JSON \('k' is there twice\)"),
        ('{"file": "a/2.jpg", "label": "\\ud800"}', r"t.jsonl:2: the column 'label' holds '\\ud800', which is not"),
        ('{"file": "\\udc00.jpg", "label": "x"}', r"t.jsonl:2: the column 'file' holds '\\udc00.jpg', which is not"),
        ('{"file": "a/2.jpg", "label": "x", "t": "\\ud800"}', r"t.jsonl:2: the column 't' holds '\\ud800'"),
        ('{"file": "a/2.jpg", "label": "x", "\\ud800": 1}', r"the name of a column holds '\\ud800', which is not"),
        ('{"file": "a/2.jpg", "label": "x", "n": ' + "[" * 200_000, r"t.jsonl:2: not JSON"),
        (
            '{"file": "a/2.jpg", "label": "x", "n": 1' + "0" * 30 + "}",
            r"t.jsonl:2: the column 'n' holds 10+, more than",
        ),
    ):
        place.write_text('{"file": "a/1.jpg", "label": "x"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            load(place)


@pytest.mark.parametrize(
    "path", ["x" * 5000, "~no such user/x.png", "a\0.jpg", "a/1.jpg/x"], ids=["long", "user", "nul", "file"]
)
def test_paths_that_can_not_be_are_said_with_their_line(shop, load, path):
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        place = WRITERS[name](shop / name, rows(file=[NAMES[0], path, *NAMES[2:]]))
        where = "t.parquet, row 1" if name == "t.parquet" else rf"{name}:3"
        with pytest.raises(DataError, match=rf"1 of the 4 images .* are not there: .*{where}\)") as caught:
            load(place)
        assert len(str(caught.value)) < 1000
    stored = pa.array([{"bytes": None, "path": path}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pyarrow.parquet.write_table(pa.table({"image": stored, "label": ["a"]}), shop / "u.parquet")
    with pytest.raises(DataError, match=r"1 of the 1 images .* are not there: .*row 0\)"):
        load(shop / "u.parquet")
    (shop / "list.txt").write_text(f"a/1.jpg\n{path}\n")
    with pytest.raises(DataError, match=r"list.txt names 1 files that are not there"):
        list_source(shop / "list.txt")


def test_columns_of_one_name(shop, load):
    frame = pd.DataFrame([["a/1.jpg", "x", "y"]], columns=["file", "label", "label"])
    with pytest.raises(DataError, match="each column must have a name of its own, got 'label' several times"):
        load(frame, image_root=str(shop))
    with pytest.raises(DataError, match="each column must have a name of its own, got '1' several times"):
        load(pd.DataFrame([["a/1.jpg", "x", 1, 2]], columns=["file", "label", 1, "1"]), image_root=str(shop))
    table = pa.Table.from_arrays([pa.array(["a/1.jpg"]), pa.array(["x"]), pa.array(["y"])], ["file", "label", "label"])
    pyarrow.feather.write_feather(table, str(shop / "t.arrow"), compression="uncompressed")
    pyarrow.parquet.write_table(table, shop / "t.parquet")
    for name in ("t.arrow", "t.parquet"):
        with pytest.raises(DataError, match=name):
            load(shop / name)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_both_sides_are_said(shop, load, caplog, streaming):
    (shop / "d").mkdir()
    (shop / "d/9.jpg").symlink_to(shop / "a/1.jpg")
    (shop / "e").symlink_to(shop / "b")
    files = ["a/1.jpg", "a/2.jpg", "b/3.jpg", "d/9.jpg", "e/3.jpg", "c/4.jpg"]
    table = [{"file": file, "label": file[0]} for file in files]
    warning = f"2 test images are files that train too, by links: '{shop}/d/9.jpg is {shop}/a/1.jpg', '{shop}/e/3.jpg"
    sides = {"train_classes": ["a", "b"], "test_classes": ["c", "d", "e"]}
    load(write_csv(shop / "t.csv", table), **sides, streaming=streaming)
    assert warning in caplog.text
    caplog.clear()
    table = [row | {"split": "train" if row["label"] in "ab" else "test"} for row in table]
    load(write_csv(shop / "u.csv", table), streaming=streaming)
    assert warning in caplog.text
    caplog.clear()
    load(shop / "t.csv", train_classes=["a", "d"], test_classes=["b", "c", "e"], streaming=streaming)  # one side each
    assert "files that train too" not in caplog.text
