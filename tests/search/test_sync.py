"""search/sync.py: an index in step with its sources, in both kinds of index; only what changed is embedded."""

import multiprocessing
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_fixtures import write_classes
from PIL import Image

from vptsp import (
    DataError,
    Embedder,
    MilvusIndex,
    RetrievalIndex,
    VPTSPModel,
    edit_index,
    embed_to_store,
    folder_source,
    list_source,
    open_index,
)
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.files.locks import InUseError
from vptsp.search.index_files import index_lock
from vptsp.search.store import EmbeddingStore
from vptsp.search.sync import update_index, update_index_from_store


@pytest.fixture(scope="module")
def embedder(backbone_folder):
    torch.manual_seed(2)
    model = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    return Embedder(model, build_image_processor(16, 18), "a model")


@pytest.fixture
def counted(embedder, monkeypatch):
    """Images that were embedded, one entry a batch."""
    embed, counts = embedder.embed_pixels, []

    def counting(pixel_values):
        counts.append(len(pixel_values))
        return embed(pixel_values)

    monkeypatch.setattr(embedder, "embed_pixels", counting)
    return counts


@pytest.fixture
def photos(tmp_path):
    return write_classes(tmp_path / "photos", {"a": 4, "b": 3})


@pytest.fixture(params=["folder", "milvus"])
def place(request, tmp_path):
    if request.param == "milvus":
        pytest.importorskip("milvus_lite")
    return str(tmp_path / ("catalogue" if request.param == "folder" else "catalogue.db"))


def update(place, embedder, source, tmp_path, **options):
    return update_index(
        place, embedder, source, cache_dir=tmp_path / "cache", progress=False, num_workers=0, **options
    )


def picture(path, seed=99):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def contents_of(place, embedder):
    """Id -> file, class and embedding; embeddings are those that the file has now."""
    index = open_index(place)
    ids = sorted(index.items())
    found = {name: (index.image_path(name), index.items()[name]["class_name"]) for name in ids}
    torch.testing.assert_close(
        index.embeddings_of(ids), embedder.embed_images([found[name][0] for name in ids]), atol=1e-5, rtol=0
    )
    if isinstance(index, MilvusIndex):
        index.close()
    return found


def said(*counts):
    return "{} added, {} changed, {} removed, {} unchanged".format(*counts)


def with_columns(source, **columns):
    source.columns = columns
    return source


def test_only_what_changed_is_embedded(place, photos, embedder, counted, tmp_path):
    assert update(place, embedder, folder_source(photos), tmp_path).added == 7
    assert sum(counted) == 7
    counted.clear()
    assert str(update(place, embedder, folder_source(photos), tmp_path)) == said(0, 0, 0, 7)
    assert counted == []

    picture(photos / "c" / "new.png")
    picture(photos / "a" / "001.png", seed=5)
    (photos / "b" / "002.png").unlink()
    changes = update(place, embedder, folder_source(photos), tmp_path)
    assert str(changes) == said(1, 1, 1, 5)
    assert (changes.total, sum(counted)) == (7, 2)
    found = contents_of(place, embedder)
    assert found == {
        file.relative_to(photos).as_posix(): (str(file), file.parent.name) for file in sorted(photos.rglob("*.png"))
    }


def test_nothing_is_written_where_nothing_changed(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir() if path.name != ".lock"}
    update(place, embedder, folder_source(photos), tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir() if path.name != ".lock"} == before


