"""search/index_files.py and changes of an index: nothing half done, nothing lost between processes, damage noticed."""

import json
import logging
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from vptsp import DataError, IndexChangedError, RetrievalIndex, edit_index
from vptsp.files.locks import InUseError
from vptsp.search.index_files import INDEX_FILE, index_lock


FACTORIES = ["Flat", "IVF4,Flat", "HNSW8", "PCA6,IVF4,PQ3x4"]


def unit_vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)


def build(count=40, factory="Flat", prefix="item"):
    ids = [f"{prefix} {i}" for i in range(count)]
    return RetrievalIndex.build(ids, unit_vectors(count), {"class_name": ids}, factory=factory)


def finds_itself(index):
    """Whether every item's own vector finds the item, with its own metadata."""
    vectors = index.embeddings_of(index.ids)
    hits = [hits[0] for hits in index.search(vectors, 1)]
    return all(hit.id == name == hit.metadata["class_name"] for hit, name in zip(hits, index.ids, strict=True))


# ---- All or nothing


BAD_ADDITIONS = {
    "an id that is not UTF-8": (
        ["a", "b\udcff"],
        ["a", "b"],
        r"ids must be texts that UTF-8 can hold, got 'b\\udcff'",
    ),
    "metadata that is not UTF-8": (["a", "b"], ["a", "\udc80"], "class_name must be texts that UTF-8 can hold"),
    "metadata of another type": (["a", "b"], ["a", 7], "class_name must be texts, got 7 among them"),
    "no metadata": (["a", "b"], ["a", None], "class_name must be texts, got None among them"),
    "an id of bytes": (["a", b"b"], ["a", "b"], "ids must be texts, got b'b' among them"),
    "too little metadata": (["a", "b"], ["a"], "class_name must have one entry per embedding, 2, got 1"),
    "one text": (["a", "b"], "ab", "class_name must be texts, got a single one: 'ab'"),
}


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("what", BAD_ADDITIONS)
def test_a_refused_addition_changes_nothing(factory, what, tmp_path):
    ids, classes, message = BAD_ADDITIONS[what]
    index = build(factory=factory)
    vectors = index._index.ntotal
    with pytest.raises(ValueError, match=message):
        index.add(ids, unit_vectors(2, seed=9), {"class_name": classes})
    assert (index._index.ntotal, len(index), index.info.next_key) == (vectors, 40, 40)
    index.add(["new"], unit_vectors(1, seed=5), {"class_name": ["new"]})
    assert index.search(unit_vectors(1, seed=5), 1, where={"class_name": "new"})[0][0].id == "new"
    index.save(tmp_path / "index")
    assert RetrievalIndex.open(tmp_path / "index").ids == [*(f"item {i}" for i in range(40)), "new"]


@pytest.mark.parametrize("what", BAD_ADDITIONS)
def test_nothing_is_built_of_it(what, monkeypatch):
    ids, classes, message = BAD_ADDITIONS[what]
    monkeypatch.setattr("vptsp.search.index._empty_index", lambda *arguments: pytest.fail("training may take hours"))
    with pytest.raises(ValueError, match=message):
        RetrievalIndex.build(ids, unit_vectors(2), {"class_name": classes})


def test_a_model_without_fingerprint_is_refused_before_it_is_saved():
    with pytest.raises(DataError, match=r"must have a model with name and fingerprint, or none, got \{'name': 'm'\}"):
        RetrievalIndex.build(["a"], unit_vectors(1), model={"name": "m"})


@pytest.mark.parametrize("name", ["key", "id", "embedding"])
def test_metadata_cannot_take_the_names_of_the_index(name):
    with pytest.raises(ValueError, match=f"a column of metadata can't be called '{name}'"):
        RetrievalIndex.build(["a"], unit_vectors(1), {name: ["x"]})


