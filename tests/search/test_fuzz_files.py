"""Damaged retrievers, stores and indexes: opened, or refused by our own error that says which."""

import json
import shutil

import pytest
import torch
from conftest import tiny_vit_config
from fuzzing import bounded, examples, mutated
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTModel

from vptsp import EmbeddingStore, RetrievalIndex, VPTSPModel, build_image_processor
from vptsp.search.embedder import Embedder
from vptsp.search.store import StoreInfo, begin_store, finish_store, write_shard


pytestmark = pytest.mark.fuzz

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, -1, 1, 2, 2.5, "x"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A retriever, a store and an index."""
    root = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    ViTModel(tiny_vit_config()).save_pretrained(root / "backbone")
    model = VPTSPModel.from_backbone(root / "backbone", num_prompts=2, embedding_dim=8)
    model.save_pretrained(root / "retriever", save_backbone=True)
    build_image_processor(16, 18).save_pretrained(root / "retriever")
    described = {"name": "m", "kind": "retriever", "fingerprint": "f" * 64, "dtype": "float32"}
    info = StoreInfo(described, {"description": "photos", "fingerprint": "d" * 64}, 6, 8)
    begin_store(root / "store", info)
    names = [f"{row}.png" for row in range(6)]
    write_shard(root / "store", info, 0, names, [0] * 6, ["a"] * 6, torch.eye(6, 8))
    finish_store(root / "store", info)
    RetrievalIndex.build(names, torch.eye(6, 8), {"class_name": ["a"] * 6}, model=described).save(root / "index")
    return root


def open_retriever(folder):
    Embedder.from_pretrained(folder).embed_images([Image.new("RGB", (20, 20))])


def open_store(folder):
    assert EmbeddingStore.open(folder).embeddings.shape == (6, 8)


def open_index(folder):
    assert len(RetrievalIndex.open(folder).search(torch.eye(1, 8), 1)[0]) == 1


def open_backbone(folder):
    VPTSPModel.from_backbone(folder, num_prompts=2, embedding_dim=8)


OPEN = {"retriever": open_retriever, "backbone": open_backbone, "store": open_store, "index": open_index}
FILES = {
    "retriever": ("config.json", "model.safetensors", "preprocessor_config.json"),
    "store": ("store.json", "shard-00000-of-00001.parquet"),
    "index": ("index.json", "index-000000.faiss", "metadata-000000.parquet"),
}


def check(folders, kind, name, content):
    """Opens a folder in which one file holds something else."""
    folder = folders / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders / kind, folder)
    (folder / name).write_bytes(content)
    with bounded():
        try:
            OPEN[kind](folder)
        except (ValueError, OSError) as error:
            assert str(error)


@pytest.mark.parametrize(("kind", "number"), [("retriever", 120), ("store", 60), ("index", 60)])
def test_damaged_bytes(kind, number, folders):
    contents = {name: (folders / kind / name).read_bytes() for name in FILES[kind]}

    @examples(number)
    @given(mutated(contents))
    def run(drawn):
        check(folders, kind, *drawn)

    run()


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [
        ("retriever", "config.json", 150),
        ("retriever", "preprocessor_config.json", 80),
        ("backbone", "config.json", 80),
        ("store", "store.json", 60),
        ("index", "index.json", 60),
    ],
)
def test_any_value_of_any_field_of_a_file(kind, name, number, folders):
    values = json.loads((folders / kind / name).read_text())
    places = [(key,) for key in values]
    places += [(key, inner) for key in values if isinstance(values[key], dict) for inner in values[key]]

    @examples(number)
    @given(st.sampled_from(places), anything)
    def run(place, value):
        changed = json.loads(json.dumps(values))
        inner = changed[place[0]] if len(place) == 2 else changed
        inner[place[-1]] = value
        check(folders, kind, name, json.dumps(changed).encode())

    run()
