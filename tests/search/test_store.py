"""Sources of images, stores and embedding: what is embedded, what a store holds, interruption and reuse."""

import hashlib
import json
import os
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from data_fixtures import write_classes, write_image
from datasets import load_dataset

from vptsp import (
    DataError,
    Embedder,
    EmbeddingStore,
    ImageError,
    ImageSource,
    cached_store,
    embed_to_store,
    folder_source,
    list_source,
    load_splits,
    split_source,
)
from vptsp.files.locks import InUseError
from vptsp.search.embedder import ImagePreprocessor
from vptsp.search.store import STORE_FILE, store_lock


@pytest.fixture(scope="module")
def embedder(backbone_folder):
    return Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"b": 4, "a": 5, "c/d": 2})


class Counting:
    """An embedder that counts images, and may give up."""

    def __init__(self, embedder, stop_after=None):
        self._embedder = embedder
        self._stop_after = stop_after
        self.count = 0

    def __getattr__(self, name):
        return getattr(self._embedder, name)

    def embed_pixels(self, pixel_values):
        self.count += len(pixel_values)
        if self._stop_after is not None and self.count > self._stop_after:
            raise KeyboardInterrupt
        return self._embedder.embed_pixels(pixel_values)


# ---- Sources


def test_folder_source(photos, tmp_path):
    write_image(photos / "top.png")
    source = folder_source(photos)
    assert source.ids == [*(f"a/00{i}.png" for i in range(5)), *(f"b/00{i}.png" for i in range(4)),
                          "c/d/000.png", "c/d/001.png", "top.png"]  # fmt: skip
    assert source.class_names == ["a", "b", "c"]
    assert source.labels.tolist() == [0] * 5 + [1] * 4 + [2] * 2 + [None]
    assert [source.class_name(row) for row in (0, 11)] == ["a", ""]
    assert source.stored(0) == str(photos / "a" / "000.png")
    with pytest.raises(DataError, match="there is no folder"):
        folder_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images"):
        folder_source(tmp_path / "empty")


def test_list_source(photos, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# two\nphotos/b/001.png\n\nphotos/a/000.png\n")
    source = list_source(path)
    assert source.ids == ["photos/b/001.png", "photos/a/000.png"]
    assert source.labels.tolist() == [1, 0]
    path.write_text("photos/b/001.png\nphotos/b/../b/001.png\n")
    with pytest.raises(DataError, match=r"got several of 'photos/b/001\.png'"):
        list_source(path)
    path.write_text("photos/b/009.png\n")
    with pytest.raises(DataError, match=r"names 1 files that are not there: .*009\.png"):
        list_source(path)


def test_split_source_of_files_and_of_contents(photos, tmp_path):
    splits = load_splits("folder", photos, tmp_path / "cache", class_split="alternate")
    source = split_source(splits["test"], "test", photos)
    assert source.ids == [f"b/00{i}.png" for i in range(4)]
    assert source.image_root == str(photos)
    digits = load_splits("digits", cache_dir=tmp_path / "cache", test_classes=["7"], train_classes=["3"])["test"]
    source = split_source(digits, "digits")
    assert source.ids[0] == "digits/7/0007.png"
    assert source.image_root is None
    assert isinstance(source.stored(0), bytes)


def test_data_fingerprint_is_of_the_content(photos):
    before = folder_source(photos).fingerprint()
    os.utime(photos / "a" / "000.png", (0, 0))
    assert folder_source(photos).fingerprint() == before
    content = bytearray((photos / "a" / "000.png").read_bytes())
    content[-20] ^= 1  # same size
    (photos / "a" / "000.png").write_bytes(content)
    changed = folder_source(photos).fingerprint()
    (photos / "b").rename(photos / "e")
    assert len({before, changed, folder_source(photos).fingerprint()}) == 3


# ---- Stores


def test_store_holds_what_the_model_gives(embedder, photos, tmp_path):
    source = folder_source(photos)
    store = embed_to_store(embedder, source, tmp_path / "store", shard_size=4, progress=False)
    paths = [photos / name for name in source.ids]
    torch.testing.assert_close(store.embeddings, embedder.embed_images(paths))
    assert store.ids == source.ids
    assert store.labels.tolist() == source.labels.tolist()
    assert store.class_names == [source.class_name(row) for row in range(11)]
    assert store.info.model["fingerprint"] == embedder.fingerprint
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        ".lock",
        *(f"shard-0000{i}-of-00003.parquet" for i in range(3)),
        STORE_FILE,
    ]