def test_other_columns_and_classes_need_no_embedding(place, photos, embedder, counted, tmp_path):
    source = with_columns(folder_source(photos), price=list(range(7)), title=[f"no. {i}" for i in range(6)] + [None])
    update(place, embedder, source, tmp_path)
    counted.clear()
    source.columns["price"][3] = 100
    source.columns["title"][6] = "new"
    source.class_names = ["a", "z"]
    changes = update(place, embedder, source, tmp_path)
    assert str(changes) == "0 added, 0 changed, 0 removed, 4 with other columns, 3 unchanged"
    assert counted == []
    index = open_index(place)
    items = index.items()
    for row, name in enumerate(source.ids):
        assert (items[name]["price"], items[name]["title"], items[name]["class_name"]) == (
            source.columns["price"][row],
            source.columns["title"][row],
            source.class_name(row),
        )
    assert index.search_ids(["a/000.png"], 10, where=["price>=100"])[0][0].metadata["price"] == 100
    if isinstance(index, MilvusIndex):
        index.close()
    assert contents_of(place, embedder)["b/000.png"][1] == "z"


def test_columns_come_and_go(photos, embedder, tmp_path):
    place, other = tmp_path / "catalogue", write_classes(tmp_path / "other", {"x": 2})
    update(place, embedder, folder_source(photos), tmp_path)
    update(place, embedder, with_columns(folder_source(other), price=[1, 2]), tmp_path)
    index = open_index(place)
    assert index.columns == ["class_name", "price"]
    assert [index.items()[name]["price"] for name in ("a/000.png", "other/x/000.png")] == [None, 1]
    update(
        place, embedder, with_columns(folder_source(other), price=[1.5, 2]), tmp_path
    )  # whole numbers become others
    assert open_index(place).items()["other/x/000.png"]["price"] == 1.5
    with pytest.raises(ValueError, match="the column 'price' holds numbers in the index, got texts"):
        update(place, embedder, with_columns(folder_source(photos), price=["7 €"] * 7), tmp_path)
    update(place, embedder, folder_source(other), tmp_path)
    assert open_index(place).columns == ["class_name"]


def test_columns_that_milvus_was_not_built_with(photos, embedder, tmp_path):
    pytest.importorskip("milvus_lite")
    place = str(tmp_path / "catalogue.db")
    update(place, embedder, folder_source(photos), tmp_path)
    priced = with_columns(folder_source(photos), price=[1] * 7)
    with pytest.raises(ValueError, match=r"has the columns \['class_name'\], which can't become"):
        update(place, embedder, priced, tmp_path)
    update(place, embedder, priced, tmp_path, replace=True)
    index = open_index(place)
    assert index.columns == ["class_name", "price"]
    index.close()


def test_several_folders_know_their_files(place, photos, embedder, counted, tmp_path):
    """Same names in two folders, and a third that is called like the second."""
    second, third = (write_classes(tmp_path / name, {"a": 2}) for name in ("shop/photos", "more/photos"))
    picture(third / "a" / "000.png", seed=7)
    for folder in (photos, second, third, second):
        update(place, embedder, folder_source(folder), tmp_path)
    assert sum(counted) == 7 + 2 + 2
    found = contents_of(place, embedder)
    assert len(found) == 11
    assert [found[name][0] for name in ("a/000.png", "photos/a/000.png", "photos-2/a/000.png")] == [
        str(folder / "a" / "000.png") for folder in (photos, second, third)
    ]
    (second / "a" / "001.png").unlink()
    assert str(update(place, embedder, folder_source(second), tmp_path)) == said(0, 0, 1, 1)
    assert len(contents_of(place, embedder)) == 10


def test_parts_of_a_folder_leave_each_other_alone(photos, embedder, tmp_path):
    place, part = tmp_path / "catalogue", photos / "part.txt"
    update(place, embedder, folder_source(photos), tmp_path)
    part.write_text("a/000.png\nb/000.png\n")
    assert str(update(place, embedder, list_source(part), tmp_path)) == said(0, 0, 0, 2)
    assert len(open_index(place)) == 7
    part.write_text("b/000.png\n")  # the list's own item goes, though its file is there
    assert str(update(place, embedder, list_source(part), tmp_path)) == said(0, 0, 1, 1)
    assert len(open_index(place)) == 6
    (photos / "b" / "000.png").unlink()  # the list's, but of the folder that is looked at
    assert str(update(place, embedder, folder_source(photos), tmp_path)) == said(1, 0, 1, 5)


