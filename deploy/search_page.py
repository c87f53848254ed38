"""The search page: drop an image, see the most similar ones of an index, filter them, click one to search on.

    vptsp app --index runs/photos/index
    vptsp app --index runs/photos/index --write_space my_space    # a folder to push as a Hugging Face Space

It needs Gradio (extra `app`) and, once running, no network. Pictures are sent as small copies; nothing is ever read
but files inside the index's `image_root`, and what was uploaded.
"""

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vptsp._version import __version__
from vptsp.data_scripts.data_errors import DataError, ImageError
from vptsp.data_scripts.images import image_errors, open_header, open_image
from vptsp.eval.markdown import code_span, plain_text
from vptsp.files.atomic import write_json
from vptsp.files.locks import LOCK_FILE
from vptsp.files.marks import SPACE_FILE


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

THUMBNAIL = 320
NUM_SAMPLES = 18
MAX_RESULTS = 100
MAX_UPLOAD_MB = 20.0
MAX_MEGAPIXELS = 50.0
_MISSING = (225, 225, 225)
_CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
.gradio-container main { width: 100%; }
#results .grid-wrap { height: auto; max-height: none; }
#results .thumbnail-item.selected:not(:hover) { border-color: var(--border-color-primary); box-shadow: none; }
#results .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; height: 100%; }
#results .thumbnail-item img { aspect-ratio: 1; height: auto; }
#results .caption-label {
    position: static; max-width: 100%; border: none; background: none;
    font-size: 0.8rem; line-height: 1.25; white-space: normal; text-align: left; opacity: 1;
}
@media (max-width: 700px) {
    #page { flex-direction: column; }
    #results .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
"""


class SearchPage:
    """What the page does, without the page.

    Args:
        index: `VectorIndex` with an embedder.
        image_root: Folder that the ids are relative to; None for the one that the index names.
        max_megapixels: Width times height of a query, in millions, at most: a small file may hold a huge image.

    Raises:
        DataError: there is no such folder, or the index names none.
        ValueError: max_megapixels is not positive.
    """

    def __init__(self, index, image_root=None, max_megapixels=MAX_MEGAPIXELS):
        if not max_megapixels > 0:
            raise ValueError(f"max_megapixels must be > 0, got {max_megapixels}")
        roots = [image_root] if image_root else [index.image_root, *(source["root"] for source in index.sources)]
        roots = dict.fromkeys(root for root in roots if root is not None)
        if not roots:
            raise DataError("the index doesn't say where its images are: give --image_root")
        for root in roots:
            if not Path(root).is_dir():
                raise DataError(f"image_root: there is no folder {root}; give --image_root")
        self.index = index
        self.given_root = image_root
        self.roots = [Path(root).absolute() for root in roots]
        self.root = self.roots[0]
        self.max_megapixels = max_megapixels

    def image_path(self, name):
        """File of an item, inside the folder of its images whatever its id says.

        Links below the root are followed, as they were when its images were listed; `..` and absolute ids are not.

        Raises:
            DataError: the id leads out of it, or the index doesn't know where it is.
        """
        known = not self.given_root and self.index.present([name])
        path = self.index.image_path(name) if known else self.root / name
        if path is None:
            raise DataError(f"the index doesn't say where {name!r} is: give --image_root")
        path = Path(os.path.normpath(path))
        if not set(self.roots) & set(path.parents):
            raise DataError(f"the id {name!r} leads out of {', '.join(map(str, self.roots))}")
        return path

    def thumbnail(self, name):
        """Small copy of an item's image, a grey square where its file can't be read."""
        try:
            image = open_image(self.image_path(name))
        except (ImageError, DataError):
            return Image.new("RGB", (THUMBNAIL, THUMBNAIL), _MISSING)
        if max(image.size) < THUMBNAIL // 2:  # the browser would blur the pixels of a tiny image
            scale = THUMBNAIL // max(image.size)
            return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image

    def open_query(self, path):
        """Image of an uploaded file.

        Raises:
            ImageError: it can't be read, or has too many pixels.
        """
        name = Path(path).name
        with image_errors(name), open_header(path) as image:  # reads the size, no pixels
            megapixels = image.width * image.height / 1e6
        if megapixels > self.max_megapixels:
            raise ImageError(f"{name} has {megapixels:.4g} megapixels, expected at most {self.max_megapixels:g}")
        return open_image(path, name=name)

    def samples(self):
        """What is shown before there is a query: some items of the index. Status, pictures with captions, ids."""
        names = self.index.sample_ids(NUM_SAMPLES)
        pictures = [(self.thumbnail(name), name.removesuffix(Path(name).suffix)) for name in names]
        return f"Drop an image, or click one of these to search the {len(self.index):,} images.", pictures, names

    def search(self, query, k, text, minimum):
        """The neighbours of a query.

        Args:
            query: `("image", path)` or `("id", id)`; None for the samples.
            k: Results at most, 1 to 100.
            text: Only items with this text in their name or class; empty for all.
            minimum: Smallest similarity.

        Returns:
            Status, pictures with captions, ids.
        """
        if query is None:
            return self.samples()
        kind, value = query
        try:
            if not 1 <= k <= MAX_RESULTS:
                raise ValueError(f"the number of results must be in 1..{MAX_RESULTS}, got {k}")
            if kind == "image":
                hits = self.index.search_images([self.open_query(value)], int(k), containing=text.strip())[0]
            else:
                hits = self.index.search_ids([value], int(k), containing=text.strip())[0]
        except (ImageError, ValueError) as error:
            return f"**This query can't be searched:** {plain_text(error)}", [], []
        hits = [hit for hit in hits if hit.similarity >= minimum]
        shown = "your image" if kind == "image" else code_span(value)
        if not hits:
            return f"Nothing found for {shown} that passes the filters.", [], []
        pictures = [(self.thumbnail(hit.id), caption(hit)) for hit in hits]
        return f"{len(hits)} nearest to {shown}. Click one to search on.", pictures, [hit.id for hit in hits]


def caption(hit):
    """Similarity and class (or name) of a result, as plain text: Gradio shows captions so."""
    return f"{hit.similarity:.3f} · {hit.metadata.get('class_name') or Path(hit.id).stem}"


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
        raise gr.Error("This file was not uploaded here.")
    return str(path)


def build_page(page):
    """The Gradio page of a [`SearchPage`]."""
    import gradio as gr

    model = page.index.model["name"]
    markdown = {"latex_delimiters": []}  # formulas would be looked for inside of names
    with gr.Blocks(title="Image search", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        title = f"# Image search\n{len(page.index):,} images · {plain_text(Path(model).name or model)}"
        gr.Markdown(title, elem_id="title", **markdown)
        query, names = gr.State(None), gr.State([])
        with gr.Row(elem_id="page"):
            with gr.Column(scale=1, min_width=280):
                image = gr.Image(
                    label="Query",
                    sources=["upload", "clipboard"],
                    height=300,
                    buttons=[],
                    elem_id="query",
                )
                # The file as it was dropped, not decoded: the search says what is wrong with it
                image.preprocess = uploaded_file
                text = gr.Textbox(label="Name or class contains", placeholder="all", elem_id="text")
                minimum = gr.Slider(-1, 1, -1, step=0.01, label="Similarity at least", elem_id="minimum")
                count = gr.Slider(1, MAX_RESULTS, 12, step=1, label="Results", elem_id="count")
            with gr.Column(scale=3):
                status = gr.Markdown(elem_id="status", **markdown)
                results = gr.Gallery(
                    label="Neighbours",
                    show_label=False,
                    columns=6,
                    height="auto",
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="results",
                )
        filters, shown = [count, text, minimum], [status, results, names]

        def search_file(path, *filters):
            query = None if path is None else ("image", path)
            return query, *page.search(query, *filters)

        def search_item(event: gr.SelectData, names, *filters):
            query = ("id", names[event.index])
            return page.thumbnail(query[1]), query, *page.search(query, *filters)

        blocks.load(page.samples, outputs=shown)
        image.input(search_file, [image, *filters], [query, *shown])
        results.select(search_item, [names, *filters], [image, query, *shown])
        gr.on(
            [text.submit, text.blur, minimum.release, count.release],
            page.search,
            [query, *filters],
            shown,
        )
    return blocks


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
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(primary_hue="blue", **fonts),
        css=_CSS,
        max_file_size=round(max_upload_mb * 1e6),
        prevent_thread_lock=not block,
    )
    return blocks


def write_space(folder, index, image_root):
    """A folder that is a Hugging Face Space: index, images, retriever, and the files that Spaces ask for.

    Args:
        folder: New or empty.
        index: `RetrievalIndex` with an embedder.
        image_root: Where the images are.

    Raises:
        DataError: the folder holds something, or an image of the index is missing or has an id that is no plain path
            below `image_root`. Nothing is written then.
    """
    import gradio

    from vptsp.search.index import RetrievalIndex

    folder, page = Path(folder), SearchPage(index, image_root)
    if not isinstance(index, RetrievalIndex):
        raise DataError("write_space: a Space holds its index, which must be a folder and not in Milvus")
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"write_space: {folder} must be a new or empty folder")
    sources = {name: page.image_path(name) for name in index.ids}
    for name, source in sources.items():
        if ".." in Path(name).parts or Path(os.path.normpath(name)).as_posix() != name:
            raise DataError(f"write_space: the id {name!r} is no plain path below {page.root}")
        if not source.is_file():
            raise DataError(f"write_space: the image {source} is missing")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPACE_FILE, {"vptsp": __version__})  # first: its copies are never taken for data
    for name, source in sources.items():
        target = folder / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    embedder, model = index.embedder, dict(index.model)
    if not embedder.backbone_only:  # a bare backbone stays where it is on the Hub
        local = Path(embedder.model.config.backbone or ".").is_dir()
        embedder.model.save_pretrained(folder / "model", save_backbone=local)
        embedder.preprocess.processor.save_pretrained(folder / "model")
        model["name"] = str(folder / "model")
    original = index.info
    try:
        root = str(folder / "images")
        sources = [{**source, "root": root, "prefix": ""} for source in original.sources]
        index.info = replace(original, model=model, image_root=root, sources=sources)
        index.save(folder / "index")
    finally:
        index.info = original
    (folder / "index" / LOCK_FILE).unlink()  # a Space is only read
    files = {
        "app.py": 'from vptsp.deploy.search_page import main\n\n\nmain(["--index", "index", "--host", "0.0.0.0"])\n',
        "requirements.txt": f"vptsp[app]=={__version__}\n",
        "README.md": "---\ntitle: Image search\nemoji: 🔎\ncolorFrom: blue\ncolorTo: gray\nsdk: gradio\n"
        f"sdk_version: {gradio.__version__}\napp_file: app.py\n---\n\n"
        "Images found by a VPTSP retriever (semantic proxies from visual prompts).\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def open_page(index, model=None, image_root=None, max_megapixels=MAX_MEGAPIXELS, backbone=None):
    """The [`SearchPage`] of an index, with the model that the index or `model` names, on the backbone that that names.

    Raises:
        DataError: an index, model or folder is not there, or nobody says which it is.
        IndexMismatchError: the model is not the one that made the embeddings.
    """
    from vptsp.search.embedder import Embedder
    from vptsp.search.open_index import open_index

    opened = open_index(index)
    name = model or (opened.model or {}).get("name")
    if name is None:
        raise DataError(f"{index} doesn't say which model made its embeddings: give --model")
    page = SearchPage(opened, image_root, max_megapixels)
    opened.use_embedder(Embedder.from_pretrained(name, backbone=backbone))
    return page


def main(words=None):
    """Entry point; exit status 2 and one line on stderr where something is not what it should be."""
    parser = argparse.ArgumentParser(
        prog="vptsp app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True, help="what `vptsp index` wrote")
    parser.add_argument("--model", help="folder or Hub name of the model, where it isn't where the index says")
    parser.add_argument("--backbone", help="folder or Hub name of its backbone, where it isn't where the model says")
    parser.add_argument("--image_root", help="folder of the images, where it isn't where the index says")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default this machine)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="make a temporary public address, through Gradio's servers"
    )
    parser.add_argument(
        "--max_upload_mb",
        type=float,
        default=MAX_UPLOAD_MB,
        help="size of an upload at most, in megabytes (default 20)",
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        help="width times height of a query at most, in millions (default 50)",
    )
    parser.add_argument("--write_space", metavar="FOLDER", help="write a Hugging Face Space instead of serving")
    args = parser.parse_args(words)
    try:
        page = open_page(args.index, args.model, args.image_root, args.max_megapixels, args.backbone)
        if args.write_space is None:
            launch(page, args.host, args.port, args.share, args.max_upload_mb)
        else:
            write_space(args.write_space, page.index, args.image_root)
            print(f"{args.write_space}: {len(page.index):,} images; see docs/app.md for how to push it")
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
