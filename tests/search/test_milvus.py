"""search/milvus.py on the embedded form: the same results as the index of one folder."""

import pytest
import torch

from vptsp import DataError, IndexMismatchError, RetrievalIndex, open_index
from vptsp.search.open_index import is_milvus


pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from vptsp import MilvusIndex


MODEL = {"name": "a model", "kind": "retriever", "fingerprint": "f" * 64, "dtype": "float32"}


@pytest.fixture(scope="module")
def content():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(120, 8, generator=generator), dim=1)
    ids = [f"ordner/bild «{i}».png" for i in range(120)]
    return ids, embeddings, {"class_name": [f'it\'s "class" {i % 3} é' for i in range(120)]}


@pytest.fixture
def place(tmp_path):
    return f"{tmp_path}/photos.db#some"


def ids_of(results):
    return [[hit.id for hit in hits] for hits in results]


def test_same_results_as_the_index_of_one_folder(content, place):
    ids, embeddings, metadata = content
    reference = RetrievalIndex.build(*content)
    MilvusIndex.build(place, *content, model=MODEL, image_root="/photos").close()
    index = open_index(place)
    assert (len(index), index.model, index.image_root, index.embedding_dim) == (120, MODEL, "/photos", 8)
    where = {"class_name": [metadata["class_name"][1], metadata["class_name"][2]]}
    for arguments in [(embeddings[:5], 7), (embeddings[:5], 7, where)]:
        results, expected = index.search(*arguments), reference.search(*arguments)
        assert ids_of(results) == ids_of(expected)
        assert results[0][0].metadata == expected[0][0].metadata
        assert results[0][0].similarity == pytest.approx(expected[0][0].similarity, abs=1e-5)
    assert ids_of(index.search_ids(ids[:3], 5)) == ids_of(reference.search_ids(ids[:3], 5))
    torch.testing.assert_close(index.embeddings_of([ids[7], ids[3]]), embeddings[[7, 3]])
    for text in ("«11", 'class" 2'):
        results = index.search(embeddings[:2], 5, containing=text)
        assert ids_of(results) == ids_of(reference.search(embeddings[:2], 5, containing=text))
    assert len({hit.id for hit in index.list_items(9)[0]} & set(ids)) == 9
    with pytest.raises(ValueError, match="no column 'colour'"):
        index.search(embeddings[:1], 3, {"colour": "red"})

    index.remove(ids[:2])
    assert len(index) == 118
    assert ids[0] not in ids_of(index.search(embeddings[:1], 118))[0]
    with pytest.raises(ValueError, match="1 ids are not in the index"):
        index.remove(ids[:1])
    with pytest.raises(ValueError, match="1 ids are in the index already"):
        index.add(ids[2:3], embeddings[2:3], {"class_name": ["a"]})
    with pytest.raises(ValueError, match=r"columns \['class_name'\], got \[\]"):
        index.add(ids[:1], embeddings[:1])
    index.add(ids[:1], embeddings[:1], {"class_name": ["new"]})
    assert index.search(embeddings[:1], 1, {"class_name": "new"})[0][0].id == ids[0]

    with pytest.raises(IndexMismatchError, match=r"another model: a model \(fingerprint ffffffffffff\)"):
        index.check_model({**MODEL, "fingerprint": "0" * 64})
    with pytest.raises(DataError, match="the collection 'some' exists"):
        MilvusIndex.build(place, *content)
    with pytest.raises(DataError, match=r"no collection 'other', there are \['some'\]"):
        MilvusIndex.open(place.replace("some", "other"))
    index.close()


def test_absent_places_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no index"):
        open_index(tmp_path / "absent.db")


def test_what_is_milvus():
    assert all(is_milvus(place) for place in ("a/b.db", "b.db#photos", "http://host:19530", "https://host#photos"))
    assert not any(is_milvus(place) for place in ("runs/index", "runs/index.faiss", "a.db/index"))


# ---- Texts that a grammar could take for its own

NASTY = [
    "it's", 'say "x"', "a\\b", "\\", "\\'", '\\"', "ends\\", "a\nb", "a\rb\tc", "100%", "a_b", "axb", "{ids}", "$x",
    "", " ", "é «ß» 漢字 🔎", "\u2028", "\x00", "\x1f\x7f", "' or id != '", "x'] or id in ['mug/1.jpg",
    '"] or id in ["mug/1.jpg', "mug/1.jpg", "a/../b", "`x`", "-- comment", "/* */",
]  # fmt: skip


@pytest.fixture
def nasty(place):
    vectors = torch.nn.functional.normalize(torch.eye(len(NASTY)) + 0.05, dim=1)
    index = MilvusIndex.build(place, NASTY, vectors, {"class_name": NASTY[::-1]})
    yield index, vectors
    index.close()


