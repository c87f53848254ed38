"""app.py: what the page does, and the page itself in Chromium."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from vptsp import DataError, Embedder, IndexMismatchError, RetrievalIndex, VPTSPModel, folder_source
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.deploy.page_content import BACKBONE, BOTH, THUMBNAIL, Found, SearchPage, nearest
from vptsp.deploy.page_layout import card
from vptsp.deploy.search_page import open_page
from vptsp.deploy.space import write_space


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220)}


@pytest.fixture(scope="module")
def place(backbone_folder, tmp_path_factory):
    """A folder with a retriever, images of three colours and their index."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("app")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(colour + rng.normal(0, 12, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8).save_pretrained(folder / "model")
    build_image_processor(16, 18).save_pretrained(folder / "model")
    embedder, source = Embedder.from_pretrained(folder / "model"), folder_source(folder / "images")
    classes = [source.class_name(row) for row in range(len(source))]
    index = RetrievalIndex.build(
        source.ids,
        embedder.embed_images([source.stored(row) for row in range(len(source))]),
        {"class_name": classes},
        model=embedder.description(),
        image_root=source.image_root,
    )
    index.save(folder / "index")
    return folder


@pytest.fixture(scope="module")
def page(place):
    return open_page(place / "index")


def test_search_by_image_and_by_id(page, place):
    query = str(place / "images" / "green" / "2.png")
    found = page.search(("image", query), 5, "", -1)
    assert found.status == "5 nearest to your image. Click one to search on."
    assert found.ids[0] == "green/2.png"
    ((first, *_),) = found.panels.values()
    assert first.similarity == pytest.approx(1, abs=1e-5)
    assert "<b>1.000</b> · green" in card(first) and ">2.png<" in card(first)
    assert {name.partition("/")[0] for name in found.ids} == {"green"}

    others = page.search(("id", "green/2.png"), 4, "", -1)
    assert others.ids == found.ids[1:]
    assert list(others.panels) == ["4 of 4 are of its class"]
    assert (others.query.id, others.query.metadata) == ("green/2.png", {"class_name": "green"})
    similarity = [hit.similarity for hits in others.panels.values() for hit in hits]
    assert (others.low, others.high) == (min(similarity), max(similarity))
    close = page.search(("id", "green/2.png"), 14, "", similarity[1])
    assert 1 <= len(close.ids) <= 2
    assert close.low < similarity[-1]  # the range that occurs, whatever is left out

    red = page.search(("id", "green/2.png"), 14, " RED ", -1)
    assert sorted(red.ids) == [f"red/{i}.png" for i in range(5)]


def test_browsing_without_a_query(page):
    pages = [page.search(None, 6, start=start) for start in (0, 6, 12, 18)]
    assert [len(part.ids) for part in pages] == [6, 6, 3, 0]
    assert [name for part in pages for name in part.ids] == page.index.ids
    assert {part.total for part in pages} == {15}
    assert pages[1].status.startswith("7–12 of 15 images.")
    assert (pages[0].low, pages[0].high) == (None, None)
    filtered = page.search(None, 6, " RED ")
    assert filtered.ids == [f"red/{i}.png" for i in range(5)]
    assert filtered.status.startswith("5 images with `RED`.")
    assert page.search(None, 6, "violet") == Found("Nothing passes the filter.")
    products = page.search(None, 6, one_per="class_name")
    assert products.ids == ["blue/0.png", "green/0.png", "red/0.png"]
    assert products.status.startswith("3 images, one for each class.")
    assert page.search(None, 6, "1", one_per="class_name").ids == ["blue/1.png", "green/1.png", "red/1.png"]
    assert "there is no column 'sku'; the columns are" in page.search(None, 6, one_per="sku").status


def test_best_photo_of_each_product(page):
    query = ("id", "green/2.png")
    everything = page.search(query, 14)
    (hits,) = everything.panels.values()
    best = {}
    for hit in hits:
        best.setdefault(hit.metadata["class_name"], hit.id)
    assert page.search(query, 3, one_per="class_name").ids == list(best.values())
    assert page.search(query, 2, one_per="class_name").ids == list(best.values())[:2]
    assert "there is no column 'sku'" in page.search(query, 3, one_per="sku").status


def test_items_without_a_value_are_products_of_their_own():
    vectors = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    values = ["a", "", "a", "", "b", "b"]
    index = RetrievalIndex.build(list("uvwxyz"), vectors, {"sku": values})
    assert [hit.id for hit in index.list_items(9, one_per="sku")[0]] == ["u", "v", "x", "y"]
    found = nearest(index, vectors[:1], 6, one_per="sku")
    assert sorted(hit.id for hit in found if not hit.metadata["sku"]) == ["v", "x"]
    assert sorted(hit.metadata["sku"] for hit in found) == ["", "", "a", "b"]


