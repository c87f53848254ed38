"""Changes that are on the disk before the index is saved as a whole."""

import numpy as np
import pytest
import torch

from vptsp import DataError, RetrievalIndex
from vptsp.search.index_files import IndexChangedError, index_lock
from vptsp.search.journal import JOURNAL_FILE, Journal, encode_embeddings


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def add(*names, seed=0):
    embeddings = torch.nn.functional.normalize(
        torch.randn(len(names), 4, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    metadata = {"class_name": ["new"] * len(names)}
    return [{"step": "add", "ids": list(names), "embeddings": encode_embeddings(embeddings), "metadata": metadata}]


@pytest.fixture
def folder(tmp_path):
    index = RetrievalIndex.build(["a", "b"], unit([1, 0, 0, 0], [0, 1, 0, 0]), {"class_name": ["x", "y"]})
    index.save(tmp_path / "index")
    return tmp_path / "index"


def journal_of(folder):
    return Journal.open(folder, RetrievalIndex.open(folder).info.state)


def test_changes_are_there_when_the_index_is_opened_and_to_the_bit(folder):
    change = add("c", "d")
    journal_of(folder).append(change)
    journal_of(folder).append([{"step": "remove", "ids": ["a"]}])
    journal_of(folder).append([{"step": "update", "ids": ["c"], "metadata": {"class_name": ["z"]}, "source": None}])
    index = RetrievalIndex.open(folder)
    assert index.ids == ["b", "c", "d"]
    assert index.items()["c"]["class_name"] == "z"
    assert encode_embeddings(torch.from_numpy(index._vectors(index._keys(["c", "d"])))) == change[0]["embeddings"]


def test_saving_takes_the_journal_in(folder):
    journal_of(folder).append(add("c"))
    with RetrievalIndex.edit(folder):
        pass
    assert not (folder / JOURNAL_FILE).exists()
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c"]


def test_a_journal_that_a_save_took_in_is_not_read_again(folder):
    journal_of(folder).append(add("c"))
    old = (folder / JOURNAL_FILE).read_bytes()
    with RetrievalIndex.edit(folder):
        pass
    (folder / JOURNAL_FILE).write_bytes(old)  # killed before it was deleted
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c"]
    journal_of(folder).append([{"step": "remove", "ids": ["a"]}])
    assert RetrievalIndex.open(folder).ids == ["b", "c"]


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_change_that_was_cut_off_does_not_count(folder, cut, caplog):
    journal_of(folder).append(add("c"))
    whole = (folder / JOURNAL_FILE).read_bytes()
    journal_of(folder).append(add("d", seed=1))
    content = (folder / JOURNAL_FILE).read_bytes()
    (folder / JOURNAL_FILE).write_bytes(content[: len(whole) + cut] if cut > 0 else content[:cut])
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c"]
    journal_of(folder).append(add("e", seed=2))
    assert "never acknowledged" in caplog.text
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c", "e"]


def test_damage_is_named(folder):
    journal_of(folder).append(add("c"))
    journal_of(folder).append(add("d"))
    path = folder / JOURNAL_FILE
    path.write_bytes(path.read_bytes().replace(b'"c"', b'"q"'))
    with pytest.raises(DataError, match=f"line 2 of .*{JOURNAL_FILE} is damaged"):
        RetrievalIndex.open(folder)


def test_a_journal_that_grew_is_a_changed_index(folder):
    index = RetrievalIndex.open(folder)
    journal_of(folder).append(add("c"))
    with pytest.raises(IndexChangedError):
        index.save(folder)
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c"]


def test_mapped_indexes_refuse_a_journal(folder):
    journal_of(folder).append(add("c"))
    with pytest.raises(ValueError, match=r"1 changes.*mmap=False"):
        RetrievalIndex.open(folder, mmap=True)


def test_a_full_disk_leaves_the_journal_as_it_was(folder, monkeypatch):
    journal = journal_of(folder)
    journal.append(add("c"))
    before = (folder / JOURNAL_FILE).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("vptsp.search.journal.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(add("d"))
    assert (folder / JOURNAL_FILE).read_bytes() == before
    assert journal.count == 1
    journal.append(add("e", seed=2))
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c", "e"]


def test_a_save_between_reading_files_and_journal_is_noticed(folder, monkeypatch):
    journal_of(folder).append(add("c"))
    from vptsp.search import index_files

    real = index_files.read_journal

    def saved_meanwhile(place, state):
        monkeypatch.setattr(index_files, "read_journal", real)
        with RetrievalIndex.edit(folder):
            pass
        return real(place, state)

    monkeypatch.setattr(index_files, "read_journal", saved_meanwhile)
    assert RetrievalIndex.open(folder).ids == ["a", "b", "c"]


def test_the_lock_keeps_other_writers_out(folder):
    from vptsp.files.locks import InUseError

    with index_lock(folder, 0), pytest.raises(InUseError), RetrievalIndex.edit(folder, timeout=0):
        pass
    assert np.allclose(RetrievalIndex.open(folder).embeddings_of(["a"]), [[1, 0, 0, 0]])
