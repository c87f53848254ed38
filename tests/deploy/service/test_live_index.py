"""An index that is searched while it changes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vptsp import DataError, RetrievalIndex
from vptsp.deploy.service.live_index import Item, ItemExistsError, LiveIndex, NotSavedError, UnknownItemError
from vptsp.files.locks import InUseError


DIM = 6


def vector(seed):
    return F.normalize(torch.randn(1, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def item(name, seed=None, **columns):
    return Item(name, columns, vector(len(name) if seed is None else seed))


@pytest.fixture
def folder(tmp_path):
    embeddings = torch.cat([vector(seed) for seed in range(3)])
    columns = {"class_name": ["x", "x", "y"], "price": [1, 2, None]}
    RetrievalIndex.build(["a", "b", "c"], embeddings, columns).save(tmp_path / "index")
    return tmp_path / "index"


def contents(folder):
    index = RetrievalIndex.open(folder)
    return {name: (row["class_name"], row["price"]) for name, row in index.items().items()}


@pytest.mark.parametrize("compact_after", [1, 1000])
def test_changes_are_there_at_once_and_on_the_disk(folder, compact_after):
    with LiveIndex.open(folder, compact_after=compact_after) as live:
        assert live.put([item("d", 9, class_name="z"), item("a", 8, price=5)]) == [True, False]
        expected = {"a": ("x", 5), "b": ("x", 2), "c": ("y", None), "d": ("z", None)}
        assert contents(folder) == expected
        with live.reading() as index:
            assert index.search(vector(8), 1)[0][0].id == "a"
        live.update("b", {"price": 7})
        live.remove(["c"])
        expected = {"a": ("x", 5), "b": ("x", 7), "d": ("z", None)}
        assert contents(folder) == expected
        assert live.pending == (0 if compact_after == 1 else 3)
    assert contents(folder) == expected
    assert not (folder / "journal.jsonl").exists()
    torch.testing.assert_close(
        RetrievalIndex.open(folder).embeddings_of(["d", "a"]), torch.cat([vector(9), vector(8)])
    )


def test_a_journal_of_few_large_changes_is_taken_in_by_its_bytes(folder, monkeypatch):
    """However many items a change has, the journal stays below its bound, and that of a quarter of the index."""
    monkeypatch.setattr("vptsp.deploy.service.live_index.COMPACT_BYTES", 6_000)
    own = sum(record["bytes"] for record in RetrievalIndex.open(folder).info.files.values())
    assert own < 6_000
    sizes, saves = [], []
    with LiveIndex.open(folder) as live:
        for start in range(0, 3000, 100):
            live.put([item(f"n{number}", number) for number in range(start, start + 100)])
            saves.append(live.pending == 0)
            sizes.append(0 if saves[-1] else (folder / "journal.jsonl").stat().st_size)
            index_bytes = sum(record["bytes"] for record in live.index.info.files.values())
            assert sizes[-1] < max(6_000, index_bytes / 4)
    assert 3 < sum(saves) < 30  # not with each change either
    gaps = [number for number, saved in enumerate(saves) if saved]
    assert gaps[-1] - gaps[-2] > gaps[1] - gaps[0]  # a larger index is saved less often
    assert len(contents(folder)) == 3003


def test_what_does_not_fit_is_refused_and_changes_nothing(folder):
    with LiveIndex.open(folder) as live:
        before = contents(folder)
        for error, change in (
            (ItemExistsError, lambda: live.put([item("d"), item("a")], replace=False)),
            (ValueError, lambda: live.put([item("a", prize=3)])),
            (ValueError, lambda: live.put([item("a", price="three")])),
            (ValueError, lambda: live.put([item("d", class_name=3)])),
            (ValueError, lambda: live.put([Item("a", {}, 2 * vector(1))])),
            (ValueError, lambda: live.put([item("d"), item("d")])),
            (UnknownItemError, lambda: live.update("d", {"price": 3})),
            (ValueError, lambda: live.update("a", {"prize": 3})),
            (ValueError, lambda: live.update("a", {"price": "three"})),
            (UnknownItemError, lambda: live.remove(["a", "d"])),
        ):
            with pytest.raises(error):
                change()
            assert live.pending == 0
            assert contents(folder) == before == {name: before[name] for name in live.index.ids}


def test_a_graph_refuses_to_replace(tmp_path):
    embeddings = torch.cat([vector(seed) for seed in range(50)])
    names = [str(number) for number in range(50)]
    RetrievalIndex.build(names, embeddings, {"class_name": names}, factory="HNSW8").save(tmp_path)
    with LiveIndex.open(tmp_path) as live:
        assert live.put([item("new")]) == [True]
        for change in (lambda: live.put([item("3")]), lambda: live.remove(["3"])):
            with pytest.raises(ValueError, match="can't remove"):
                change()
    assert len(RetrievalIndex.open(tmp_path)) == 51


def test_a_full_disk_is_said_and_undoes_the_change(folder, monkeypatch):
    with LiveIndex.open(folder) as live:
        live.put([item("d")])

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("vptsp.search.journal.os.fsync", full)
            with pytest.raises(NotSavedError, match="No space left"):
                live.remove(["a"])
        assert "a" in live.index.ids
        live.remove(["b"])
    assert set(contents(folder)) == {"a", "c", "d"}


def test_other_writers_are_kept_out_and_readers_are_not(folder):
    with LiveIndex.open(folder):
        with pytest.raises(InUseError), LiveIndex.open(folder):
            pass
        with pytest.raises(InUseError), RetrievalIndex.edit(folder, timeout=0):
            pass
        assert len(RetrievalIndex.open(folder)) == 3
    with pytest.raises(DataError, match="no index"), LiveIndex.open(folder.parent / "nothing"):
        pass
    assert not (folder.parent / "nothing").exists()


def test_items_outlast_a_sync_with_the_folder_that_the_index_is_of(folder):
    """They have a source of their own, which no folder's listing takes for gone files."""
    with LiveIndex.open(folder) as live:
        live.put([item("d")])
        live.put([item("e")])
        (source,) = live.index.sources
    assert source["root"] is None
    assert RetrievalIndex.open(folder).items()["e"]["vptsp_source"] == 0


