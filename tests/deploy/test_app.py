"""app.py: what the page does, and the page itself in Chromium."""

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vptsp import DataError, Embedder, IndexMismatchError, RetrievalIndex, VPTSPModel, folder_source, update_index
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.deploy.page_content import BACKBONE, BOTH, THUMBNAIL, TUNED, Found, SearchPage
from vptsp.deploy.page_layout import add_item_routes, card
from vptsp.deploy.search_page import main, open_page
from vptsp.deploy.space import write_space
from vptsp.search.backbone_alone import backbone_alone


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
    found = index.search(vectors[:1], 6, group_by="sku")[0]
    assert sorted(hit.id for hit in found if not hit.metadata["sku"]) == ["v", "x"]
    assert sorted(hit.metadata["sku"] for hit in found) == ["", "", "a", "b"]


def test_few_products_are_found_behind_many_photos():
    """The photos of one product, however many, don't keep the others out."""
    close = torch.nn.functional.normalize(torch.tensor([1.0, 0.0]) + 0.01 * torch.rand(400, 2), dim=1)
    vectors = torch.cat([close, torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])
    index = RetrievalIndex.build([str(i) for i in range(402)], vectors, {"sku": ["x"] * 400 + ["y", "z"]})
    assert [hit.metadata["sku"] for hit in index.search(vectors[:1], 3, group_by="sku")[0]] == ["x", "y", "z"]


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
        "README.md", "app.py", "images", "index", "model", "requirements.txt", "vptsp_space.json"]  # fmt: skip
    assert len(list((space / "index").iterdir())) == 3
    moved = space.rename(tmp_path / "elsewhere")
    page = open_page(moved / "index")
    assert page.roots[0] == moved / "images"
    assert page.index.model["name"] == str(moved / "model")
    query = ("image", str(place / "images" / "blue" / "0.png"))
    assert page.search(query, 3, "", -1).ids == open_page(place / "index").search(query, 3, "", -1).ids
    assert re.search(
        r"^sdk: gradio\nsdk_version: \S+\napp_file: app\.py\n---$", (moved / "README.md").read_text(), re.M
    )
    compile((moved / "app.py").read_text(), "app.py", "exec")
    with pytest.raises(DataError, match="must be a new or empty folder"):
        write_space(moved, page.index, None)


# ---- Backbone alone, and side by side


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory):
    return open_page(place / "index", compare_backbone=True, embeddings_cache=tmp_path_factory.mktemp("cache"))


def test_the_backbone_alone_is_the_pretrained_one(place, compared, backbone_folder):
    bare = Embedder.from_pretrained(backbone_folder)
    pixels = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(compared.backbone.embedder.embed_pixels(pixels), bare.embed_pixels(pixels))
    expected = compared.backbone.embedder.embed_images([place / "images" / name for name in compared.index.ids])
    found = compared.backbone.embeddings_of(compared.index.ids)
    torch.testing.assert_close(found, expected)
    assert compared.backbone.list_items(99)[0][3].metadata == compared.index.list_items(99)[0][3].metadata


def test_side_by_side(place, compared):
    for query in (("id", "green/2.png"), ("image", str(place / "images" / "red" / "0.png"))):
        both, tuned, alone = (compared.search(query, 14, view=view) for view in (BOTH, TUNED, BACKBONE))
        panels = list(both.panels.values())
        assert panels == [*tuned.panels.values(), *alone.panels.values()]
        assert (both.low, both.high) == (min(tuned.low, alone.low), max(tuned.high, alone.high))
        assert tuned.ids != alone.ids or tuned.low != alone.low
    heading, other = compared.search(("id", "green/2.png"), 4, view=BOTH).panels
    assert heading.startswith("tuned · ") and other.startswith("backbone alone · ")


def test_embeddings_of_the_backbone_are_made_once(place, tmp_path, monkeypatch):
    first = open_page(place / "index", compare_backbone=True, embeddings_cache=tmp_path).backbone
    monkeypatch.setattr(Embedder, "embed_pixels", lambda *_: pytest.fail("embedded again"))
    again = open_page(place / "index", compare_backbone=True, embeddings_cache=tmp_path).backbone
    torch.testing.assert_close(again.embeddings_of(again.ids), first.embeddings_of(first.ids))