def test_few_products_are_found_behind_many_photos():
    """The photos of one product, however many, don't keep the others out."""
    close = torch.nn.functional.normalize(torch.tensor([1.0, 0.0]) + 0.01 * torch.rand(400, 2), dim=1)
    vectors = torch.cat([close, torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
    index = RetrievalIndex.build([str(i) for i in range(402)], vectors, {"sku": ["x"] * 400 + ["y", "z"]})
    assert [hit.metadata["sku"] for hit in nearest(index, vectors[:1], 3, one_per="sku")] == ["x", "y", "z"]


def test_empty_states_and_errors(page, tmp_path):
    found = page.search(None, 15, "", -1)
    assert "15 images. Drop an image, or click one to search with it." in found.status
    assert len(found.ids) == 15
    nothing = page.search(("id", "green/2.png"), 5, "violet", -1)
    assert nothing.status == "Nothing found for `green/2.png` that passes the filters."
    assert nothing.ids == []
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = page.search(("image", str(tmp_path / "broken.png")), 5, "", -1)
    assert broken.status.startswith("**This query can't be searched:** broken.png: can't read this image")
    assert broken.panels == {}


def test_only_files_inside_the_root_are_read(page, place, tmp_path):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(place / "secret.png")
    for name in ("../secret.png", "red/../../secret.png", str(place / "secret.png"), "."):
        with pytest.raises(DataError, match="leads out of"):
            page.image_path(name)
        assert page.thumbnail(name).getpixel((0, 0)) == (225, 225, 225)
    assert page.image_path("red/../green/1.png") == place / "images" / "green" / "1.png"
    assert page.thumbnail("absent.png").size == (THUMBNAIL, THUMBNAIL)


def test_what_does_not_fit_is_refused(page, place, backbone_folder, tmp_path):
    with pytest.raises(DataError, match="image_root: there is no folder"):
        SearchPage(page.index, tmp_path / "absent")
    with pytest.raises(IndexMismatchError, match="another model"):
        open_page(place / "index", model=backbone_folder)
    RetrievalIndex.build(["a"], torch.eye(8)[:1]).save(tmp_path / "index")
    with pytest.raises(DataError, match="doesn't say which model made its embeddings: give --model"):
        open_page(tmp_path / "index")


def test_space_stands_alone(place, tmp_path):
    space = tmp_path / "space"
    write_space(space, open_page(place / "index").index, None)
    assert sorted(path.name for path in space.iterdir()) == [
        "README.md", "app.py", "images", "index", "model", "requirements.txt"]  # fmt: skip
    assert len(list((space / "index").iterdir())) == 3
    moved = space.rename(tmp_path / "elsewhere")
    page = open_page(moved / "index")
    assert page.root == moved / "images"
    assert page.index.model["name"] == str(moved / "model")
    query = ("image", str(place / "images" / "blue" / "0.png"))
    assert page.search(query, 3, "", -1).ids == open_page(place / "index").search(query, 3, "", -1).ids
    assert re.search(
        r"^sdk: gradio\nsdk_version: \S+\napp_file: app\.py\n---$", (moved / "README.md").read_text(), re.M
    )
    compile((moved / "app.py").read_text(), "app.py", "exec")
    with pytest.raises(DataError, match="must be a new or empty folder"):
        write_space(moved, page.index, None)


@contextlib.contextmanager
def served(index):
    """Address of the page, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vptsp.cli", "app", "--index", str(index), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, "the server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(place, tmp_path):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    with served(place / "index") as address, playwright.sync_playwright() as engine:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=options)
        tab = browser.new_page()
        requests = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.set_default_timeout(60_000)
        expect = playwright.expect
        expect.set_options(timeout=60_000)
        tab.goto(address)
        results, captions = tab.locator("#results .thumbnail-item"), tab.locator("#results .caption-label")
        status = tab.locator("#status")
        expect(results).to_have_count(15)
        expect(status).to_contain_text("search the 15 images")

        tab.set_input_files("#query input[type=file]", place / "images" / "green" / "2.png")
        expect(status).to_contain_text("12 nearest to your image")
        assert captions.first.inner_text() == "1.000 · green"
        assert all("green" in text for text in captions.all_inner_texts()[:5])

        results.nth(7).click()
        expect(status).not_to_contain_text("your image")
        name = status.locator("code").inner_text()
        expected = open_page(place / "index").search(("id", name), 12, "", -1)
        assert captions.all_inner_texts() == [text for _, text in expected[1]]
        results.nth(7).click()  # the same place again
        expect(status.locator("code")).to_have_text(expected[2][7])

        tab.locator("#text").get_by_role("textbox").fill("blue")
        tab.keyboard.press("Enter")
        expect(results).to_have_count(5 - expected[2][7].startswith("blue"))
        assert all("blue" in text for text in captions.all_inner_texts())
        tab.locator("#text").get_by_role("textbox").fill("violet")
        tab.keyboard.press("Enter")
        expect(status).to_contain_text("Nothing found")

        (tmp_path / "broken.png").write_bytes(b"no image")
        tab.locator("#query").get_by_label("Remove Image").click()
        expect(status).to_contain_text("search the 15 images")
        tab.set_input_files("#query input[type=file]", tmp_path / "broken.png")
        expect(status).to_contain_text("broken.png: can't read this image")
        browser.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
