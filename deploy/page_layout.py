"""The search page as Gradio shows it: controls, cards of results, and the addresses of their images."""

from __future__ import annotations

import html
import io
import math
import os
from pathlib import Path
from urllib.parse import quote

from vptsp.data_scripts.data_errors import DataError, ImageError
from vptsp.data_scripts.images import open_image
from vptsp.eval.markdown import plain_text

from .page_content import CLASS_COLUMN, MAX_RESULTS, THUMBNAIL, TUNED, VIEWS, shown_name, small_copy


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

MAX_UPLOAD_MB = 20.0
RESULTS = 12
_CSS = (Path(__file__).parent / "search_page.css").read_text(encoding="utf-8")
# Gradio hands a click's data to Python alone, and only from a browser; the API is to take an id
_CLICK = """
element.addEventListener('click', event => {
    const card = event.target.closest('button[data-id]');
    if (!card) return;
    element.ownerDocument.pickedItem = card.dataset.id;
    trigger('click');
    const shown = element.ownerDocument.querySelector(innerWidth < 700 ? '#status' : '#title');
    if (shown) shown.scrollIntoView({behavior: 'smooth'});
});
"""
# On a phone the results come below the controls
_NARROW = "() => { if (innerWidth < 700) document.querySelector('#filters > button').click() }"
_PICKED = "(_, ...rest) => [document.pickedItem, ...rest]"


def card(hit, is_query=False):
    """HTML of an item: picture, similarity, class, file, other columns, and a link to the original."""
    link, name = quote(hit.id, safe=""), html.escape(hit.id)
    columns = {column: str(value) for column, value in hit.metadata.items() if value not in ("", None)}
    lines = []
    head = [] if math.isnan(hit.similarity) or is_query else [f"<b>{hit.similarity:.3f}</b>"]
    if label := columns.pop(CLASS_COLUMN, ""):
        head.append(html.escape(label))
    if head:
        lines.append(f'<span class="head">{" · ".join(head)}</span>')
    lines.append(f'<span class="file" title="{name}">{html.escape(Path(hit.id).name)}</span>')
    lines += [f"<span>{html.escape(column)}: {html.escape(value)}</span>" for column, value in columns.items()]
    lines.append(f'<a href="item/original?id={link}" target="_blank" rel="noopener">original</a>')
    picture = f'<img src="item/thumbnail?id={link}" loading="lazy" alt="{name} can’t be read">'
    if not is_query:
        picture = f'<button type="button" data-id="{name}" title="Search with {name}">{picture}</button>'
    return f'<figure class="card">{picture}<figcaption>{"".join(lines)}</figcaption></figure>'


def cards(found):
    """HTML of all that was found: a panel of cards, or two side by side."""
    panels = []
    for heading, hits in found.panels.items():
        title = f"<h2>{html.escape(heading)}</h2>" if heading else ""
        panels.append(f'<section class="panel">{title}<div class="cards">{"".join(map(card, hits))}</div></section>')
    return f'<div class="panels">{"".join(panels)}</div>'


def uploaded_file(payload):
    """Path of the file that a payload names, if Gradio has put it where it puts uploads.

    Gradio itself checks this only for payloads that say they are files, and whoever calls its API need not say so.

    Args:
        payload: Gradio's `ImageData`, or None.

    Raises:
        gradio.Error: any other file, also by a link.
    """
    import gradio as gr
    from gradio.utils import get_upload_folder

    if payload is None:
        return None
    try:
        path, uploads = Path(payload.path).resolve(), Path(get_upload_folder()).resolve()
    except (TypeError, ValueError, OSError):
        path = uploads = Path()
    if uploads not in path.parents or not path.is_file():
        raise gr.Error("This file was not uploaded here.", print_exception=False)
    return str(path)


class _Session:
    """What one visitor has asked for: kept in Gradio's state, as a dict of plain values.

    `query` and the queries before it (`history`), the page in browsing, the smallest similarity that was asked for
    (`limit`, or None), the smallest value of the slider (`low`), and the filters of what is shown.
    """

    @staticmethod
    def new():
        return {"query": None, "history": [], "start": 0, "limit": None, "low": -1.0, "filters": None}

    @staticmethod
    def asks(state, query):
        return {**_Session.new(), "query": query, "history": [*state["history"], state["query"]]}


