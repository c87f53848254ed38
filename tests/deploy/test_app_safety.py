"""app.py against those who don't mean well: what its API opens, what names do, what a Space is written to."""

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from data_fixtures import write_classes, write_image
from PIL import Image

from vptsp import DataError, Embedder, RetrievalIndex, VPTSPModel, folder_source
from vptsp.data_scripts.preprocessing import build_image_processor
from vptsp.deploy.page_content import SearchPage
from vptsp.deploy.page_layout import build_page, card, launch
from vptsp.deploy.search_page import open_page
from vptsp.deploy.space import write_space
from vptsp.eval.markdown import code_span, plain_text
from vptsp.search.vector_index import Hit


FILTERS = (3, "", "", "tuned")  # of the page's API: results, text, one per, view
NASTY = [
    "a`b.png", "`", "``", "![x](http://a.b/c.png)", "`![x](http://a.b/c.png)`", "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))", "x\n\n# y", "x\r\n\r\n<script>", "*x* _y_ ~~z~~", "http://a.b", "www.a.b", "a@b.c",
    "&lt;b&gt;", "\\`x\\`", "\\", "a\\", "$$x$$", "<http://a.b>", "x | y", "`` ` ``", " ", "x\x00y", "1. x", "- x",
    "a\u2028b",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(backbone_folder, tmp_path_factory):
    """A folder with a retriever, six images and their index."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("app")
    write_classes(folder / "images", {"a": 3, "b": 3})
    VPTSPModel.from_backbone(backbone_folder, num_prompts=2, embedding_dim=8).save_pretrained(folder / "model")
    build_image_processor(16, 18).save_pretrained(folder / "model")
    embedder, source = Embedder.from_pretrained(folder / "model"), folder_source(folder / "images")
    embeddings = embedder.embed_images([source.stored(row) for row in range(len(source))])
    index = RetrievalIndex.build(
        source.ids,
        embeddings,
        {"class_name": [source.class_name(row) for row in range(len(source))]},
        model=embedder.description(),
        image_root=source.image_root,
    )
    index.save(folder / "index")
    return folder


def page_of(place, ids):
    """The page of an index with other ids."""
    index = open_page(place / "index").index
    vectors = torch.nn.functional.normalize(torch.randn(len(ids), 8), dim=1)
    other = RetrievalIndex.build(ids, vectors, {"class_name": ids}, model=index.model, image_root=index.image_root)
    return SearchPage(other.use_embedder(index.embedder))


# ---- Which files the API opens


class Api:
    def __init__(self, address):
        self.address = f"{address}gradio_api/"

    def get(self, path):
        try:
            with urllib.request.urlopen(f"{self.address}{path}", timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def post(self, path, body, kind="application/json"):
        request = urllib.request.Request(f"{self.address}{path}", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def upload(self, content, name="query.png"):
        head = f'--xx\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        return self.post("upload", head.encode() + content + b"\r\n--xx--\r\n", "multipart/form-data; boundary=xx")

    def call(self, name, *data, session="one and the same"):
        """Whether a call succeeded, and what it answered."""
        status, event = self.post(f"call/{name}", json.dumps({"data": data, "session_hash": session}).encode())
        assert status == 200
        answer = self.get(f"call/{name}/{event['event_id']}")[1].decode()
        return "event: complete" in answer, answer


@pytest.fixture(scope="module")
def api(place, tmp_path_factory):
    pytest.importorskip("gradio")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    blocks = launch(open_page(place / "index", max_megapixels=0.01), max_upload_mb=0.1, block=False)
    yield Api(blocks.local_url)
    blocks.close()
    patch.undo()


def test_uploads_are_searched(api, place):
    status, (path,) = api.upload((place / "images" / "a" / "001.png").read_bytes())
    assert status == 200
    done, answer = api.call("search_file", {"path": path}, *FILTERS)
    assert done and "3 nearest to your image" in answer and "1.000" in answer
    assert api.call("search_file", None, *FILTERS)[0]
    done, answer = api.call("search", -1, *FILTERS)
    assert done and "click one to search with it" in answer


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}])
def test_no_other_file_is_opened(api, place, meta, tmp_path):
    secret = write_image(tmp_path / "secret.png")
    uploads = Path(api.upload(secret.read_bytes())[1][0]).parent
    (uploads / "link.png").unlink(missing_ok=True)
    (uploads / "link.png").symlink_to(secret)
    climbing = f"{uploads}/../../{'../' * 20}{str(secret).lstrip('/')}"
    for path in (
        secret,
        place / "images" / "a" / "001.png",
        uploads / "link.png",
        climbing,
        uploads,
        "query.png",
        "\0",
        "",
    ):
        done, answer = api.call("search_file", {"path": str(path), **meta}, *FILTERS)
        assert not done
        assert "nearest" not in answer
        assert secret.name not in answer
    done, answer = api.call("search_file", {"url": f"file://{secret}"}, *FILTERS)
    assert not done


def test_no_file_is_served_by_its_path(api, place, tmp_path):
    for path in (
        place / "images" / "a" / "001.png",
        place / "index" / "index.json",
        Path(__file__),
        "app.py",
        "/etc/passwd",
    ):
        assert api.get(f"file={path}")[0] in (403, 404)


def test_the_query_is_no_argument_of_the_api(api, place):
    """It is the session's, and set by a search alone."""
    secret = ["image", str(place / "images" / "a" / "001.png")]
    for data in ([secret, -1, *FILTERS], (-1, *FILTERS)):
        _, answer = api.call("search", *data, session="another")
        assert "nearest" not in answer


@pytest.mark.parametrize("name", ["b/absent.png", "../../etc/passwd", "", None, 3, ["a/001.png"], {"a": 1}])
def test_an_item_that_is_not_there_is_an_error(api, name, capfd):
    done, answer = api.call("search_item", name, *FILTERS)
    assert not done
    assert "There is no item" in answer
    assert "Traceback" not in capfd.readouterr().err


def test_items_are_searched_by_their_id(api):
    done, answer = api.call("search_item", "a/001.png", *FILTERS)
    assert done and "3 nearest to `a/001.png`" in answer
    done, answer = api.call("go_back", *FILTERS)
    assert done


@pytest.mark.parametrize(
    "filters",
    [(0, "", "", "tuned"), (1000, "", "", "tuned"), (None, "", "", "tuned"), ("x", "", "", "tuned"),
     (3, "", "sku", "tuned"), (3, "", "", "other"), (3, "", "", "side by side")],
)  # fmt: skip
def test_filters_that_there_are_not_are_refused(api, filters):
    done, answer = api.call("search_item", "a/001.png", *filters)
    assert not done or "can't be searched" in answer
    assert "nearest" not in answer


def test_a_similarity_of_another_range_is_no_error(api):
    """The slider may have been let go before the results came that gave it another range."""
    assert api.call("search_item", "a/001.png", *FILTERS, session="slider")[0]
    for limit in (-1, 1):
        done, answer = api.call("search", limit, *FILTERS, session="slider")
        assert done and ("3 nearest" if limit < 0 else "Nothing found") in answer
    assert "Nothing found" in api.call("filtered", *FILTERS, session="slider")[1]  # the limit stays
    assert "3 nearest" in api.call("search_item", "b/002.png", *FILTERS, session="slider")[1]  # until another query
    for limit in ("x", None, [1]):
        done, answer = api.call("search", limit, *FILTERS, session="slider")
        assert "nearest" not in answer or limit is None


def test_the_last_event_counts_though_an_earlier_one_is_slow(place, monkeypatch):
    """A click in a picture ends the writing of a text, too: two searches at a time, of which the click is the last."""
    client_of = pytest.importorskip("gradio_client").Client
    page = open_page(place / "index")
    search, begun = page.search, threading.Event()

    def slow(query, *arguments):
        if query is None:
            begun.set()
            time.sleep(1)
        return search(query, *arguments)

    blocks = launch(page, block=False)
    try:
        monkeypatch.setattr(page, "search", slow)
        client = client_of(blocks.local_url, verbose=False)
        first = client.submit(*FILTERS, api_name="/filtered")
        assert begun.wait(20)
        last = client.submit("a/001.png", *FILTERS, api_name="/search_item")
        assert "click one to search with it" in str(first.result(60))
        assert "nearest to `a/001.png`" in str(last.result(60))
        assert "nearest to `a/001.png`" in str(client.predict(*FILTERS, api_name="/filtered"))
    finally:
        blocks.close()


def test_no_event_is_dropped_or_put_off(place):
    """Of any; Gradio's page drops those that come while one of the same kind is pending, or sends them later."""
    gr = pytest.importorskip("gradio")
    blocks = build_page(open_page(place / "index"))
    page = blocks.get_config_file()
    (status,) = [part["id"] for part in page["components"] if part["props"].get("elem_id") == "status"]
    events = [event for event in page["dependencies"] if event["backend_fn"]]
    assert len(events) == 10
    assert {(event["trigger_mode"], tuple(event["show_progress_on"])) for event in events} == {("multiple", (status,))}
    assert {blocks.fns[event["id"]].concurrency_id for event in events} == {"turns"}
    sliders = {part._id for part in blocks.blocks.values() if isinstance(part, gr.Slider) and part.minimum == -1}
    assert [event["api_name"] for event in events if sliders & set(event["inputs"])] == ["search"]


def test_a_field_that_is_left_as_it_was_changes_nothing(api):
    assert "3 nearest" in api.call("search_item", "a/001.png", *FILTERS, session="left")[1]
    done, answer = api.call("left", *FILTERS, session="left")
    assert done and "nearest" not in answer and "<figure" not in answer
    done, answer = api.call("left", 3, "b/", "", "tuned", session="left")
    assert done and "nearest to `a/001.png`" in answer and "b/00" in answer


def test_images_of_items_and_no_others_have_addresses(api, place):
    root = api.address.removesuffix("gradio_api/")

    def get(kind, name):
        try:
            with urllib.request.urlopen(f"{root}item/{kind}?{urllib.parse.urlencode({'id': name})}") as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    status, headers, content = get("original", "a/001.png")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    assert content == (place / "images" / "a" / "001.png").read_bytes()
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert get("thumbnail", "a/001.png")[0] == 200
    Image.new("RGB", (8, 8)).save(place / "images" / "a" / "not_indexed.png")
    others = ["a/not_indexed.png", "../index/index.json", str(place / "images" / "a" / "001.png"), "", "a", "\0",
              "./a/001.png", "a/../a/001.png", "/etc/passwd"]  # fmt: skip
    for name in others:
        for kind in ("original", "thumbnail"):
            status, _, content = get(kind, name)
            assert status == 404
            assert str(place) not in content.decode()
    assert get("original?x=", "a/001.png")[0] in (404, 422)


def test_uploads_are_limited(api):
    status, answer = api.upload(b"x" * 150_000)
    assert status == 413
    assert b"exceeded" in answer


def test_images_are_limited(api, tmp_path):
    path = tmp_path / "wide.png"
    Image.new("RGB", (200, 51)).save(path)
    done, answer = api.call("search_file", {"path": api.upload(path.read_bytes())[1][0]}, *FILTERS)
    assert done
    assert "has 0.0102 megapixels, expected at most 0.01" in answer
    done, answer = api.call("search_file", {"path": api.upload(b"no image")[1][0]}, *FILTERS)
    assert done
    assert "can't read this image" in answer


def test_no_other_file_is_opened_after_an_error(api, tmp_path):
    secret = write_image(tmp_path / "secret.png")
    for content in (b"no image", secret.read_bytes()):
        assert api.call("search_file", {"path": api.upload(content)[1][0]}, *FILTERS)[0]
        done, answer = api.call("search_file", {"path": str(secret)}, *FILTERS)
        assert not done and "This file was not uploaded here." in answer


def test_limits_of_the_page(place, tmp_path, monkeypatch):
    page = open_page(place / "index", max_megapixels=1)
    path = tmp_path / "bomb.png"
    Image.new("1", (2000, 501)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    found = page.search(("image", str(path)), 3, "", -1)
    assert found.status == "**This query can't be searched:** bomb.png has 1.002 megapixels, expected at most 1"
    assert found.panels == {}
    monkeypatch.undo()
    for k in (0, 101, 10**9):
        assert "number of results must be in 1..100" in page.search(("id", "a/001.png"), k, "", -1).status
    for options, name in (
        ({"max_megapixels": 0}, "max_megapixels"),
        ({"max_megapixels": float("nan")}, "max_megapixels"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            open_page(place / "index", **options)
    with pytest.raises(ValueError, match="max_upload_mb must be > 0, got 0"):
        launch(page, max_upload_mb=0)


# ---- What names do


def rendered(markdown):
    """Types and texts of what CommonMark (with GitHub's tables, links and strikethrough) makes of it."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    blocks = parser.parse(markdown)
    inline = [token for block in blocks if block.type == "inline" for token in block.children]
    return [block.type for block in blocks], inline


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_code_and_nothing_else(name):
    blocks, inline = rendered(f"Found {code_span(name)} here.")
    assert blocks == ["paragraph_open", "inline", "paragraph_close"]
    assert [token.type for token in inline] == ["text", "code_inline", "text"]
    expected = "".join(c if c.isprintable() or c == " " else " " for c in name)
    assert inline[1].content.split() == expected.split()
    assert (inline[0].content, inline[2].content) == ("Found ", " here.")


@pytest.mark.parametrize("name", NASTY)
def test_a_text_is_text_and_nothing_else(name):
    blocks, inline = rendered(f"**Error:** {plain_text(name)} here.")
    assert blocks == ["paragraph_open", "inline", "paragraph_close"]
    assert {token.type for token in inline} <= {"text", "text_special", "strong_open", "strong_close"}
    shown = "".join(token.content for token in inline)
    assert shown.split() == f"Error: {''.join(c if c.isprintable() or c == ' ' else ' ' for c in name)} here.".split()
    # what GitHub and marked make links of, beyond CommonMark
    assert not any(word in plain_text(name) for word in ("http://", "www.a", "a@b"))


def test_names_on_the_page(place):
    page = page_of(place, NASTY)
    for name in NASTY:
        for status in (
            page.search(("id", name), 3, "", -1).status,
            page.search(("id", name), 3, "there is no such text", -1).status,
        ):
            blocks, inline = rendered(status)
            assert blocks == ["paragraph_open", "inline", "paragraph_close"]
            assert [token.type for token in inline] == ["text", "code_inline", "text"]
    for status in (page.search(("id", f"{name}?"), 3, "", -1).status for name in NASTY):
        assert "can't be searched" in status
        assert {token.type for token in rendered(status)[1]} <= {"text", "text_special", "strong_open", "strong_close"}


@pytest.mark.parametrize("name", NASTY)
def test_names_on_cards(name):
    """What an HTML parser makes of a card: the texts, and no element or attribute that isn't the card's own."""
    columns = {"class_name": name, f"sku{name}": name, "title": "", "price": "9.99"}
    parser = Elements()
    parser.feed(card(Hit(name, 0.5, columns)))
    tags = [tag for tag, _ in parser.found]
    assert tags == ["figure", "button", "img", "figcaption", "span", "b", "span", "span", "span", "a"]
    allowed = {"class", "type", "data-id", "title", "src", "loading", "alt", "href", "target", "rel"}
    assert all({key for key, _ in attributes} <= allowed for _, attributes in parser.found)
    (link,) = (dict(attributes)["href"] for tag, attributes in parser.found if tag == "a")
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(link).query, keep_blank_values=True)["id"] == [name]
    assert link.startswith("item/original?id=")
    assert dict(parser.found[1][1])["data-id"] == name
    shown = "".join(parser.texts)
    assert f"· {name}" in shown and f"sku{name}: {name}" in shown and "price: 9.99" in shown
    assert "title:" not in shown


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))

    def handle_data(self, data):
        self.texts.append(data)


def test_formulas_are_looked_for_nowhere(place):
    gradio = pytest.importorskip("gradio")

    blocks = build_page(open_page(place / "index"))
    shown = [block for block in blocks.blocks.values() if isinstance(block, gradio.Markdown)]
    assert len(shown) == 2
    assert all(block.latex_delimiters == [] and block.sanitize_html for block in shown)


def test_the_models_name_on_the_page(place):
    gradio = pytest.importorskip("gradio")

    page = open_page(place / "index")
    page.index.info.model = {**page.index.model, "name": "runs/![x](http:\\a.b)"}
    title = next(b for b in build_page(page).blocks.values() if isinstance(b, gradio.Markdown)).value
    assert rendered(title)[0][:3] == ["heading_open", "inline", "heading_close"]
    assert {token.type for token in rendered(title)[1]} <= {"text", "text_special"}


def test_the_report_shows_names_as_they_are(tmp_path):
    from vptsp.search.report import comparison_table, metrics_table

    model = {"name": "![x](http://a.b)`", "kind": "retriever", "fingerprint": "f" * 64}
    data = {"queries": {"description": "images in `<b>_x_", "images": 3, "skipped": 0}}
    for text in (
        metrics_table({"model": model, "data": data, "metrics": {"nmi": 0.5}}),
        comparison_table({"first": model, "second": model, "data": data, "resample": "classes", "comparison": {}}),
    ):
        assert {token.type for token in rendered(text)[1]} <= {"text", "code_inline", "softbreak"}


# ---- Where a Space is written


@pytest.mark.parametrize(
    "name",
    [
        "../../x.png",
        "../images/a/000.png",
        "a/../a/000.png",
        "a/../../images/a/000.png",
        "a//000.png",
        "./a/000.png",
        "/x.png",
    ],
)
def test_a_space_is_written_into_its_folder_alone(place, tmp_path, name):
    page = page_of(place, ["a/001.png", name])
    before = sorted(place.rglob("*"))
    with pytest.raises(DataError, match=r"the id .* leads out of|no plain path below"):
        write_space(tmp_path / "deep" / "space", page.index, None)
    assert list(tmp_path.iterdir()) == []
    assert sorted(place.rglob("*")) == before


def test_nothing_is_written_where_an_image_is_missing(place, tmp_path):
    with pytest.raises(DataError, match="is missing"):
        write_space(tmp_path / "space", page_of(place, ["a/001.png", "absent.png"]).index, None)
    assert list(tmp_path.iterdir()) == []