def test_images_without_a_class_have_no_label(embedder, photos, tmp_path):
    write_image(photos / "top.png")
    store = embed_to_store(embedder, folder_source(photos), tmp_path / "store", shard_size=4, progress=False)
    assert store.labelled.tolist() == [True] * 11 + [False]
    with pytest.raises(DataError, match=r"store: row 11 has the label None; expected an integer >= 0"):
        _ = store.labels


def test_store_is_readable_by_datasets(embedder, photos, tmp_path):
    store = embed_to_store(embedder, folder_source(photos), tmp_path / "store", shard_size=4, progress=False)
    files = str(tmp_path / "store" / "*.parquet")
    table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert table["id"][:] == store.ids
    assert table["class_name"][:] == store.class_names
    assert table.features["embedding"].length == embedder.embedding_dim
    np.testing.assert_array_equal(table.with_format("numpy")["embedding"][:], store.embeddings.numpy())


def test_half_size_store(embedder, photos, tmp_path):
    exact = embed_to_store(embedder, folder_source(photos), tmp_path / "a", progress=False)
    half = embed_to_store(embedder, folder_source(photos), tmp_path / "b", embedding_dtype="float16", progress=False)
    assert half.embeddings.dtype == torch.float32
    torch.testing.assert_close(half.embeddings, exact.embeddings.half().float(), atol=0, rtol=0)


def test_interrupted_run_goes_on(embedder, photos, tmp_path):
    source, folder = folder_source(photos), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        embed_to_store(Counting(embedder, stop_after=8), source, folder, shard_size=4, progress=False)
    with pytest.raises(DataError, match=r"not complete \(2 of 3 shards\): run the command"):
        EmbeddingStore.open(folder)
    (folder / ".shard-00002-of-00003.parquet.1.tmp").write_bytes(b"half a file")
    counting = Counting(embedder)
    store = embed_to_store(counting, source, folder, shard_size=4, progress=False)
    assert counting.count == 3
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    whole = embed_to_store(embedder, source, tmp_path / "whole", shard_size=4, progress=False)
    assert torch.equal(store.embeddings, whole.embeddings)


def test_shard_appears_only_when_it_is_complete(embedder, photos, tmp_path, monkeypatch):
    def fail_halfway(table, path, **options):
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr("vptsp.search.store.pq.write_table", fail_halfway)
    with pytest.raises(OSError, match="no space left"):
        embed_to_store(embedder, folder_source(photos), tmp_path / "store", progress=False)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [".lock", STORE_FILE]


def test_finished_store_is_used_as_it_is(embedder, photos, tmp_path):
    cache = tmp_path / "cache"
    first = cached_store(embedder, folder_source(photos), cache, progress=False)
    counting = Counting(embedder)
    again = cached_store(counting, folder_source(photos), cache, progress=False)
    assert counting.count == 0
    assert again.folder == first.folder
    write_image(photos / "a" / "000.png", seed=99)
    other = cached_store(counting, folder_source(photos), cache, progress=False)
    assert counting.count == 11
    assert other.folder != first.folder


def test_other_content_is_refused(embedder, backbone_folder, photos, tmp_path):
    folder = tmp_path / "store"
    embed_to_store(embedder, folder_source(photos), folder, progress=False)
    other = Embedder.from_pretrained(backbone_folder, resize_size=17)
    with pytest.raises(DataError, match="holds embeddings of another model: fingerprint"):
        embed_to_store(other, folder_source(photos), folder, progress=False)
    with pytest.raises(DataError, match="another shard_size: 1024 there, 4 asked for"):
        embed_to_store(embedder, folder_source(photos), folder, shard_size=4, progress=False)
    write_image(photos / "a" / "new.png")
    with pytest.raises(DataError, match="holds embeddings of other data"):
        embed_to_store(embedder, folder_source(photos), folder, progress=False)
    with pytest.raises(DataError, match="new or empty folder or a store, got one with 'a', 'b', 'c'"):
        embed_to_store(embedder, folder_source(photos), photos, progress=False)
    with pytest.raises(DataError, match=r"is no store of embeddings: it has no store\.json"):
        EmbeddingStore.open(photos)