def build_page(page):
    """The Gradio page of a [`SearchPage`]."""
    import gradio as gr

    model = page.index.model["name"]
    markdown = {"latex_delimiters": []}  # formulas would be looked for inside of names
    with gr.Blocks(title="Image search", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        title = f"# Image search\n{len(page.index):,} images · {plain_text(Path(model).name or model)}"
        gr.Markdown(title, elem_id="title", **markdown)
        state, picked = gr.State(_Session.new()), gr.Textbox(visible=False)
        with gr.Row(elem_id="page"):
            with gr.Column(scale=1, min_width=260, elem_id="controls"):
                image = gr.Image(
                    label="Query",
                    sources=["upload", "clipboard"],
                    height=240,
                    buttons=[],
                    elem_id="query",
                )
                # The file as it was dropped, not decoded: the search says what is wrong with it
                image.preprocess = uploaded_file
                asked = gr.HTML(elem_id="asked", apply_default_css=False, visible=False)
                with gr.Row(elem_id="steps"):
                    back = gr.Button("← Back", size="sm", interactive=False, elem_id="back", min_width=80)
                    browse = gr.Button("Browse all", size="sm", elem_id="browse", min_width=80)
                text = gr.Textbox(label="Name, class or column contains", placeholder="all", elem_id="text")
                with gr.Accordion("Filters", open=True, elem_id="filters"):
                    choices = [("every photo", "")] + [
                        (f"best of each {shown_name(c)}", c) for c in page.index.columns
                    ]
                    one_per = gr.Dropdown(choices, value="", label="Show", elem_id="one_per", visible=len(choices) > 1)
                    view = gr.Radio(
                        list(VIEWS), value=TUNED, label="Model", elem_id="view", visible=page.backbone is not None
                    )
                    minimum = gr.Slider(
                        -1, 1, -1, step=0.001, label="Similarity at least", elem_id="minimum", interactive=False
                    )
                    count = gr.Slider(1, MAX_RESULTS, RESULTS, step=1, label="Results", elem_id="count")
            with gr.Column(scale=3, min_width=300):
                status = gr.Markdown(elem_id="status", **markdown)
                # `${value}` is put in as it is; `{{value}}` would be read as code
                results = gr.HTML(
                    elem_id="results", html_template="${value}", js_on_load=_CLICK, apply_default_css=False
                )
                with gr.Row(elem_id="pages"):
                    before = gr.Button("← Earlier", size="sm", visible=False, elem_id="before", min_width=80)
                    after = gr.Button("More →", size="sm", visible=False, elem_id="after", min_width=80)
        parts = {"image": image, "asked": asked, "state": state, "status": status, "results": results}
        parts |= {"minimum": minimum, "back": back, "before": before, "after": after}
        filters = [count, text, one_per, view]
        _connect(page, blocks, parts, filters, picked, browse)
    return blocks


def _connect(page, blocks, parts, filters, picked, browse):
    """Let the controls do what they are for."""
    import gradio as gr

    state, (count, text, one_per, view) = parts["state"], filters
    shown = [parts[name] for name in ("state", "status", "results", "minimum", "asked", "back", "before", "after")]

    def show(now, count, text, one_per, view):
        limit = now["limit"]
        found = page.search(
            now["query"], count, text or "", -1.0 if limit is None else limit, one_per, view, now["start"]
        )
        slider, low = _slider(gr, found, limit)
        has_more = bool(found.panels) and now["start"] + len(found.ids) < found.total
        return (
            {**now, "low": low, "filters": [count, text, one_per, view]},
            found.status,
            cards(found),
            slider,
            gr.HTML("" if found.query is None else card(found.query, is_query=True), visible=found.query is not None),
            gr.Button(interactive=bool(now["history"])),
            gr.Button(visible=now["start"] > 0),
            gr.Button(visible=has_more),
        )

    def search(now, *values):
        return show({**now, "start": 0}, *values)

    def search_changed(now, *values):
        # a field that is left as it was changes nothing, least of all results that are being clicked
        return gr.skip() if list(values) == now["filters"] else search(now, *values)

    def search_above(limit, now, *values):
        # at the slider's own end there is no limit, whatever range the next results have
        return search({**now, "limit": None if limit == now["low"] else limit}, *values)

    def search_file(path, now, *values):
        query = None if path is None else ("image", path)
        return _preview(page, query), *show(_Session.asks(now, query), *values)

    def search_item(name, now, *values):
        if not isinstance(name, str) or name not in page.index.present([name]):
            raise gr.Error(f"There is no item {name!r} in the index.", print_exception=False)
        query = ("id", name)
        return _preview(page, query), *show(_Session.asks(now, query), *values)

    def browse_all(now, *values):
        return None, *show(_Session.asks(now, None) if now["query"] else {**now, "start": 0}, *values)

    def go_back(now, *values):
        *history, query = now["history"] or [None]
        return _preview(page, query), *show({**_Session.new(), "query": query, "history": history}, *values)

    def turn(step):
        def turn_page(now, count, *values):
            start = max(now["start"] + step * int(count), 0) if now["query"] is None else 0
            return show({**now, "start": start}, count, *values)

        return turn_page

    minimum, image = parts["minimum"], parts["image"]
    blocks.load(None, js=_NARROW)
    # A click often makes two events, as a field loses the focus. One is done at a time, in their order: else both
    # would begin with the same state, and whichever ended last would undo what the other has found. None is dropped
    # or put off while another is pending: what is put off would be sent with what the other's answer has put into the
    # controls meanwhile. And only the status shows that something is pending: a cover over the results would take the
    # click that has begun.
    how = {"concurrency_id": "turns", "concurrency_limit": 1, "trigger_mode": "multiple"}
    how |= {"show_progress_on": parts["status"]}
    blocks.load(browse_all, [state, *filters], [image, *shown], api_name="start", **how)
    image.input(search_file, [image, state, *filters], [image, *shown], **how)
    parts["results"].click(search_item, [picked, state, *filters], [image, *shown], js=_PICKED, **how)
    browse.click(browse_all, [state, *filters], [image, *shown], **how)
    parts["back"].click(go_back, [state, *filters], [image, *shown], **how)
    parts["before"].click(turn(-1), [state, *filters], shown, api_name="earlier", **how)
    parts["after"].click(turn(1), [state, *filters], shown, api_name="more", **how)
    changes = [text.submit, count.release, one_per.input, view.input]
    gr.on(changes, search, [state, *filters], shown, api_name="filtered", **how)
    text.blur(search_changed, [state, *filters], shown, api_name="left", **how)
    # Gradio would refuse a value outside of the slider's range, and each query has a range of its own, which may have
    # changed since the slider was let go: so the slider is an input of this alone, and not checked
    minimum.release(search_above, [minimum, state, *filters], shown, api_name="search", preprocess=False, **how)


def _slider(gr, found, limit):
    """The slider over the similarities that occur, and its smallest value."""
    if found.low is None:
        return gr.Slider(-1, 1, -1, interactive=False), -1.0
    low, high = math.floor(1000 * found.low) / 1000, math.ceil(1000 * found.high) / 1000
    value = low if limit is None else min(max(limit, low), high)
    return gr.Slider(low, max(high, low + 0.001), value, interactive=True), low


def _preview(page, query):
    """Small copy of the query, since a browser may not show files of its kind."""
    if query is None:
        return None
    if query[0] == "id":
        return page.thumbnail(query[1])
    try:
        return small_copy(page.open_query(query[1]))
    except ImageError:  # the search says what is wrong with it
        # A value, never an update: Gradio would go on with an image component that has lost its `preprocess`
        return None


def add_item_routes(app, page):
    """Addresses of the items' images: of those that are in the index, and of no other file."""
    from fastapi.responses import FileResponse, JSONResponse, Response

    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=3600"}

    def encoded(image, kind):
        stream = io.BytesIO()
        image.save(stream, kind, quality=88)
        return Response(stream.getvalue(), media_type=f"image/{kind.lower()}", headers=headers)

    def answer(name, respond):
        try:
            if name not in page.index.present([name]):
                return JSONResponse({"error": "there is no such item"}, 404)
            return respond()
        except (ImageError, DataError, ValueError):  # their texts name folders of this machine
            return JSONResponse({"error": "the image of this item can't be read"}, 404)

    def thumbnail(id: str):
        def respond():
            image = page.small_copy(id)
            return encoded(image, "PNG" if max(image.size) < THUMBNAIL else "JPEG")

        return answer(id, respond)

    def original(id: str):
        def respond():
            kind, path = page.original(id)
            if kind is None:
                return encoded(open_image(page.image_path(id)), "PNG")
            return FileResponse(path, media_type=kind, headers=headers)

        return answer(id, respond)

    for name, endpoint in (("thumbnail", thumbnail), ("original", original)):
        app.add_api_route(f"/item/{name}", endpoint, methods=["GET"], response_model=None)


def launch(page, host="127.0.0.1", port=None, share=False, max_upload_mb=MAX_UPLOAD_MB, block=True):
    """Serve the page until it is interrupted.

    Args:
        page: [`SearchPage`].
        host, port, share: As of the command.
        max_upload_mb: Size of an upload at most, in 10^6 bytes.
        block: False returns at once, and the page is served until its `close`.

    Returns:
        The `gradio.Blocks`.

    Raises:
        ValueError: max_upload_mb is not positive.
    """
    import gradio as gr

    if not max_upload_mb > 0:
        raise ValueError(f"max_upload_mb must be > 0, got {max_upload_mb}")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to be fetched
    blocks = build_page(page)
    app, _, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", **fonts),
        css=_CSS,
        max_file_size=round(max_upload_mb * 1e6),
        prevent_thread_lock=True,
    )
    add_item_routes(app, page)
    if block:
        blocks.block_thread()
    return blocks


__all__ = ["MAX_UPLOAD_MB", "add_item_routes", "build_page", "card", "cards", "launch", "uploaded_file"]
