"""Stores and indexes whose files are damaged, foreign or misshapen: one error that names the file."""

import json
import re
import shutil

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vptsp import EmbeddingStore, RetrievalIndex, cli
from vptsp.files.digests import file_record
from vptsp.search.store import StoreInfo, begin_store, finish_store, write_shard


SHARD, VECTORS, METADATA = "shard-00000-of-00002.parquet", "index-000000.faiss", "metadata-000000.parquet"


def field(name, value):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def column(name, make):
    """Replaces a column by what `make` gives of the number of rows; None takes it away."""

    def change(path):
        table = pq.read_table(path)
        position = table.column_names.index(name)
        table = table.remove_column(position)
        if make is not None:
            table = table.add_column(position, name, make(len(pq.read_table(path))))
        pq.write_table(table, path)

    return change


def vectors(make, dim=8, keys=True):
    def change(path):
        index = faiss.IndexIDMap2(make(dim)) if keys else make(dim)
        rows = np.eye(6, dim, dtype=np.float32)
        index.add_with_ids(rows, np.arange(6)) if keys else index.add(rows)
        faiss.write_index(index, str(path))

    return change


def text(content):
    return lambda path: path.write_text(content)


def lists(width, value=1.0):
    values = lambda rows: pa.array(np.full(rows * width, value, np.float32))  # noqa: E731
    return lambda rows: pa.FixedSizeListArray.from_arrays(values(rows), width)