def test_a_folder_that_was_moved_with_its_index_is_the_same(photos, embedder, counted, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shutil.move(photos, home / "photos")
    update(home / "catalogue", embedder, folder_source(home / "photos"), tmp_path)
    shutil.move(home, tmp_path / "away")
    counted.clear()
    moved = tmp_path / "away"
    changes = update(moved / "catalogue", embedder, folder_source(moved / "photos"), tmp_path)
    assert (str(changes), counted) == (said(0, 0, 0, 7), [])


def test_adding_only(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path)
    picture(photos / "a" / "001.png", seed=5)
    (photos / "b" / "002.png").unlink()
    picture(photos / "b" / "new.png")
    changes = update(place, embedder, folder_source(photos), tmp_path, add_only=True)
    left = ", 2 that changed or are gone left as they were"
    assert (str(changes), changes.total) == (said(1, 0, 0, 5) + left, 8)


def test_replacing_leaves_the_new_images_alone(place, photos, embedder, tmp_path):
    update(place, embedder, folder_source(photos), tmp_path)
    other = write_classes(tmp_path / "other", {"x": 2})
    update(place, embedder, folder_source(other), tmp_path, replace=True)
    assert sorted(contents_of(place, embedder)) == ["x/000.png", "x/001.png"]


def test_a_failed_replacement_leaves_the_old_index(place, photos, embedder, tmp_path):
    update(place, embedder, folder_source(photos), tmp_path)
    other = write_classes(tmp_path / "other", {"x": 2})
    (other / "x" / "001.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"001\.png"):
        update(place, embedder, folder_source(other), tmp_path, replace=True)
    assert len(contents_of(place, embedder)) == 7


def test_images_that_cannot_be_read(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path)
    (photos / "a" / "000.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"a/000\.png"):
        update(place, embedder, folder_source(photos), tmp_path)
    assert len(open_index(place)) == 7
    changes = update(place, embedder, folder_source(photos), tmp_path, skip_corrupt=True)
    assert (str(changes), changes.skipped) == (said(0, 0, 1, 6), ["a/000.png"])
    picture(photos / "b" / "new.png")
    changes = update(place, embedder, folder_source(photos), tmp_path, skip_corrupt=True)
    assert (str(changes), changes.skipped) == (said(1, 0, 0, 6), ["a/000.png"])


def test_an_index_of_an_older_version_is_brought_in_step(photos, embedder, tmp_path):
    """Without contents and sources: what is there can't be known to be unchanged, and is embedded once more."""
    place, source = tmp_path / "catalogue", folder_source(photos)
    embeddings = embedder.embed_images([source.stored(row) for row in range(7)])
    index = RetrievalIndex.build(
        source.ids,
        embeddings,
        {"class_name": [source.class_name(row) for row in range(7)]},
        model=embedder.description(),
        image_root=photos,
    )
    index._table = index._table.drop_columns(["vptsp_content", "vptsp_source"])
    index.save(place)
    (photos / "b" / "002.png").unlink()
    assert str(update(place, embedder, folder_source(photos), tmp_path)) == said(0, 6, 1, 0)
    assert str(update(place, embedder, folder_source(photos), tmp_path)) == said(0, 0, 0, 6)


def test_ids_of_other_files_are_refused(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    ids = ["a/000.png"]
    RetrievalIndex.build(ids, torch.eye(8)[:1], {"class_name": ["a"]}, model=embedder.description()).save(place)
    update(place, embedder, folder_source(photos), tmp_path)
    assert len(open_index(place)) == 8  # nobody knows the first one's file: the others' ids are those of a folder
    assert open_index(place).image_path("a/000.png") is None
    assert open_index(place).image_path("photos/a/000.png") == str(photos / "a" / "000.png")
    odd = write_classes(tmp_path / "odd" / "photos", {"a": 1})
    with_photos = tmp_path / "odd"
    assert str(update(place, embedder, folder_source(with_photos), tmp_path)).startswith("1 added")
    assert open_index(place).image_path("odd/photos/a/000.png") == str(odd / "a" / "000.png")


def test_a_store_brings_an_index_in_step(photos, embedder, counted, tmp_path):
    place, source = tmp_path / "catalogue", with_columns(folder_source(photos), price=list(range(7)))
    embed_to_store(embedder, source, tmp_path / "store", progress=False)
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.columns == {"price": list(range(7))}
    assert str(update_index_from_store(place, store)) == said(7, 0, 0, 0)
    picture(photos / "c" / "new.png")
    (photos / "b" / "002.png").unlink()
    source = with_columns(folder_source(photos), price=[*range(5), 60, 70])
    counted.clear()
    assert str(update(place, embedder, source, tmp_path)) == (
        "1 added, 0 changed, 1 removed, 1 with other columns, 5 unchanged"
    )
    assert counted == [1]
    embed_to_store(embedder, source, tmp_path / "second", progress=False)
    changes = update_index_from_store(place, EmbeddingStore.open(tmp_path / "second"))
    assert str(changes) == said(0, 0, 0, 7)


def test_a_graph_that_cannot_remove_says_so(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path, build={"factory": "HNSW8"})
    (photos / "b" / "002.png").unlink()
    with pytest.raises(ValueError, match="HNSW8 can't remove"):
        update(place, embedder, folder_source(photos), tmp_path)
    assert len(open_index(place)) == 7


def test_another_model_is_refused_before_anything_is_embedded(photos, backbone_folder, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path)
    picture(photos / "a" / "new.png")
    bare = Embedder.from_pretrained(backbone_folder)
    bare.embed_pixels = None
    with pytest.raises(ValueError, match="embeddings of another model"):
        update(place, bare, folder_source(photos), tmp_path)


def test_a_second_writer_is_refused_after_waiting(photos, embedder, tmp_path):
    place = tmp_path / "catalogue"
    update(place, embedder, folder_source(photos), tmp_path)
    with index_lock(place, 0), pytest.raises(InUseError):
        update(place, embedder, folder_source(photos), tmp_path, lock_timeout=0.1)


def _add_items(place, first):
    for number in range(first, first + 5):
        with edit_index(place, timeout=60) as index:
            index.add([f"item {number}"], torch.eye(8)[:1], {"class_name": ["x"]})


def test_of_two_writers_nothing_is_lost(tmp_path):
    place = tmp_path / "catalogue"
    RetrievalIndex.build(["first"], torch.eye(8)[:1], {"class_name": ["x"]}).save(place)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add_items, args=(place, first)) for first in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(open_index(place).ids) == sorted(["first", *(f"item {i}" for i in [*range(5), *range(100, 105)])])


@pytest.mark.distributed
def test_several_processes_bring_one_index_in_step(photos, backbone_folder, tmp_path):
    """Each embeds its share; one of them writes the index."""
    words = ["--images", photos, "--index", tmp_path / "catalogue", "--embeddings_cache", tmp_path / "cache"]
    words += ["--shard_size", 2, "--device", "cpu", "--quiet", "--model", backbone_folder]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "-m",
        "vptsp.cli",
    ]
    launch += ["index", *map(str, words)]
    for first in ("7 items, Flat", "3 added, 1 changed, 0 removed, 6 unchanged; 10 items"):
        outcome = subprocess.run(launch, capture_output=True, text=True, timeout=300)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.count(first) == 1
        for number in range(3):
            picture(photos / "c" / f"{number}.png", seed=number)
        picture(photos / "a" / "001.png", seed=5)
    assert len(contents_of(tmp_path / "catalogue", Embedder.from_pretrained(backbone_folder))) == 10