def test_nasty_texts_make_the_round_trip(nasty, place):
    index, vectors = nasty
    reference = RetrievalIndex.build(NASTY, vectors, {"class_name": NASTY[::-1]})
    assert index.present(NASTY) == set(NASTY)
    torch.testing.assert_close(index.embeddings_of(NASTY), vectors)
    for row, name in enumerate(NASTY):
        assert index.present([name]) == {name}
        (hit,) = index.search(vectors[row : row + 1], 50, where={"id": name})[0]
        assert (hit.id, hit.metadata) == (name, {"class_name": NASTY[-1 - row]})
        (hit,) = index.search(vectors[row : row + 1], 50, where={"class_name": [name]})[0]
        assert hit.id == NASTY[-1 - row]
        assert name not in ids_of(index.search_ids([name], 5))[0]
        if name:
            found, expected = (i.search(vectors[:1], 50, containing=name)[0] for i in (index, reference))
            assert sorted(hit.id for hit in found) == sorted(hit.id for hit in expected)
    for row, name in enumerate(NASTY):
        index.remove([name])
        assert (len(index), index.present([name])) == (len(NASTY) - row - 1, set())
    index.add(NASTY, vectors, {"class_name": NASTY})
    assert index.present(NASTY) == set(NASTY)


@pytest.mark.parametrize("absent", ["x'] or id in ['a", 'x"] or id in ["a', "x\\", "' or '' == '", "\n"])
def test_no_text_asks_for_anything_else(place, absent):
    index = MilvusIndex.build(place, ["a", "b"], torch.eye(2), {"class_name": ["x", "y"]})
    assert index.present([absent]) == set()
    assert index.search(torch.eye(2), 5, where={"class_name": absent}) == [[], []]
    assert index.search(torch.eye(2), 5, containing=absent) == [[], []]
    for change in (index.remove, index.embeddings_of, index.search_ids):
        with pytest.raises(ValueError, match="1 ids are not in the index"):
            change([absent])
    assert len(index) == 2
    index.close()


# ---- All or nothing


@pytest.fixture
def one_item(place):
    index = MilvusIndex.build(place, ["first"], torch.eye(8)[:1], {"class_name": ["a"]})
    yield index
    index.close()


@pytest.mark.parametrize(
    ("last_id", "last_class", "message"),
    [
        ("b\udcff", "a", "ids must be texts that UTF-8 can hold"),
        ("b", None, "class_name must be texts, got None among them"),
        ("é" * 513, "a", "ids must take at most 1024 bytes in UTF-8, got 1026"),
        ("b", "é" * 2049, "class_name must take at most 4096 bytes in UTF-8, got 4098"),
        ("first", "a", "1 ids are in the index already: 'first'"),
    ],
)
def test_a_refused_addition_changes_nothing(one_item, last_id, last_class, message):
    """The last of more items than are sent at once."""
    ids, vectors = [*map(str, range(1000)), last_id], torch.eye(8)[:1].expand(1001, 8)
    with pytest.raises(ValueError, match=message):
        one_item.add(ids, vectors, {"class_name": ["a"] * 1000 + [last_class]})
    assert (len(one_item), one_item.present(["0", "999"])) == (1, set())


def test_what_the_server_did_not_take_whole_is_taken_out(one_item, place, monkeypatch):
    insert, calls = one_item._client.insert, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("gone")
        return insert(*arguments)

    monkeypatch.setattr(one_item._client, "insert", fails)
    ids, vectors = [*map(str, range(1001))], torch.eye(8)[:1].expand(1001, 8)
    with pytest.raises(ConnectionError):
        one_item.add(ids, vectors, {"class_name": ids})
    assert (len(one_item), one_item.present(ids)) == (1, set())


def test_a_refused_collection_is_not_begun(place, monkeypatch):
    for ids, metadata, message in [
        (["a", "\udcff"], {"class_name": ["a", "b"]}, "ids must be texts that UTF-8 can hold"),
        (["a", "b"], {"class name": ["a", "b"]}, "names of letters, digits and _, got 'class name'"),
        (["a", "b"], {"embedding": ["a", "b"]}, "can't be called 'embedding'"),
    ]:
        with pytest.raises(ValueError, match=message):
            MilvusIndex.build(place, ids, torch.eye(2), metadata)
        with pytest.raises(DataError, match="no collection 'some'"):
            MilvusIndex.open(place)
    with monkeypatch.context() as patch:
        patch.setattr(MilvusIndex, "_insert", lambda *arguments: pytest.fail("gone"))
        with pytest.raises(pytest.fail.Exception):
            MilvusIndex.build(place, ["a", "b"], torch.eye(2))
    MilvusIndex.build(place, ["a", "b"], torch.eye(2)).close()
