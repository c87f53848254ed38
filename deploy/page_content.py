"""What the search page does, without the page: which items it shows, and which files it opens."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vptsp.data_scripts.data_errors import DataError, ImageError
from vptsp.data_scripts.images import image_errors, open_header, open_image
from vptsp.eval.markdown import code_span, plain_text


THUMBNAIL = 320
MAX_RESULTS = 100
MAX_MEGAPIXELS = 50.0
CLASS_COLUMN = "class_name"
TUNED, BACKBONE, BOTH = VIEWS = ("tuned", "backbone alone", "side by side")
_MISSING = (225, 225, 225)
# Kinds of files that browsers show; others are converted. MPO begins with a JPEG.
_SHOWN_TYPES = {
    "AVIF": "image/avif",
    "BMP": "image/bmp",
    "GIF": "image/gif",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
}


@dataclass(frozen=True)
class Found:
    """What is to be shown.

    Attributes:
        status: What it is, in Markdown.
        panels: Heading -> items ([`Hit`]), one panel or two side by side.
        query: The item that was the query ([`Hit`]), if it was one.
        low, high: Smallest and largest similarity that occur before the slider's limit; None without a query.
        total: Items there are to browse; 0 with a query.
    """

    status: str
    panels: dict[str, list] = field(default_factory=dict)
    query: object = None
    low: float | None = None
    high: float | None = None
    total: int = 0

    @property
    def ids(self):
        """Ids of the first panel."""
        return [hit.id for hit in next(iter(self.panels.values()), [])]


class SearchPage:
    """What the page does, without the page.

    Args:
        index: `VectorIndex` with an embedder.
        image_root: Folder that the ids are relative to; None for the one that the index names.
        max_megapixels: Width times height of a query, in millions, at most: a small file may hold a huge image.
        backbone: `VectorIndex` of the same items as the backbone alone embeds them; None: there is no such view.

    Raises:
        DataError: there is no such folder, or the index names none.
        ValueError: max_megapixels is not positive.
    """

    def __init__(self, index, image_root=None, max_megapixels=MAX_MEGAPIXELS, backbone=None):
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
        self.max_megapixels = max_megapixels
        self.backbone = backbone

    # ---- Files

    def image_path(self, name):
        """File of an item, inside the folder of its images whatever its id says.

        Links below the root are followed, as they were when its images were listed; `..` and absolute ids are not.

        Raises:
            DataError: the id leads out of it, or the index doesn't know where it is.
        """
        known = not self.given_root and self.index.present([name])
        path = self.index.image_path(name) if known else self.roots[0] / name
        if path is None:
            raise DataError(f"the index doesn't say where {name!r} is: give --image_root")
        path = Path(os.path.normpath(path))
        if not set(self.roots) & set(path.parents):
            raise DataError(f"the id {name!r} leads out of {', '.join(map(str, self.roots))}")
        return path

    def small_copy(self, name):
        """Small copy of an item's image.

        Raises:
            ImageError: it can't be read.
            DataError: its id leads out of `image_root`.
        """
        return small_copy(open_image(self.image_path(name)))

    def thumbnail(self, name):
        """Small copy of an item's image, a grey square where its file can't be read."""
        try:
            return self.small_copy(name)
        except (ImageError, DataError):
            return Image.new("RGB", (THUMBNAIL, THUMBNAIL), _MISSING)

    def original(self, name):
        """An item's file, as a browser can show it.

        Returns:
            Type, such as `image/jpeg`, and the file's path; None for both where no browser shows such a file.

        Raises:
            ImageError: it can't be read.
            DataError: its id leads out of `image_root`.
        """
        path = self.image_path(name)
        with image_errors(name), open_header(str(path)) as image:
            kind = _SHOWN_TYPES.get(image.format)
        return (None, None) if kind is None else (kind, path)

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

    # ---- Items

    def search(self, query, k, text="", minimum=-1.0, one_per=None, view=TUNED, start=0):
        """The neighbours of a query; without one, the items to browse.

        Args:
            query: `("image", path)` or `("id", id)`; None to browse.
            k: Results at most, 1 to 100.
            text: Only items with this text in their name, class or another column; empty for all.
            minimum: Smallest similarity.
            one_per: A column: only the best item of each of its values; None or empty: all.
            view: One of `VIEWS`.
            start: Items to pass over, in browsing.

        Returns:
            [`Found`]; of a query that can't be searched, its status says why.
        """
        try:
            self._check(k, minimum, view)
            if query is None:
                return self._browse(int(k), text.strip(), one_per or None, start)
            return self._search(query, int(k), text.strip(), minimum, one_per or None, view)
        except (ImageError, ValueError) as error:
            return Found(f"**This query can't be searched:** {plain_text(error)}")

    def _check(self, k, minimum, view):
        numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in (k, minimum))
        if not numbers or not 1 <= k <= MAX_RESULTS:
            raise ValueError(f"the number of results must be in 1..{MAX_RESULTS} and the similarity a number, got "
                             f"{k!r} and {minimum!r}")  # fmt: skip
        if view not in VIEWS or (view != TUNED and self.backbone is None):
            raise ValueError(f"there is no view {view!r}")

    def _browse(self, k, text, one_per, start):
        items, total = self.index.list_items(k, start, containing=text or None, one_per=one_per)
        if not items:
            return Found("Nothing passes the filter." if start == 0 else "There is no more.", total=total)
        of = f" of {total:,}" if total > len(items) else ""
        which = f"{start + 1:,}–{start + len(items):,}" if total > len(items) else f"{total:,}"
        what = "images" if one_per is None else f"images, one for each {plain_text(shown_name(one_per))}"
        if text:
            what += f" with {code_span(text)}"
        return Found(f"{which}{of} {what}. Drop an image, or click one to search with it.", {"": items}, total=total)

    def _search(self, query, k, text, minimum, one_per, view):
        kind, value = query
        image = self.open_query(value) if kind == "image" else None
        item = self._item(value) if kind == "id" else None
        panels, similarities = {}, []
        for name, index in ((TUNED, self.index), (BACKBONE, self.backbone)):
            if view in (name, BOTH):
                search, asked = (index.search_ids, value) if image is None else (index.search_images, image)
                hits = search([asked], k, containing=text or None, group_by=one_per)[0]
                similarities += [hit.similarity for hit in hits]
                panels[name] = [hit for hit in hits if hit.similarity >= minimum]
        shown = "your image" if kind == "image" else code_span(value)
        low, high = (min(similarities), max(similarities)) if similarities else (None, None)
        if not any(panels.values()):
            return Found(f"Nothing found for {shown} that passes the filters.", query=item, low=low, high=high)
        count = len(panels[TUNED if view == BOTH else view])
        status = f"{count} nearest to {shown}. Click one to search on."
        if view == BOTH:
            status = f"Nearest to {shown}, found by the tuned model and by its backbone alone. Click one to search on."
        headed = {self._heading(name, hits, item, view): hits for name, hits in panels.items()}
        return Found(status, headed, item, low, high)

    def _item(self, name):
        """The item of an id, with its columns."""
        return self.index.find_items([name])[0]

    def _heading(self, name, hits, item, view):
        wanted = None if item is None else item.metadata.get(CLASS_COLUMN)
        found = sum(hit.metadata.get(CLASS_COLUMN) == wanted for hit in hits)
        shares = f"{found} of {len(hits)} are of its class" if wanted else ""
        return " · ".join(filter(None, ("" if view == TUNED else name, shares)))


def shown_name(column):
    """What a column is called on the page."""
    return "class" if column == CLASS_COLUMN else column


def small_copy(image):
    """An image at the size of the page's; tiny ones enlarged with sharp pixels, which the browser would blur."""
    if max(image.size) < THUMBNAIL // 2:
        scale = THUMBNAIL // max(image.size)
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


__all__ = [
    "BACKBONE",
    "BOTH",
    "CLASS_COLUMN",
    "MAX_MEGAPIXELS",
    "MAX_RESULTS",
    "THUMBNAIL",
    "TUNED",
    "VIEWS",
    "Found",
    "SearchPage",
    "shown_name",
    "small_copy",
]