def test_unreadable_image_ends_or_is_listed(embedder, photos, tmp_path):
    (photos / "b" / "001.png").write_bytes(b"no image")
    source = folder_source(photos)
    with pytest.raises(ImageError, match=r"001\.png: can't read"):
        embed_to_store(embedder, source, tmp_path / "store", shard_size=4, progress=False)
    store = embed_to_store(embedder, source, tmp_path / "store", shard_size=4, skip_corrupt=True, progress=False)
    assert store.info.skipped == ["b/001.png"]
    readable = [name for name in source.ids if name != "b/001.png"]
    assert store.ids == readable
    torch.testing.assert_close(store.embeddings, embedder.embed_images([photos / name for name in readable]))


def test_store_of_another_format_is_refused(embedder, photos, tmp_path):
    embed_to_store(embedder, folder_source(photos), tmp_path / "store", progress=False)
    path = tmp_path / "store" / STORE_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(DataError, match="format_version 1, got 2"):
        EmbeddingStore.open(tmp_path / "store")
    path.write_text(json.dumps({**values, "extra": 1}))
    with pytest.raises(DataError, match="missing or unknown fields: 'extra'"):
        EmbeddingStore.open(tmp_path / "store")


def test_a_store_moves_with_its_images(embedder, photos, tmp_path):
    embed_to_store(embedder, folder_source(photos), tmp_path / "store", progress=False)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("store", "photos"):
        (tmp_path / name).rename(moved / name)
    assert EmbeddingStore.open(moved / "store").info.image_root == str(moved / "photos")


# ---- Damage, and several writers


def without_fields(folder, *names):
    """As an older version wrote it."""
    values = json.loads((folder / STORE_FILE).read_text())
    (folder / STORE_FILE).write_text(json.dumps({name: v for name, v in values.items() if name not in names}))


@pytest.fixture
def stored(embedder, photos, tmp_path):
    embed_to_store(embedder, folder_source(photos), tmp_path / "store", shard_size=4, progress=False)
    return tmp_path / "store"


def test_damage_of_the_same_size_is_noticed(stored, embedder, photos):
    path = stored / "shard-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    for read in (
        lambda: EmbeddingStore.open(stored),
        lambda: embed_to_store(embedder, folder_source(photos), stored, shard_size=4, progress=False),
    ):
        with pytest.raises(DataError, match=r"shard-00001-of-00003\.parquet has another content .* Delete the store"):
            read()


@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_missing_shard_is_noticed(stored, embedder, photos, with_checksums):
    (stored / "shard-00001-of-00003.parquet").unlink()
    if not with_checksums:
        without_fields(stored, "files")
    with pytest.raises(DataError, match=r"lacks .*shard-00001-of-00003"):
        EmbeddingStore.open(stored)
    with pytest.raises(DataError, match=r"lacks .*shard-00001-of-00003"):
        embed_to_store(embedder, folder_source(photos), stored, shard_size=4, progress=False)


def test_shards_that_changed_places_are_noticed(stored):
    first, second = (stored / f"shard-0000{i}-of-00003.parquet" for i in range(2))
    first.rename(stored / "aside")
    second.rename(first)
    (stored / "aside").rename(second)
    with pytest.raises(DataError, match=r"shard-00000-of-00003\.parquet has .*: it is damaged"):
        EmbeddingStore.open(stored)


def test_a_store_without_checksums_opens_with_a_warning(stored, caplog):
    expected = EmbeddingStore.open(stored)
    assert not caplog.text
    without_fields(stored, "files")
    opened = EmbeddingStore.open(stored)
    assert f"the store {stored} was written without checksums" in caplog.text
    assert opened.ids == expected.ids
    assert torch.equal(opened.embeddings, expected.embeddings)


def test_a_store_that_lost_rows_is_noticed_without_checksums(stored):
    without_fields(stored, "files")
    path = stored / "shard-00000-of-00003.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match="has 10 rows, expected 11: it is damaged"):
        EmbeddingStore.open(stored)


@pytest.mark.parametrize("damage", ["cut", "flip", "short"])
def test_what_an_interrupted_run_left_is_checked(embedder, photos, tmp_path, damage):
    source, folder = folder_source(photos), tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        embed_to_store(Counting(embedder, stop_after=8), source, folder, shard_size=4, progress=False)
    path = folder / "shard-00000-of-00003.parquet"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    else:
        pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DataError, match=r"shard-00000-of-00003\.parquet .*delete it, and it will be made anew"):
        embed_to_store(embedder, source, folder, shard_size=4, progress=False)
    path.unlink()
    store = embed_to_store(embedder, source, folder, shard_size=4, progress=False)
    torch.testing.assert_close(store.embeddings, embedder.embed_images([photos / name for name in source.ids]))


