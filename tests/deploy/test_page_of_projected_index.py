"""The search page of an index with views, a projection and fewer bytes: queries are treated as its items were."""

import pytest
from data_fixtures import write_classes

from vptsp import Embedder, folder_source, update_index
from vptsp.deploy.search_page import open_page


def test_page_takes_views_and_projection_from_the_index(retriever_folder, tmp_path):
    photos = write_classes(tmp_path / "photos", {"mug": 5, "cup": 5})
    embedder, source = Embedder.from_pretrained(retriever_folder, views="five_crops"), folder_source(photos)
    build = {"projection": "whiten", "dim": 4, "quantise": "int8"}
    update_index(tmp_path / "index", embedder, source, build=build, cache_dir=tmp_path / "cache", progress=False)
    page = open_page(tmp_path / "index")
    assert page.index.embedder.views == "five_crops"
    name = page.index.ids[3]
    found = page.search(("image", str(photos / name)), 3, "", -1)
    ((first, *_),) = found.panels.values()
    assert (first.id, first.similarity) == (name, pytest.approx(1, abs=0.05))
    others = page.search(("id", name), 3, "", -1)
    assert others.query.id == name
    assert name not in others.ids
