"""The search page as a folder to push as a Hugging Face Space."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from vptsp._version import __version__
from vptsp.data_scripts.data_errors import DataError
from vptsp.files.atomic import write_json
from vptsp.files.locks import LOCK_FILE
from vptsp.files.marks import SPACE_FILE

from .page_content import SearchPage


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
            raise DataError(f"write_space: the id {name!r} is no plain path below {page.roots[0]}")
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


__all__ = ["write_space"]