def test_contents_are_of_the_files(embedder, photos, tmp_path):
    (photos / "a" / "000.png").write_bytes((photos / "b" / "001.png").read_bytes())
    (photos / "b" / "002.png").write_bytes(b"no image")
    store = embed_to_store(
        embedder, folder_source(photos), tmp_path / "store", shard_size=4, skip_corrupt=True, progress=False
    )
    expected = [hashlib.blake2b((photos / name).read_bytes(), digest_size=32).hexdigest() for name in store.ids]
    assert store.contents == expected
    assert store.contents[store.ids.index("a/000.png")] == store.contents[store.ids.index("b/001.png")]


def test_an_older_store_knows_no_contents(stored):
    path = stored / "shard-00001-of-00003.parquet"
    table = pq.read_table(path).drop_columns(["content"])
    pq.write_table(table, path)
    without_fields(stored, "files")
    assert EmbeddingStore.open(stored).contents is None


def test_a_second_run_waits_for_the_first(embedder, photos, tmp_path, caplog):
    source, folder = folder_source(photos), tmp_path / "store"
    seen = []

    class Slow(Counting):
        def embed_pixels(self, pixel_values):
            if not seen:
                seen.append(1)
                (folder / ".shard-00000-of-00001.parquet.77.tmp").write_bytes(b"being written")
                with pytest.raises(InUseError, match=f"the store {folder} is in use by another process, also after"):
                    embed_to_store(embedder, source, folder, progress=False, lock_timeout=0.2)
                assert list(folder.glob(".*.tmp"))  # nothing of the first run was cleared away
            return super().embed_pixels(pixel_values)

    embed_to_store(Slow(embedder), source, folder, progress=False, num_workers=1)
    assert "waiting for up to 0.2 seconds" in caplog.text
    with store_lock(folder, 0):  # a finished store needs no lock
        assert len(embed_to_store(embedder, source, folder, progress=False, lock_timeout=0)) == 11


def test_no_lock_is_left_in_a_folder_of_something_else(embedder, photos):
    before = sorted(path.name for path in photos.iterdir())
    with pytest.raises(DataError, match="new or empty folder or a store"):
        embed_to_store(embedder, folder_source(photos), photos, progress=False)
    assert sorted(path.name for path in photos.iterdir()) == before


def test_names_that_no_file_can_hold_are_refused_at_once():
    with pytest.raises(DataError, match=r"'b\\udcff' is not valid UTF-8"):
        ImageSource(["a", "b\udcff"], np.array([-1, -1]), [], lambda row: b"", "two images")


def _embed_on_rank(rank, port, photos, folder, backbone_folder):
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
    }
    embedder = Embedder.from_pretrained(backbone_folder, batch_size=3, device="cpu")
    counting = Counting(embedder)
    store = embed_to_store(counting, folder_source(photos), folder, shard_size=2, progress=False)
    (folder / f"../counted-{rank}").write_text(f"{counting.count} {len(store)}")


@pytest.mark.distributed
def test_two_ranks_share_the_shards(embedder, backbone_folder, photos, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "store"
    torch.multiprocessing.start_processes(
        _embed_on_rank, (port, photos, folder, backbone_folder), nprocs=2, start_method="fork"
    )
    counts = [(tmp_path / f"counted-{rank}").read_text() for rank in range(2)]
    assert counts == ["6 11", "5 11"]
    alone = embed_to_store(embedder, folder_source(photos), tmp_path / "alone", shard_size=2, progress=False)
    assert torch.equal(EmbeddingStore.open(folder).embeddings, alone.embeddings)


def test_preprocessing_can_be_sent_to_workers(embedder, photos, tmp_path):
    assert isinstance(embedder.preprocess, ImagePreprocessor)
    alone = embed_to_store(embedder, folder_source(photos), tmp_path / "alone", progress=False)
    shared = embed_to_store(embedder, folder_source(photos), tmp_path / "shared", num_workers=1, progress=False)
    assert torch.equal(alone.embeddings, shared.embeddings)
