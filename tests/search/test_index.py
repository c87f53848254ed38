"""search/index.py, search/index_factory.py: exact search against the oracle, approximate search, changes, files."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vptsp import (
    DataError,
    Embedder,
    IndexMismatchError,
    RetrievalIndex,
    choose_factory,
    nearest_neighbours,
    open_index,
)
from vptsp.search.index import _empty_index
from vptsp.search.index_factory import inverted_lists


def clustered(num_items, width=16, num_clusters=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, width, generator=generator)
    which = torch.randint(num_clusters, (num_items,), generator=generator)
    return torch.nn.functional.normalize(
        centres[which] + 0.4 * torch.randn(num_items, width, generator=generator), dim=1
    )


def named(num_items):
    """Ids, and metadata of three classes."""
    return [f"item {i}" for i in range(num_items)], {"class_name": [f"class {i % 3}" for i in range(num_items)]}


def build(embeddings, **options):
    ids, metadata = named(len(embeddings))
    return RetrievalIndex.build(ids, embeddings, metadata, **options)


def found_ids(results):
    return [[hit.id for hit in hits] for hits in results]


@pytest.fixture
def embeddings():
    return clustered(300)


# ---- Exact search


def test_exact_search_equals_nearest_neighbours(embeddings):
    queries = clustered(20, seed=1)
    index = build(embeddings)
    assert (index.info.factory, index.is_exact, index.info.recall_at_10) == ("Flat", True, 1.0)
    similarity, expected = nearest_neighbours(queries, 7, embeddings)
    results = index.search(queries, 7)
    assert found_ids(results) == [[f"item {i}" for i in row] for row in expected.tolist()]
    got = torch.tensor([[hit.similarity for hit in hits] for hits in results])
    torch.testing.assert_close(got, similarity)
    assert results[0][0].metadata == {"class_name": f"class {int(expected[0, 0]) % 3}"}


def test_search_by_id_leaves_the_item_itself_out(embeddings):
    embeddings[5] = embeddings[250]  # a copy, which must be found
    index = build(embeddings)
    _, expected = nearest_neighbours(embeddings, 4)
    results = index.search_ids(["item 5", "item 250", "item 17"], 4)
    assert found_ids(results) == [[f"item {i}" for i in expected[row].tolist()] for row in (5, 250, 17)]
    assert results[0][0].id == "item 250"


def test_equal_similarities_come_in_the_order_of_adding():
    embeddings = torch.eye(3)[[0, 1, 1, 1, 2]]
    assert found_ids(build(embeddings).search(torch.eye(3)[1:2], 3)) == [["item 1", "item 2", "item 3"]]


def test_k_beyond_the_index_gives_all(embeddings):
    index = build(embeddings[:4])
    assert len(index.search(embeddings[:1], 10)[0]) == 4
    assert len(index.search_ids("item 1", 10)[0]) == 3


def test_filter_beside_packages_that_patch_faiss(embeddings):
    code = (
        "import faiss.contrib.torch_utils, torch; from vptsp import RetrievalIndex;"
        "index = RetrievalIndex.build(['a', 'b', 'c', 'd'], torch.eye(4), {'class_name': ['x', 'y', 'x', 'y']});"
        "print([hit.id for hit in index.search(torch.eye(4)[:1], 3, where={'class_name': 'x'})[0]])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["['a', 'c']"], result.stderr


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PCA12,IVF8,PQ6x4"])
def test_filter_equals_search_among_those_that_pass(embeddings, factory):
    index = build(embeddings, factory=factory)
    rows = torch.tensor([i for i in range(300) if i % 3 == 1])
    queries = clustered(10, seed=1)
    # of a compressing index, what it kept of the vectors
    kept = torch.from_numpy(index._index.reconstruct_batch(rows.numpy()))
    expected = (queries @ kept.T).topk(5).indices
    results = index.search(queries, 5, where={"class_name": "class 1"})
    assert found_ids(results) == [[f"item {i}" for i in rows[row].tolist()] for row in expected]
    assert index.search(queries, 5, where={"class_name": "class 9"}) == [[]] * 10
    assert found_ids(index.search(queries[:1], 5, where={"id": ["item 4", "item 9"], "class_name": ["class 0"]})) == [
        ["item 9"]
    ]
    found = {hit.id for hit in index.search(queries[:1], 5, where={"class_name": "class 1"}, containing="ITEM 22")[0]}
    assert found == {"item 22", "item 220", "item 223", "item 226", "item 229"}
    with pytest.raises(ValueError, match="no column 'colour'"):
        index.search(queries, 5, where={"colour": "red"})


@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCA12,IVF8,PQ6x4", "HNSW16"])
def test_filter_that_passes_many_uses_the_index(embeddings, factory, monkeypatch):
    monkeypatch.setattr("vptsp.search.index._COMPARE_ALL", 10)
    index = build(embeddings, factory=factory, target_recall=1.0)
    results = index.search(clustered(10, seed=1), 5, where={"class_name": ["class 1", "class 2"]})
    assert all(len(hits) == 5 for hits in results)
    assert {hit.metadata["class_name"] for hits in results for hit in hits} == {"class 1", "class 2"}


# ---- Approximate search


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW16"])
def test_recall_is_measured_and_raised_to_the_target(factory):
    embeddings = clustered(2000)
    index = build(embeddings, factory=factory, target_recall=0.9)
    rows = np.random.default_rng(7).permutation(2000)[:300]
    _, expected = nearest_neighbours(embeddings, 10)
    results = found_ids(index.search_ids([f"item {i}" for i in rows], 10))
    hits = [
        len({f"item {i}" for i in expected[row].tolist()} & set(found))
        for row, found in zip(rows, results, strict=True)
    ]
    recall = sum(hits) / (10 * len(rows))
    assert index.info.recall_at_10 >= 0.9
    assert recall == pytest.approx(index.info.recall_at_10, abs=0.04)
    assert index.info.effort.startswith("nprobe" if factory.startswith("IVF") else "efSearch")


def test_visiting_all_lists_is_exact(embeddings):
    index = build(embeddings, factory="IVF8,Flat", target_recall=1.0)
    inverted_lists(index._index).nprobe = 8
    queries = clustered(10, seed=1)
    _, expected = nearest_neighbours(queries, 5, embeddings)
    assert found_ids(index.search(queries, 5)) == [[f"item {i}" for i in row] for row in expected.tolist()]


def test_compression_says_what_it_costs():
    index = build(clustered(2000), factory="PQ4x4", target_recall=0.99)
    assert 0.05 < index.info.recall_at_10 < 0.9
    assert index.info.effort is None


def test_copies_do_not_lower_the_recall():
    index = build(clustered(20)[torch.arange(400) % 20], factory="IVF4,Flat", target_recall=1.0)
    assert index.info.recall_at_10 == 1.0


def test_choice_by_size():
    assert choose_factory(50_000, 384)[0] == "Flat"
    assert choose_factory(60_502, 384)[0] == "IVF1024,Flat"
    assert choose_factory(1_000_000, 384)[0] == "IVF4096,Flat"
    assert choose_factory(5_000_000, 384)[0] == "HNSW32"
    assert choose_factory(5_000_000, 384, memory_gb=8)[0] == "IVF8192,Flat"
    factory, reason = choose_factory(10_000_000, 384, memory_gb=1)
    assert factory == "OPQ64,IVF16384,PQ64"
    assert "15.5 GB, above the 1 allowed: compressed to 64 bytes each" in reason
    assert choose_factory(10_000_000, 384, memory_gb=0.5)[0] == "OPQ32,IVF16384,PQ32"
    with pytest.raises(ValueError, match=r"memory_gb must be enough for 10,000,000 embeddings .*, got 0.1"):
        choose_factory(10_000_000, 384, memory_gb=0.1)


@pytest.mark.parametrize(("num_items", "memory_gb"), [(1000, 16), (100_000, 16), (2_000_000, 16), (2_000_000, 0.1)])
def test_chosen_indexes_can_be_made(num_items, memory_gb):
    factory, _ = choose_factory(num_items, 384, memory_gb)
    assert not _empty_index(factory, 384).is_trained or factory.startswith(("Flat", "HNSW"))


# ---- Changes


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "SQ8", "PCA12,IVF8,PQ6x4"])
def test_add_and_remove(embeddings, factory):
    index = build(embeddings[:200], factory=factory)
    ids, metadata = named(300)
    index.add(ids[200:], embeddings[200:], {"class_name": metadata["class_name"][200:]})
    index.remove(["item 3", "item 250"])
    assert len(index) == 298
    left = [i for i in range(300) if i not in (3, 250)]
    assert index.ids == [f"item {i}" for i in left]

    whole = index.embeddings_of(index.ids)
    torch.testing.assert_close(
        whole, embeddings[left], atol={"Flat": 1e-6, "IVF8,Flat": 1e-6}.get(factory, 0.5), rtol=0
    )
    found = {hit.id for hits in index.search(embeddings[[3, 250]], 50) for hit in hits}
    assert not found & {"item 3", "item 250"}
    index.add(["item 3"], embeddings[3:4], {"class_name": ["new"]})
    assert index.search(embeddings[3:4], 1, where={"class_name": "new"})[0][0].id == "item 3"


def test_a_graph_cannot_remove_and_says_so(embeddings):
    index = build(embeddings, factory="HNSW16")
    with pytest.raises(ValueError, match="HNSW16 can't remove: the graph's other items are reached through them"):
        index.remove(["item 3"])
    index.add(["new"], embeddings[:1], {"class_name": ["new"]})
    assert len(index) == 301


def test_changes_that_do_not_fit_are_refused(embeddings):
    index = build(embeddings)
    assert index.info.next_key == 300
    for arguments, message in [
        ((["item 3"], embeddings[:1], {"class_name": ["a"]}), "1 ids are in the index already: 'item 3'"),
        ((["x", "x"], embeddings[:2], {"class_name": ["a", "a"]}), "ids must differ, got 1"),
        ((["x"], embeddings[:2], {"class_name": ["a", "a"]}), "ids must have one entry per embedding, 2, got 1"),
        ((["x"], embeddings[:1], {}), r"columns \['class_name'\], got \[\]"),
        ((["x"], embeddings[:1, :8].contiguous(), {"class_name": ["a"]}), "L2-normalised"),
        ((["x"], torch.eye(8)[:1], {"class_name": ["a"]}), "width 16, got 8"),
        (([7], embeddings[:1], {"class_name": ["a"]}), "ids must be texts"),
    ]:
        with pytest.raises(ValueError, match=message):
            index.add(*arguments)
    with pytest.raises(ValueError, match="1 ids are not in the index: 'y'"):
        index.remove(["item 1", "y"])
    with pytest.raises(ValueError, match="1 ids are not in the index: 'y'"):
        index.search_ids(["y"])
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        index.search(embeddings[:1], 0)
    assert len(index) == 300


def test_factories_that_faiss_does_not_make(embeddings):
    with pytest.raises(ValueError, match="faiss can't make 'Flatt'"):
        build(embeddings, factory="Flatt")
    with pytest.raises(ValueError, match="faiss can't train 'IVF1000,Flat' with 300 embeddings"):
        build(embeddings, factory="IVF1000,Flat")


# ---- Files


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16", "PCA12,IVF8,PQ6x4"])
@pytest.mark.parametrize("mmap", [False, True])
def test_saved_index_finds_the_same(embeddings, tmp_path, factory, mmap):
    index = build(embeddings, factory=factory, model={"name": "m", "fingerprint": "f" * 64})
    index.save(tmp_path / "index")
    opened = open_index(tmp_path / "index", mmap=mmap)
    queries = clustered(10, seed=1)
    assert opened.search(queries, 5) == index.search(queries, 5)
    assert opened.search_ids(["item 7"], 5, {"class_name": "class 1"}) == index.search_ids(
        ["item 7"], 5, {"class_name": "class 1"}
    )
    assert opened.info == index.info
    if mmap:
        with pytest.raises(ValueError, match="can't remove from a memory-mapped index"):
            opened.remove(["item 1"])
    else:
        opened.add(["new"], embeddings[:1], {"class_name": ["new"]})
        opened.save(tmp_path / "index")
        assert len(RetrievalIndex.open(tmp_path / "index")) == 301


def test_saving_again_replaces_the_files(embeddings, tmp_path):
    index = build(embeddings)
    index.save(tmp_path / "index")
    index.remove(["item 0"])
    index.save(tmp_path / "index")
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names == [".lock", "index-000001.faiss", "index.json", "metadata-000001.parquet"]
    with pytest.raises(DataError, match="new or empty folder or an index, got one with 'index'"):
        index.save(tmp_path)


@pytest.mark.parametrize("fails", ["faiss.write_index", "pq.write_table", "save_record"])
def test_interrupted_saving_leaves_the_old_index(embeddings, tmp_path, monkeypatch, fails):
    index = build(embeddings)
    index.save(tmp_path / "index")
    before = index.search(embeddings[:5], 3)

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    index.remove([f"item {i}" for i in range(100)])
    with monkeypatch.context() as patch:
        patch.setattr(f"vptsp.search.index_files.{fails}", fail)
        with pytest.raises(KeyboardInterrupt):
            index.save(tmp_path / "index")
    opened = RetrievalIndex.open(tmp_path / "index")
    assert len(opened) == 300
    assert opened.search(embeddings[:5], 3) == before
    index.save(tmp_path / "index")
    assert len(RetrievalIndex.open(tmp_path / "index")) == 200
    assert len(list((tmp_path / "index").glob("[!.]*"))) == 3


def test_killed_between_writes(embeddings, tmp_path, monkeypatch):
    """What a kill leaves: the new files under their names or half written, `index.json` the old."""
    index = build(embeddings)
    index.save(tmp_path / "index")
    (tmp_path / "index" / "index-000001.faiss").write_bytes(b"whole, but not named by index.json")
    (tmp_path / "index" / ".metadata-000001.parquet.7.tmp").write_bytes(b"half")
    assert len(RetrievalIndex.open(tmp_path / "index")) == 300
    index.save(tmp_path / "index")
    names = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert names == [".lock", "index-000001.faiss", "index.json", "metadata-000001.parquet"]


def test_files_that_do_not_belong_together_are_refused(embeddings, tmp_path):
    build(embeddings).save(tmp_path / "a")
    build(embeddings[:100]).save(tmp_path / "b")
    (tmp_path / "b" / "index-000000.faiss").replace(tmp_path / "a" / "index-000000.faiss")
    with pytest.raises(DataError, match=r"index-000000\.faiss has 7290 bytes, expected 21690: it is damaged"):
        RetrievalIndex.open(tmp_path / "a")
    manifest = tmp_path / "a" / "index.json"
    values = json.loads(manifest.read_text())
    del values["files"]  # as an older version saved
    manifest.write_text(json.dumps(values))
    with pytest.raises(DataError, match="don't belong together: 100 vectors, 300 rows of metadata, 300 expected"):
        RetrievalIndex.open(tmp_path / "a")
    (tmp_path / "a" / "index-000000.faiss").write_bytes(b"nothing")
    with pytest.raises(DataError, match="can't be read"):
        RetrievalIndex.open(tmp_path / "a")
    with pytest.raises(DataError, match=r"is no index: it has no index\.json"):
        RetrievalIndex.open(tmp_path)


def test_paths_move_with_the_folder(embeddings, tmp_path):
    (tmp_path / "run" / "images").mkdir(parents=True)
    model = {"name": str(tmp_path / "run"), "fingerprint": "f"}
    build(embeddings, model=model, image_root=tmp_path / "run" / "images").save(tmp_path / "run" / "index")
    values = json.loads((tmp_path / "run" / "index" / "index.json").read_text())
    assert (values["model"]["name"], values["image_root"]) == ("./..", "./../images")
    (tmp_path / "run").rename(tmp_path / "moved")
    opened = RetrievalIndex.open(tmp_path / "moved" / "index")
    assert opened.model["name"] == str(tmp_path / "moved")
    assert opened.image_root == os.fspath(tmp_path / "moved" / "images")


# ---- With a model


def test_search_by_image_and_other_models(backbone_folder, tmp_path):
    embedder = Embedder.from_pretrained(backbone_folder, device="cpu")
    images = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)) for i in range(6)
    ]
    index = RetrievalIndex.build(
        [f"{i}" for i in range(6)], embedder.embed_images(images), model=embedder.description()
    )
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match="searching by image needs a model"):
        index.search_images(images)

    opened = RetrievalIndex.open(tmp_path / "index", embedder)
    images[2].save(tmp_path / "2.png")
    results = opened.search_images([tmp_path / "2.png", (tmp_path / "2.png").read_bytes(), images[4]], k=1)
    assert found_ids(results) == [["2"], ["2"], ["4"]]
    assert results[0][0].similarity == pytest.approx(1, abs=1e-5)

    other = Embedder.from_pretrained(backbone_folder, resize_size=17, device="cpu")
    with pytest.raises(IndexMismatchError, match="the index holds embeddings of another model"):
        RetrievalIndex.open(tmp_path / "index", other)
    anonymous = RetrievalIndex.build(["a"], torch.eye(24)[:1])
    with pytest.raises(IndexMismatchError, match="nobody said which"):
        anonymous.use_embedder(embedder)


def test_gpus_are_refused_where_faiss_sees_none(embeddings):
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss can use GPUs")
    with pytest.raises(ValueError, match="this faiss sees no GPU"):
        build(embeddings).use_gpus()