def test_comparisons_that_can_not_be(page, place, backbone_folder, tmp_path, capsys):
    assert "there is no view 'side by side'" in page.search(None, 3, view=BOTH).status
    bare = Embedder.from_pretrained(backbone_folder)
    images = [str(place / "images" / name) for name in page.index.ids]
    index = RetrievalIndex.build(page.index.ids, bare.embed_images(images), model=bare.description())
    index.save(tmp_path / "index")
    with pytest.raises(DataError, match="is a bare backbone: there is nothing that tuning has brought"):
        open_page(tmp_path / "index", image_root=place / "images", compare_backbone=True)
    model = VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8)
    model.save_pretrained(tmp_path / "whole", save_backbone=True)
    build_image_processor(16, 18).save_pretrained(tmp_path / "whole")
    with pytest.raises(DataError, match="doesn't say which pretrained one"):
        backbone_alone(Embedder.from_pretrained(tmp_path / "whole"))
    for words, message in (
        (["--compare_backbone", "--write_space", "x"], "a Space has the tuned model alone"),
        (["--write_space", "x", "--port", "80", "--share"], "--port, --share: for the page served here"),
        (["--embeddings_cache", "x"], "--embeddings_cache goes with --compare_backbone"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--index", str(place / "index"), *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_an_image_that_can_not_be_read_is_named(place, tmp_path, capsys):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "red" / "1.png").write_bytes(b"no image")
    options = {"compare_backbone": True, "embeddings_cache": tmp_path / "cache"}
    page = open_page(place / "index", image_root=tmp_path / "images", **options)
    assert "without 1 images that can't be read, such as red/1.png" in capsys.readouterr().out
    assert len(page.backbone) == 14
    assert "can't be searched" in page.search(("id", "red/1.png"), 3, view=BACKBONE).status
    (tmp_path / "images" / "red" / "1.png").unlink()
    with pytest.raises(DataError, match=r"red/1\.png"):
        open_page(place / "index", image_root=tmp_path / "images", **options)


@pytest.mark.parametrize("kind, ending", [("TIFF", "tif"), ("AVIF", "avif"), ("WEBP", "webp"), ("BMP", "bmp")])
def test_queries_of_all_kinds(page, place, tmp_path, kind, ending):
    path = tmp_path / f"query.{ending}"
    Image.open(place / "images" / "green" / "2.png").save(path, kind, **({"quality": 100} if kind == "AVIF" else {}))
    assert page.search(("image", str(path)), 3).ids[0].startswith("green/")


def test_originals_that_no_browser_shows_are_converted(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    page = open_page(place / "index", image_root=tmp_path / "images")
    assert page.original("red/0.png") == ("image/png", tmp_path / "images" / "red" / "0.png")
    image = Image.open(tmp_path / "images" / "red" / "0.png")
    image.save(tmp_path / "images" / "red" / "1.png", "TIFF")  # whatever its name says
    assert page.original("red/1.png") == (None, None)
    app = fastapi_app(page)
    answer = app.get("/item/original", params={"id": "red/1.png"})
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).tobytes() == image.tobytes()
    (tmp_path / "images" / "red" / "2.png").write_bytes(b"<script>")
    for kind in ("original", "thumbnail"):
        answer = app.get(f"/item/{kind}", params={"id": "red/2.png"})
        assert (answer.status_code, answer.json()) == (404, {"error": "the image of this item can't be read"})


def fastapi_app(page):
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    add_item_routes(app, page)
    return TestClient(app)


# ---- In a browser


@contextlib.contextmanager
def served(index, *words):
    """Address of the page, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vptsp.cli", "app", "--index", str(index), "--port", str(port), *map(str, words)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        deadline, answered = time.monotonic() + 300, False
        while not answered:
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server doesn't answer"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).close()
                answered = True
            time.sleep(0.1)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=60_000)
    with playwright.sync_playwright() as engine:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        try:
            browser = engine.chromium.launch(executable_path=CHROMIUM, args=options)
        except playwright.Error:
            if CHROMIUM is not None:
                raise
            pytest.skip("needs Chromium: neither the system nor Playwright has it")
        browser.expect = playwright.expect
        yield browser
        browser.close()


@pytest.mark.browser
def test_page_in_a_browser(browser, place, tmp_path):
    with served(place / "index", "--compare_backbone", "--embeddings_cache", tmp_path / "cache") as address:
        expect, tab, requests = browser.expect, browser.new_page(), []
        tab.on("request", lambda request: requests.append(request.url))
        tab.set_default_timeout(60_000)
        tab.goto(address)
        results, status = tab.locator("#results .card"), tab.locator("#status")
        pictures, text = tab.locator("#results .card button"), tab.locator("#text").get_by_role("textbox")
        expect(results).to_have_count(12)  # browsing, and turning pages
        expect(status).to_contain_text("1–12 of 15 images")
        tab.locator("#after").click()
        expect(results).to_have_count(3)
        expect(tab.locator("#after")).to_be_hidden()
        tab.locator("#before").click()
        expect(results).to_have_count(12)
        text.fill("blue")
        tab.keyboard.press("Enter")
        expect(results).to_have_count(5)
        text.fill("")
        tab.keyboard.press("Enter")
        expect(results).to_have_count(12)

        tab.set_input_files("#query input[type=file]", place / "images" / "green" / "2.png")
        expect(status).to_contain_text("12 nearest to your image")
        expect(results.first).to_contain_text("1.000 · green")
        assert all("green" in shown for shown in results.all_inner_texts()[:5])
        low = tab.locator("#minimum input[type=number]")
        assert -1 < float(low.input_value()) < 1  # the range that occurs

        pictures.nth(7).click()
        expect(status).not_to_contain_text("your image")
        name = status.locator("code").inner_text()
        expected = open_page(place / "index").search(("id", name), 12)
        expect(pictures.first).to_have_attribute("data-id", expected.ids[0])  # shown a moment after the status
        assert [button.get_attribute("data-id") for button in pictures.all()] == expected.ids
        expect(tab.locator("#asked")).to_contain_text(Path(name).name)
        with tab.expect_popup() as opened:
            results.first.get_by_text("original").click()
        opened.value.wait_for_load_state()
        assert opened.value.locator("img").evaluate("image => image.naturalWidth") == 40
        opened.value.close()
        pictures.nth(7).click()  # the same place again
        expect(status.locator("code")).to_have_text(expected.ids[7])
        tab.locator("#back").click()
        expect(status.locator("code")).to_have_text(name)
        tab.locator("#back").click()
        expect(status).to_contain_text("12 nearest to your image")

        tab.get_by_label("side by side").check()
        expect(tab.locator(".panel")).to_have_count(2)
        expect(results).to_have_count(24)
        tab.get_by_label("backbone alone").check()
        expect(tab.locator(".panel")).to_have_count(1)
        tab.get_by_label("tuned", exact=True).check()
        tab.locator("#one_per input").click()
        tab.get_by_role("option", name="best of each class").click()
        expect(results).to_have_count(3)
        text.fill("violet")
        tab.keyboard.press("Enter")
        expect(status).to_contain_text("Nothing found")
        text.fill("")
        tab.keyboard.press("Enter")

        for kind in ("tif", "avif"):
            Image.open(place / "images" / "red" / "2.png").save(tmp_path / f"query.{kind}")
            tab.locator("#query").get_by_label("Remove Image").click()
            expect(status).to_contain_text("one for each class")
            tab.set_input_files("#query input[type=file]", tmp_path / f"query.{kind}")
            expect(status).to_contain_text("nearest to your image")
            expect(results.first).to_contain_text("red")
            shown = tab.locator("#query img")
            expect(shown).to_be_visible()
            tab.wait_for_function("document.querySelector('#query img').naturalWidth > 0")  # a browser can't show TIFF
        (tmp_path / "broken.png").write_bytes(b"no image")
        tab.locator("#query").get_by_label("Remove Image").click()
        tab.set_input_files("#query input[type=file]", tmp_path / "broken.png")
        expect(status).to_contain_text("broken.png: can't read this image")
        tab.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)


def test_images_of_several_folders_are_shown(place, tmp_path):
    """Each item knows its own folder, also in a Space, where all have one."""
    second = tmp_path / "more" / "images"
    shutil.copytree(place / "images" / "red", second / "red")
    embedder = Embedder.from_pretrained(place / "model")
    for folder in (place / "images", second):
        update_index(tmp_path / "index", embedder, folder_source(folder), cache_dir=tmp_path / "cache", progress=False)
    page = open_page(tmp_path / "index")
    assert page.image_path("images/red/1.png") == second / "red" / "1.png"
    assert page.image_path("red/1.png") == place / "images" / "red" / "1.png"
    (second / "red" / "1.png").unlink()
    assert page.thumbnail("images/red/1.png").getpixel((0, 0)) == (225, 225, 225)
    for path in sorted(second.rglob("*.png")):
        assert page.thumbnail(f"images/red/{path.name}").getpixel((0, 0)) != (225, 225, 225)
    shutil.copy(place / "images" / "red" / "1.png", second / "red" / "1.png")
    write_space(tmp_path / "space", page.index, None)
    moved = (tmp_path / "space").rename(tmp_path / "elsewhere")
    there = open_page(moved / "index")
    for name in ("images/red/1.png", "red/1.png"):
        assert there.image_path(name) == moved / "images" / name
        assert there.image_path(name).read_bytes() == page.image_path(name).read_bytes()
    shutil.rmtree(second)
    with pytest.raises(DataError, match=r"image_root: there is no folder .*more/images; give --image_root"):
        open_page(tmp_path / "index")


@pytest.mark.browser
@pytest.mark.parametrize("width, height", [(1280, 860), (390, 844)])
def test_layout_holds_with_two_and_with_a_hundred(browser, place, tmp_path, width, height):
    """Cards stay as wide, lie side by side, and nothing runs out of the window."""
    vectors = torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    names = [f"{name}/{number % 5}.png" for name in COLOURS for number in range(5)]
    folder = tmp_path / "images"
    for number in range(100):
        (folder / f"{number % 7}").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place / "images" / names[number % 15], folder / f"{number % 7}" / f"{number}.png")
    ids = [f"{number % 7}/{number}.png" for number in range(100)]
    columns = {"class_name": ["Donaudampfschifffahrtsgesellschaft" * 2] * 50 + ["b"] * 50, "price": ["9.99"] * 100}
    model = open_page(place / "index").index.model
    RetrievalIndex.build(ids, vectors, columns, model=model, image_root=str(folder)).save(tmp_path / "index")
    with served(tmp_path / "index") as address:
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(60_000)
        tab.goto(address)
        cards, count = tab.locator("#results .card"), tab.locator("#count input[type=number]")
        browser.expect(cards).to_have_count(12)
        if width < 700:
            browser.expect(count).to_be_hidden()  # the filters leave room for results
            assert cards.first.bounding_box()["y"] < height - 100
            tab.locator("#filters > button").click()
        sizes = {}
        for number in (2, 100):
            count.fill(str(number))
            count.blur()
            browser.expect(cards).to_have_count(number)
            boxes = [card.bounding_box() for card in cards.all()[:2]]
            assert boxes[0]["y"] == boxes[1]["y"]
            sizes[number] = boxes[0]["width"]
            assert 90 <= sizes[number] <= 225
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert sizes[2] == sizes[100]
        tab.close()


@pytest.mark.browser
def test_names_in_a_browser(browser, place, tmp_path):
    """Names are shown as they are, and run nothing."""
    names = ["<img src=x onerror=alert(1)>.png", "${alert(2)}.png", "{{value}}.png", "`'\"&amp;.png", "\\u0041.png"]
    vectors = torch.nn.functional.normalize(torch.randn(len(names), 8), dim=1)
    for name in names:
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copyfile(place / "images" / "red" / "0.png", tmp_path / "images" / name)
    model = open_page(place / "index").index.model
    columns = {"class_name": names, "price": names}
    index = RetrievalIndex.build(names, vectors, columns, model=model, image_root=str(tmp_path / "images"))
    index.save(tmp_path / "index")
    with served(tmp_path / "index") as address:
        tab, dialogs = browser.new_page(), []
        tab.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        tab.set_default_timeout(60_000)
        tab.goto(address)
        cards = tab.locator("#results .card")
        browser.expect(cards).to_have_count(len(names))
        for card, name in zip(cards.all(), names, strict=True):
            assert card.locator(".head").inner_text() == card.locator(".file").inner_text() == name
            assert f"price: {name}" in card.inner_text()
        cards.nth(0).locator("button").click()
        browser.expect(tab.locator("#asked .file")).to_have_text(names[0])
        tab.wait_for_function("[...document.querySelectorAll('#results img')].every(i => i.naturalWidth > 0)")
        assert dialogs == []
        tab.close()