def test_searches_see_whole_changes_only(folder):
    """Two items that are always replaced together never differ in a search."""
    with LiveIndex.open(folder, compact_after=20) as live:
        live.put([item("p", 1, price=0), item("q", 2, price=0)])
        stop, torn, searches = threading.Event(), [], []

        def search():
            while not stop.is_set():
                with live.reading() as index:
                    hits = {hit.id: hit.metadata["price"] for hit in index.search(vector(5), 10)[0]}
                searches.append(1)
                if len(hits) != 5 or hits["p"] != hits["q"]:
                    torn.append(hits)

        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 60):
            live.put([item("p", number, price=number), item("q", number + 1, price=number)])
        stop.set()
        for thread in threads:
            thread.join()
    assert not torn
    assert searches


WRITER = """
import sys
from tests_live import item
from vptsp.deploy.service.live_index import LiveIndex
with LiveIndex.open(sys.argv[1], lock_timeout=60, compact_after=7) as live:
    number = int(sys.argv[2])
    while True:
        live.put([item(f"n{number}", number, price=number)])
        if old := [name for name in live.index.ids if name[0] == "n" and int(name[1:]) < number - 1]:
            live.remove(old)
        print(number, flush=True)
        number += 1
"""


@pytest.mark.slow
def test_whatever_was_acknowledged_outlasts_being_killed(folder, tmp_path):
    (tmp_path / "tests_live.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    start = 0
    for round_number in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(start)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        lines = [process.stdout.readline() for _ in range(3 + round_number)]
        time.sleep(0.003 * round_number)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.wait()
        last = int([line for line in lines if line.strip()][-1])
        there = contents(folder)
        assert there[f"n{last}"] == ("", last)
        assert not [name for name in there if name[0] == "n" and int(name[1:]) < last - 1]
        start = max(int(name[1:]) for name in there if name[0] == "n") + 1


@pytest.mark.parametrize(
    "values, change",
    [
        ([2**60 + 1, 2**60 + 2], {"price": 0.5}),
        ([0.5, 1.5], {"price": 2**53 + 1}),
    ],
)
def test_numbers_that_a_column_can_not_hold_are_refused_before_the_journal(tmp_path, values, change):
    columns = {"class_name": ["x", "y"], "price": values}
    RetrievalIndex.build(["a", "b"], torch.cat([vector(0), vector(1)]), columns).save(tmp_path)
    with LiveIndex.open(tmp_path) as live:
        for refused in (lambda: live.update("a", change), lambda: live.put([item("a", **change)])):
            with pytest.raises(ValueError, match="can't hold"):
                refused()
        assert live.pending == 0
    assert contents(tmp_path)["a"] == ("x", values[0])


def test_what_a_projection_leaves_nothing_of_is_refused_before_the_journal(tmp_path):
    embeddings = torch.cat([vector(seed) for seed in range(3)])
    names = {"class_name": ["x", "y", "z"]}
    RetrievalIndex.build(["a", "b", "c"], embeddings, names, projection="truncate", dim=3).save(tmp_path)
    nothing = torch.eye(DIM)[-1:]
    with LiveIndex.open(tmp_path) as live:
        with pytest.raises(ValueError, match="nothing is left"):
            live.put([Item("a", {}, nothing)])
        assert live.pending == 0
        assert live.index.ids == ["a", "b", "c"]


def test_a_change_that_fails_after_all_is_undone(folder, monkeypatch):
    with LiveIndex.open(folder) as live:
        live.put([item("d")])
        before = contents(folder)
        monkeypatch.setattr(RetrievalIndex, "check_replacement", lambda *arguments: None)
        with pytest.raises(ValueError, match="column 'price' holds"):
            live.put([item("e"), item("a", price="much")])
        assert live.pending == 1
        assert contents(folder) == before == {name: before[name] for name in live.index.ids}
        live.remove(["b"])
    assert set(contents(folder)) == {"a", "c", "d"}


def test_items_that_are_replaced_keep_their_source(folder):
    with RetrievalIndex.edit(folder) as index:
        index.add_source({"root": None, "name": "photos", "prefix": ""})
        index.update(["a"], {"class_name": ["x"], "price": [1]}, source=0)
    with LiveIndex.open(folder) as live:
        live.put([item("a", 7), item("new", 8)])
        known = live.index.items()
        assert (known["a"]["vptsp_source"], known["new"]["vptsp_source"]) == (0, 1)
    torch.testing.assert_close(
        RetrievalIndex.open(folder).embeddings_of(["a", "new"]), torch.cat([vector(7), vector(8)])
    )
