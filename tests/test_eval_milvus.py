"""eval/milvus.py on the embedded form: the same results as the index of one folder."""

import pytest
import torch

from vptsp.data_scripts import DataError
from vptsp.eval import IndexMismatchError, RetrievalIndex, open_index
from vptsp.eval.vector_index import is_milvus


pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from vptsp.eval import MilvusIndex


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
    assert len(set(index.sample_ids(9)) & set(ids)) == 9
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
