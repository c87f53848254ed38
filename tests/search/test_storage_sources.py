"""Images in buckets, tar files and Parquet files: the same images, ids, classes and columns as of a copy on a disk."""

import pickle

import pandas as pd
import pytest
import torch
from data_fixtures import jpeg_bytes, write_classes, write_files, write_image, write_tar
from storage_fixtures import s3_service, write_parquet, write_shards

from vptsp import (
    DataError,
    Embedder,
    EmbeddingStore,
    embed_to_store,
    folder_source,
    place_source,
    storage_source,
    table_source,
)
from vptsp.search.commands import main


@pytest.fixture
def upload(monkeypatch):
    pytest.importorskip("moto")
    with s3_service(monkeypatch) as function:
        yield function


def described(source):
    names = [source.class_name(row) for row in range(len(source))]
    return source.ids, names, source.class_names, source.columns


def contents(source):
    stored = [source.stored(row) for row in range(len(source))]
    return [item if isinstance(item, bytes) else open(item, "rb").read() for item in stored]  # noqa: PTH123


def test_a_bucket_is_the_folder_that_was_copied_there(tmp_path, upload):
    root = write_classes(tmp_path / "photos", {"b": 3, "a": 2, "c/d": 2})
    write_files(root, {"a/.hidden.jpg": "x", ".cache/1.jpg": "x", "a/notes.txt": "x"})
    write_image(root / "loose.png")
    there, here = place_source(upload(root)), folder_source(root)
    assert described(there) == described(here)
    assert contents(there) == contents(here)
    assert there.fingerprint() == here.fingerprint()
    assert there.image_root is None
    assert there.description.startswith("images in s3://bucket")


def test_a_file_address_and_fsspec_lead_to_the_same(tmp_path):
    root = write_classes(tmp_path / "photos", {"b": 2, "a": 2})
    expected = folder_source(root).fingerprint()
    for address in (f"file://{root}", f"fsspec+local://{root}", f"file://{root}/"):
        assert place_source(address).fingerprint() == expected


def test_tar_files_on_a_disk_and_in_a_bucket(tmp_path, upload):
    expected = write_shards(tmp_path / "shards")
    for source in (place_source(tmp_path / "shards"), place_source(upload(tmp_path / "shards"))):
        found = {
            name: (
                source.stored(row),
                source.class_name(row),
                source.columns["price"][row],
                source.columns["text"][row],
            )
            for row, name in enumerate(source.ids)
        }
        assert found == expected
        assert list(found) == list(expected)
        assert source.class_names == ["0", "1", "2"]
    one = place_source(tmp_path / "shards" / "000001.tar")
    assert one.ids == [f"{number:04d}.jpg" for number in range(5, 9)]


def test_classes_are_folders_where_no_member_names_them(tmp_path, caplog):
    members = {f"{name}/{i}.jpg": jpeg_bytes(i) for i, name in enumerate(["mug", "cup", "mug"])}
    write_tar(tmp_path / "a.tar", {**members, "mug/readme.md": "x", "mug/9.json": "{}"}, "w")
    source = place_source(tmp_path / "a.tar")
    assert [source.class_name(row) for row in range(3)] == ["mug", "cup", "mug"]
    assert "1 files are no images that can be read, left out: .md 1" in caplog.text
    assert "1 samples have no image, left out: 'mug/9'" in caplog.text


@pytest.mark.parametrize(
    ("files", "mode", "message"),
    [
        ({"1.jpg": b"x"}, "w:gz", "must be an uncompressed tar file"),
        ({"1.jpg": b"x", "1.json": "[1]"}, "w", r"1.json must hold a JSON object, got a list"),
        ({"1.jpg": b"x", "1.json": "{"}, "w", r"1.json is not JSON"),
        ({"1.jpg": b"x", "1.json": '{"a": 1, "a": 2}'}, "w", "'a' is there twice"),
        ({"1.jpg": b"x", "1.json": '{"text": "a"}', "1.txt": "b"}, "w", "'text' of this sample is there twice"),
        ({"1.jpg": b"x", "1.cls": b"\xff"}, "w", r"1.cls is not valid UTF-8"),
        ({"1.jpg": b"x", "1.cls": "-1"}, "w", "which means no class"),
        ({"../1.jpg": b"x"}, "w", "leads out of the archive"),
    ],
)
def test_tar_files_that_are_not_as_expected(tmp_path, files, mode, message):
    write_tar(tmp_path / "a.tar", files, mode)
    with pytest.raises(DataError, match=message):
        place_source(tmp_path / "a.tar")