def test_a_refused_removal_changes_nothing():
    index = build()
    for ids in (["item 3", "absent"], ["item 3", "\udcff"]):
        with pytest.raises(ValueError, match="1 ids are not in the index"):
            index.remove(ids)
    assert index._index.ntotal == len(index) == 40
    assert finds_itself(index)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_an_interrupted_addition_neither_answers_nor_is_saved(factory, tmp_path, monkeypatch):
    """faiss took some of the vectors, then something outside of this project stopped it."""
    index = build(factory=factory)
    index.save(tmp_path / "index")
    before = {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()}
    add, calls = type(index._index).add_with_ids, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return add(self, *arguments)

    monkeypatch.setattr("vptsp.search.index._ADD_ROWS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(index._index), "add_with_ids", stops)
        with pytest.raises(KeyboardInterrupt):
            index.add(["a", "b"], unit_vectors(2, seed=9), {"class_name": ["a", "b"]})
    with pytest.raises(RuntimeError, match="vectors without rows"):
        index.search(unit_vectors(2, seed=9)[:1], 3)
    with pytest.raises(ValueError, match="41 vectors and 40 rows of metadata"):
        index.save(tmp_path / "index")
    assert {path.name: path.read_bytes() for path in (tmp_path / "index").iterdir()} == before


# ---- Several processes


def _add_rounds(rank, folder):
    for number in range(5):
        with edit_index(folder) as index:
            ids = [f"{rank} {number} {i}" for i in range(8)]
            index.add(ids, unit_vectors(8, seed=100 + 10 * rank + number), {"class_name": ids})


@pytest.mark.distributed
def test_no_process_loses_what_another_added(tmp_path):
    build().save(tmp_path / "index")
    torch.multiprocessing.start_processes(_add_rounds, (tmp_path / "index",), nprocs=3, start_method="fork")
    index = RetrievalIndex.open(tmp_path / "index")
    assert len(index) == 40 + 3 * 5 * 8
    assert finds_itself(index)
    for rank in range(3):
        for number in range(5):
            expected = unit_vectors(8, seed=100 + 10 * rank + number)
            torch.testing.assert_close(index.embeddings_of([f"{rank} {number} {i}" for i in range(8)]), expected)


def test_the_second_waits_and_is_told(tmp_path, caplog):
    build().save(tmp_path / "index")
    message = f"the index {tmp_path / 'index'} is in use by another process"
    with index_lock(tmp_path / "index", 0):
        start = time.monotonic()
        with pytest.raises(InUseError, match=f"{message}, also after 0.3 seconds"):
            edit_index(tmp_path / "index", timeout=0.3).__enter__()
        assert time.monotonic() - start >= 0.3
        with pytest.raises(InUseError, match=message):
            build(3).save(tmp_path / "index", timeout=0)
        assert len(RetrievalIndex.open(tmp_path / "index")) == 40  # who only reads needs no lock
    assert f"{message}: waiting for up to 0.3 seconds" in caplog.text


def test_saving_over_what_another_process_saved_is_refused(tmp_path):
    build().save(tmp_path / "index")
    first, second = (RetrievalIndex.open(tmp_path / "index") for _ in range(2))
    first.add(["first"], unit_vectors(1, seed=5), {"class_name": ["first"]})
    first.save(tmp_path / "index")
    second.add(["second"], unit_vectors(1, seed=6), {"class_name": ["second"]})
    with pytest.raises(IndexChangedError, match="changed by another process since it was opened or saved here: open"):
        second.save(tmp_path / "index")
    assert RetrievalIndex.open(tmp_path / "index").ids[-1] == "first"
    first.remove(["first"])
    first.save(tmp_path / "index")  # its own saves are no reason
    second.save(tmp_path / "copy")  # nor is another folder
    assert RetrievalIndex.open(tmp_path / "copy").ids[-1] == "second"


def test_another_index_of_the_same_generation_is_another(tmp_path):
    build().save(tmp_path / "index")
    index = RetrievalIndex.open(tmp_path / "index")
    for path in (tmp_path / "index").iterdir():
        path.unlink()
    build(7, prefix="other").save(tmp_path / "index")
    with pytest.raises(IndexChangedError):
        index.save(tmp_path / "index")


def test_editing(tmp_path):
    build().save(tmp_path / "index")
    with edit_index(tmp_path / "index"):
        pass
    assert RetrievalIndex.open(tmp_path / "index").info.generation == 0  # nothing was changed, nothing written
    with pytest.raises(KeyError), edit_index(tmp_path / "index") as index:
        index.remove(["item 0"])
        raise KeyError
    assert len(RetrievalIndex.open(tmp_path / "index")) == 40
    with edit_index(tmp_path / "index") as index:
        index.remove(["item 0"])
    assert len(RetrievalIndex.open(tmp_path / "index")) == 39
    with pytest.raises(DataError, match="is no index"), edit_index(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()
    with pytest.raises(DataError, match="holds an index already: give another folder"):
        build(3).save(tmp_path / "index", overwrite=False)


def test_a_reader_sees_a_whole_index_while_another_process_saves(tmp_path, monkeypatch):
    """The files that a reader is about to open are deleted under its hands: it reads the new ones."""
    index = build()
    index.save(tmp_path / "index")
    index.remove(["item 0"])
    saves = iter([lambda: index.save(tmp_path / "index")])
    import vptsp.search.index_files as files

    check = files.check_files

    def check_late(*arguments):
        next(saves, lambda: None)()
        return check(*arguments)

    monkeypatch.setattr(files, "check_files", check_late)
    opened = RetrievalIndex.open(tmp_path / "index")
    assert (len(opened), opened.info.generation) == (39, 1)


# ---- Damage


def flip(path, position=-100):
    """Change one byte; the size stays."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("name", ["index-000000.faiss", "metadata-000000.parquet"])
@pytest.mark.parametrize("mmap", [False, True])
def test_damage_of_the_same_size_is_noticed(tmp_path, factory, name, mmap):
    build(factory=factory).save(tmp_path / "index")
    RetrievalIndex.open(tmp_path / "index", mmap=mmap)
    flip(tmp_path / "index" / name)
    with pytest.raises(DataError, match=rf"{name} has another content than was written .*: it is damaged"):
        RetrievalIndex.open(tmp_path / "index", mmap=mmap)


def test_missing_files_and_records_are_named(tmp_path):
    build().save(tmp_path / "index")
    manifest = tmp_path / "index" / INDEX_FILE
    values = json.loads(manifest.read_text())
    for files in ({"index-000000.faiss": values["files"]["index-000000.faiss"]}, {}, [], 3):
        manifest.write_text(json.dumps({**values, "files": files}))
        with pytest.raises(DataError, match=r"lists no size and checksum of (index|metadata)-000000"):
            RetrievalIndex.open(tmp_path / "index")
    for name, value in (("model", []), ("model", {"name": "m"}), ("image_root", 3)):
        manifest.write_text(json.dumps({**values, name: value}))
        with pytest.raises(DataError, match=f"index.json must have a .*{name}"):
            RetrievalIndex.open(tmp_path / "index")
    manifest.write_text(json.dumps([values]))
    with pytest.raises(DataError, match="must hold the fields of a index, got a list"):
        RetrievalIndex.open(tmp_path / "index")
    manifest.write_text(json.dumps(values))
    (tmp_path / "index" / "metadata-000000.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks metadata-000000\.parquet"):
        RetrievalIndex.open(tmp_path / "index")


def without_checksums(folder):
    manifest = folder / INDEX_FILE
    values = json.loads(manifest.read_text())
    del values["files"]
    manifest.write_text(json.dumps(values))


def test_an_index_without_checksums_opens_with_a_warning(tmp_path, caplog):
    index = build()
    index.save(tmp_path / "index")
    without_checksums(tmp_path / "index")
    with caplog.at_level(logging.WARNING):
        opened = RetrievalIndex.open(tmp_path / "index")
    assert "was saved without checksums: damage to its files can't be noticed" in caplog.text
    assert opened.search(unit_vectors(3), 5) == index.search(unit_vectors(3), 5)
    opened.save(tmp_path / "index")
    caplog.clear()
    RetrievalIndex.open(tmp_path / "index")
    assert not caplog.text


@pytest.mark.parametrize("factory", FACTORIES)
def test_rows_in_another_order_or_of_other_items_are_noticed_even_without_checksums(tmp_path, factory):
    path = tmp_path / "index" / "metadata-000000.parquet"
    build(factory=factory).save(tmp_path / "index")
    table = pq.read_table(path)
    pq.write_table(table.take(np.arange(39, -1, -1)), path)
    with pytest.raises(DataError, match="damaged"):
        RetrievalIndex.open(tmp_path / "index")
    without_checksums(tmp_path / "index")
    with pytest.raises(DataError, match="the rows of its metadata are not in the order of their keys"):
        RetrievalIndex.open(tmp_path / "index")
    keys = [*range(39), 77]
    pq.write_table(table.set_column(0, "key", pa.array(keys, pa.int64())), path)
    with pytest.raises(DataError, match="40 vectors and 40 rows of metadata, which are not of the same items"):
        RetrievalIndex.open(tmp_path / "index")


def test_ids_that_changed_places_are_noticed(tmp_path):
    path = tmp_path / "index" / "metadata-000000.parquet"
    build().save(tmp_path / "index")
    table = pq.read_table(path)
    ids = table.column("id").to_pylist()
    pq.write_table(table.set_column(1, "id", pa.array(ids[::-1])), path)
    with pytest.raises(DataError, match="damaged"):
        RetrievalIndex.open(tmp_path / "index")


def test_verifying_can_be_left_out(tmp_path):
    build().save(tmp_path / "index")
    flip(tmp_path / "index" / "index-000000.faiss")
    assert len(RetrievalIndex.open(tmp_path / "index", mmap=True, verify=False)) == 40


def test_without_verifying_a_file_of_another_size_is_refused_all_the_same(tmp_path):
    for name in ("index-000000.faiss", "metadata-000000.parquet"):
        build().save(tmp_path / name)
        with (tmp_path / name / name).open("ab") as stream:
            stream.write(b"more")
        with pytest.raises(DataError, match=rf"{name} has \d+ bytes, expected \d+: it is damaged"):
            RetrievalIndex.open(tmp_path / name, verify=False)


OPEN_DAMAGED = """
import struct, sys
from pathlib import Path
from vptsp import DataError, RetrievalIndex

path = Path(sys.argv[1]) / "index-000000.faiss"
content = path.read_bytes()
numbers = [struct.pack("<q", number) for number in map(int, sys.argv[2:])]
places = [at for at in range(len(content)) if content[at : at + 8] in numbers]
for number, at in enumerate(places):
    other = struct.pack("<q", (1 << 24, 1 << 33, 41)[number % 3])
    path.write_bytes(content[:at] + other + content[at + 8 :])
    try:
        index = RetrievalIndex.open(path.parent, mmap=bool(number % 2), verify=False)
        index.search(index.embeddings_of(["item 0"]), 3)
        print("opened")
    except DataError as error:
        print("refused", error)
"""


@pytest.mark.parametrize(
    ("options", "numbers"),
    [({"factory": "IVF2,Flat"}, ["40"]), ({"factory": "auto", "quantise": "binary"}, ["40", "9"])],
)
def test_without_verifying_no_damage_stops_the_process(options, numbers, tmp_path):
    """Numbers of vectors, and of bytes of each, are others in faiss's file: it crashes, or asks for all memory."""
    ids = [f"item {number}" for number in range(40)]
    RetrievalIndex.build(ids, unit_vectors(40), {"class_name": ids}, **options).save(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_DAMAGED, tmp_path, *numbers], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("refused") and "index-000000.faiss" in line for line in lines) >= 2, lines
    assert not [line for line in lines if line != "opened" and not line.startswith("refused")]


@pytest.mark.parametrize("left", [["index-000000.faiss", "metadata-000000.parquet"], ["journal.jsonl"]])
def test_other_files_of_an_index_without_its_record_are_not_built_over(left, tmp_path):
    """Nor told from those of a first save that was stopped; both are for who knows what they are."""
    build().save(tmp_path / "index")
    (tmp_path / "index" / INDEX_FILE).unlink()
    for path in (tmp_path / "index").iterdir():
        if path.name not in left:
            path.unlink()
    for name in left:
        (tmp_path / "index" / name).touch()
    with pytest.raises(DataError, match=rf"index lacks index.json, but has other files of an index \('{left[0]}'"):
        build().save(tmp_path / "index")
    assert not set(left) - {path.name for path in (tmp_path / "index").iterdir()}


def test_lock_files_are_left_in_folders_of_indexes_only(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"a photo")
    with pytest.raises(DataError, match="must be a new or empty folder or an index, got one with"):
        build().save(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["1.png"]