# What is done to which file, and the error.
STORE_CASES = {
    "empty": ("store.json", text(""), "store.json is not JSON"),
    "nested too deeply": ("store.json", text("[" * 100_000), "store.json is not JSON"),
    "a list": ("store.json", text("[]"), "store.json must hold the fields of a store of embeddings, got a list"),
    "no model": ("store.json", field("model", None), "store.json.* model must be a mapping, got None"),
    "model without kind": (
        "store.json",
        field("model", {"name": "a", "fingerprint": "b"}),
        "store.json must have a model with name, kind",
    ),
    "data a number": ("store.json", field("data", 3), "store.json.* data must be a mapping, got 3"),
    "data without fingerprint": (
        "store.json",
        field("data", {"description": "x"}),
        "store.json must have data with description and",
    ),
    "images a text": ("store.json", field("num_images", "x"), "num_images must be an integer >= 1, got 'x'"),
    "no images": ("store.json", field("num_images", 0), "num_images must be an integer >= 1, got 0"),
    "far too many images": ("store.json", field("num_images", 10**30), "store.json: shard_size must be so large"),
    "dtype unknown": (
        "store.json",
        field("embedding_dtype", "int8"),
        "embedding_dtype must be one of float32, float16",
    ),
    "complete a text": ("store.json", field("complete", "yes"), "complete must be true or false, got 'yes'"),
    "skipped a number": ("store.json", field("skipped", 3), "skipped must be a list of text, got 3"),
    "shard without embeddings": (
        SHARD,
        column("embedding", None),
        f"{SHARD} must have a column embedding of fixed_size_list.*got none",
    ),
    "embeddings too narrow": (
        SHARD,
        column("embedding", lists(4)),
        f"{SHARD} must have a column embedding .*\\[8\\], got .*\\[4\\]",
    ),
    "embeddings of text": (
        SHARD,
        column("embedding", lambda rows: pa.array(["x"] * rows)),
        f"{SHARD} must have a column embedding .* got string",
    ),
    "embeddings missing": (
        SHARD,
        column("embedding", lambda rows: pa.nulls(rows, pa.list_(pa.float32(), 8))),
        f"{SHARD} has rows without embedding",
    ),
    "embeddings not finite": (SHARD, column("embedding", lists(8, np.nan)), "embeddings of .*/store must be finite"),
    "embeddings not normalised": (
        SHARD,
        column("embedding", lists(8, 5)),
        "embeddings of .*/store must be L2-normalised",
    ),
    "no ids": (SHARD, column("id", None), f"{SHARD} must have a column id of string, got none"),
    "ids missing": (SHARD, column("id", lambda rows: pa.nulls(rows, pa.string())), f"{SHARD} has rows without id"),
    "ids twice": (SHARD, column("id", lambda rows: pa.array(["a"] * rows)), "ids that occur more than once"),
    "labels of floats": (
        SHARD,
        column("label", lambda rows: pa.array([1.5] * rows)),
        f"{SHARD} must have a column label of int64, got double",
    ),
    "no Parquet": (SHARD, text("x" * 99), f"{SHARD} can't be read"),
}
INDEX_CASES = {
    "empty": ("index.json", text(""), "index.json is not JSON"),
    "nested too deeply": ("index.json", text("[" * 100_000), "index.json is not JSON"),
    "items negative": ("index.json", field("num_items", -1), "num_items must be an integer >= 0, got -1"),
    "key a text": ("index.json", field("next_key", "x"), "next_key must be an integer >= 0, got 'x'"),
    "sources a number": ("index.json", field("sources", 3), "sources must be a list of a mapping"),
    "sources without prefix": (
        "index.json",
        field("sources", [{"root": "x", "name": None}]),
        "index.json must have sources with root",
    ),
    "sources lost": (
        "index.json",
        field("sources", []),
        f"{METADATA} has items of source 0, but index.json has 0 sources",
    ),
    "no faiss": (VECTORS, text("x" * 99), "the index in .* can't be read"),
    "another metric": (
        VECTORS,
        vectors(faiss.IndexFlatL2),
        f"{VECTORS} must be an index by inner product of width 8, got one of metric 1",
    ),
    "another width": (VECTORS, vectors(faiss.IndexFlatIP, 16), f"{VECTORS} must be .* of width 8, got .* width 16"),
    "vectors without keys": (
        VECTORS,
        vectors(faiss.IndexFlatIP, keys=False),
        f"{VECTORS} must be an index of faiss with keys, got a IndexFlat",
    ),
    "no key": (METADATA, column("key", None), f"{METADATA} must have a column key without gaps"),
    "key of text": (
        METADATA,
        column("key", lambda rows: pa.array(["x"] * rows)),
        f"{METADATA} must have a column key of integer, got string",
    ),
    "no id": (METADATA, column("id", None), f"{METADATA} must have a column id without gaps"),
    "id of structs": (
        METADATA,
        column("id", lambda rows: pa.array([{"a": 1}] * rows)),
        f"{METADATA} must have a column id of text, got struct",
    ),
    "ids twice": (
        METADATA,
        column("id", lambda rows: pa.array(["x"] * rows)),
        f"{METADATA} has ids that occur more than once",
    ),
    "class of structs": (
        METADATA,
        column("class_name", lambda rows: pa.array([{"a": 1}] * rows)),
        f"{METADATA} must have a column class_name of text or",
    ),
    "source of floats": (
        METADATA,
        column("vptsp_source", lambda rows: pa.array([1.5] * rows)),
        f"{METADATA} must have a column vptsp_source of integer",
    ),
    "no Parquet": (METADATA, text("x" * 99), "the index in .* can't be read"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    model = {"name": "m", "kind": "retriever", "fingerprint": "f" * 64, "dtype": "float32"}
    info = StoreInfo(model, {"description": "photos", "fingerprint": "d" * 64}, 6, 8, shard_size=4)
    begin_store(root / "store", info)
    embeddings = torch.eye(6, 8)
    for shard in range(2):
        rows = list(info.shard_rows(shard))
        names = [f"{row}.png" for row in rows]
        write_shard(root / "store", info, shard, names, [row % 2 for row in rows], ["a"] * len(rows), embeddings[rows])
    finish_store(root / "store", info)
    store = EmbeddingStore.open(root / "store")
    index = RetrievalIndex.build(
        store.ids,
        store.embeddings,
        {"class_name": store.class_names},
        model=model,
        source={"root": None, "name": "photos", "prefix": ""},
    )
    index.save(root / "index")
    return root


def damage(folder, name, change, record):
    """Changes a file, and writes down its new size and digest, as if it had been written like that."""
    change(folder / name)
    if name != record:
        values = json.loads((folder / record).read_text())
        values["files"][name] = file_record(folder / name)
        (folder / record).write_text(json.dumps(values))


def error_of(words, capsys):
    assert cli.main(words) == 2
    *_, message = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize("case", STORE_CASES)
@pytest.mark.parametrize("command", ["evaluate", "index"])
def test_a_bad_file_of_a_store_is_named(case, command, folders, tmp_path, capsys):
    name, change, expected = STORE_CASES[case]
    folder = shutil.copytree(folders / "store", tmp_path / "store")
    damage(folder, name, change, "store.json")
    where = ["--output", str(tmp_path / "new")] if command == "evaluate" else ["--index", str(tmp_path / "new")]
    message = error_of([command, "--store", str(folder), *where], capsys)
    assert re.search(expected, message), message
    assert not (tmp_path / "new" / "index.json").exists()


@pytest.mark.parametrize("case", INDEX_CASES)
@pytest.mark.parametrize("options", [[], ["--no_verify"]])
def test_a_bad_file_of_an_index_is_named(case, options, folders, tmp_path, capsys):
    name, change, expected = INDEX_CASES[case]
    folder = shutil.copytree(folders / "index", tmp_path / "index")
    damage(folder, name, change, "index.json")
    message = error_of(["search", "--index", str(folder), "--id", "0.png", *options], capsys)
    assert re.search(expected, message), message


def test_what_is_not_recorded_is_found_by_its_digest(folders, tmp_path, capsys):
    folder = shutil.copytree(folders / "index", tmp_path / "index")
    vectors(faiss.IndexFlatL2)(folder / VECTORS)
    message = error_of(["search", "--index", str(folder), "--id", "0.png"], capsys)
    assert re.search(f"{VECTORS} has .*: it is damaged", message)


@pytest.mark.parametrize("k", ["0", "-1", "x"])
def test_k_must_be_one_at_least(k, folders, capsys):
    try:
        status = cli.main(["search", "--index", str(folders / "index"), "--id", "0.png", "--k", k])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert re.search(r"error: .*\bk\b.*", capsys.readouterr().err)


def test_an_id_is_removed_once(folders, tmp_path, capsys):
    index = str(shutil.copytree(folders / "index", tmp_path / "index"))
    assert cli.main(["index", "--index", index, "--remove", "0.png", "0.png"]) == 0
    assert len(RetrievalIndex.open(index)) == 5
    capsys.readouterr()
    assert "0.png" in error_of(["index", "--index", index, "--remove", "0.png"], capsys)
    assert len(RetrievalIndex.open(index)) == 5


def test_a_device_that_is_not_there(folders, retriever_folder, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    words = ["embed", "--model", str(retriever_folder), "--images", str(tmp_path), "--output", str(tmp_path / "o")]
    for device in ("cuda", "cuda:7", "warp", "cuda:x"):
        assert "device" in error_of([*words, "--device", device], capsys).lower()
