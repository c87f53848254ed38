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
from vptsp.deploy.page_content import THUMBNAIL, SearchPage
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
    status, pictures, ids = page.search(("image", query), 5, "", -1)
    assert status == "5 nearest to your image. Click one to search on."
    assert ids[0] == "green/2.png"
    assert pictures[0][1] == "1.000 · green"
    assert {name.partition("/")[0] for name in ids} == {"green"}

    _, pictures, others = page.search(("id", "green/2.png"), 4, "", -1)
    assert others == ids[1:]
    similarity = [float(caption.split()[0]) for _, caption in pictures]
    _, _, close = page.search(("id", "green/2.png"), 14, "", similarity[1])
    assert 1 <= len(close) <= 2

    _, _, red = page.search(("id", "green/2.png"), 14, " RED ", -1)
    assert sorted(red) == [f"red/{i}.png" for i in range(5)]


def test_empty_states_and_errors(page, tmp_path):
    status, pictures, ids = page.search(None, 5, "", -1)
    assert "click one of these to search the 15 images" in status
    assert len(pictures) == len(ids) == 15
    assert page.search(("id", "green/2.png"), 5, "violet", -1) == (
        "Nothing found for `green/2.png` that passes the filters.",
        [],
        [],
    )
    (tmp_path / "broken.png").write_bytes(b"no image")
    status, pictures, _ = page.search(("image", str(tmp_path / "broken.png")), 5, "", -1)
    assert status.startswith("**This query can't be searched:** broken.png: can't read this image")
    assert pictures == []


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
    assert page.search(query, 3, "", -1)[2] == open_page(place / "index").search(query, 3, "", -1)[2]
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