def test_a_tar_file_that_was_cut_off_names_its_last_member(tmp_path):
    path = write_shards(tmp_path / "shards") and tmp_path / "shards" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(DataError, match=r"000001.tar is truncated or damaged .* the last whole member is"):
        place_source(tmp_path / "shards")


@pytest.mark.parametrize("path_column", [True, False])
def test_parquet_in_a_bucket_is_the_table_that_was_copied_there(tmp_path, upload, path_column):
    path = write_parquet(tmp_path / "shop" / "rows.parquet")
    if not path_column:
        frame = {"image": [jpeg_bytes(i) for i in range(5)], "label": list("abbab"), "split": ["test", *["train"] * 4]}
        pd.DataFrame(frame).to_parquet(path, row_group_size=2)
    here = table_source(path, tmp_path / "cache")
    for address in (upload(tmp_path / "shop"), upload(tmp_path / "shop") + "/rows.parquet"):
        there = place_source(address)
        assert contents(there) == contents(here)
        assert described(there)[1:] == described(here)[1:]
        assert [name.rpartition(" row ")[2] for name in there.ids] == [
            name.rpartition(" row ")[2] for name in here.ids
        ]
        chosen = pickle.loads(pickle.dumps(there.select([4, 2], "two")))
        assert contents(chosen) == [contents(here)[4], contents(here)[2]]


def test_parquet_files_whose_rows_are_not_as_expected(tmp_path):
    pd.DataFrame({"image": ["a.jpg"], "label": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'image' must hold the images' contents at such a place, got"):
        storage_source(tmp_path / "a.parquet")
    pd.DataFrame({"image": [jpeg_bytes(), None], "label": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="there is no image in row 1"):
        storage_source(tmp_path / "a.parquet").fingerprint()
    with pytest.raises(DataError, match=r"image_root: .* holds its images"):
        storage_source(tmp_path / "a.parquet", image_root="x")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://key:secret@bucket/photos", "an address must hold no user and password"),
        ("nothing://bucket", "can't read from nothing://bucket"),
        ("file:///nowhere/at/all", "there is nothing at file:///nowhere/at/all"),
    ],
)
def test_addresses_that_lead_nowhere(place, message):
    with pytest.raises(DataError, match=message) as raised:
        place_source(place)
    assert "secret" not in str(raised.value)


def test_what_an_address_has_of_another_kind(tmp_path, caplog):
    write_files(tmp_path / "lists", {"a.csv": "image\n1.jpg\n"})
    with pytest.raises(DataError, match="must be a folder of images, tar files or Parquet files"):
        storage_source(tmp_path / "lists")
    write_files(tmp_path / "both", {"1.jpg": jpeg_bytes(), "a.csv": "image\n1.jpg\n"})
    assert len(storage_source(tmp_path / "both")) == 1
    assert "left out: .csv 1" in caplog.text
    with pytest.raises(DataError, match=r"label_column: .* is no table"):
        storage_source(tmp_path / "both", label_column="x")


def test_a_bucket_is_embedded_as_the_folder_is_also_by_several_decoders(tmp_path, upload, backbone_folder):
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    root = write_classes(tmp_path / "photos", {"b": 4, "a": 5})
    here = embed_to_store(embedder, folder_source(root), tmp_path / "here", progress=False)
    words = ["embed", "--model", backbone_folder, "--images", upload(root), "--output", tmp_path / "there"]
    assert main([*map(str, words), "--batch_size", "3", "--num_workers", "2"]) == 0
    there = EmbeddingStore.open(tmp_path / "there")
    assert there.ids == here.ids
    assert there.contents == here.contents
    assert torch.equal(there.embeddings, here.embeddings)
    assert there.info.data["fingerprint"] == here.info.data["fingerprint"]
