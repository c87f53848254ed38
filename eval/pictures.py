"""Pictures of what a retriever finds: queries with their nearest neighbours; and what all pictures share.

matplotlib is imported where it is used, and draws straight to a file: no display and no global state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


CORRECT_COLOUR, WRONG_COLOUR, QUERY_COLOUR = "#1a8a4a", "#cc3311", "#333333"
CORRECT_SIGN, WRONG_SIGN = "✓", "✗"
GREY = "#666666"

# Okabe and Ito's colours, which people with any colour vision tell apart; without their yellow, too light for lines.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")

# Those of them that are installed step in for glyphs that matplotlib's own font lacks.
_MORE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "Hiragino Sans",
    "Malgun Gothic",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Arial Unicode MS",
)

_CELL, _GAP, _QUERY_GAP = 1.2, 0.14, 0.3  # inches: an image's side, the space between two, and after the query
_HEAD, _CAPTION, _MARGIN = 0.22, 0.42, 0.1  # column numbers, text under an image with a name of one line, border
_LINE, _TITLE_LINE = 0.13, 0.19  # of names, of titles
_SMALL_IMAGE = 64  # pixels; images no larger than this keep their pixels as squares


def choose_queries(query_labels, count, seed=0):
    """Queries for a picture: drawn at random, spread over the classes as evenly as they allow.

    Each class gives one query before any gives a second; which classes come first, and which of their items, follows
    from the seed.

    Args:
        query_labels: `(Q,)` integers: tensor, array or list.
        count: 1 <= count <= Q.
        seed: Of the draw.

    Returns:
        List of `count` different positions in `query_labels`.

    Raises:
        ValueError: query_labels isn't 1-D, or count is out of range.
    """
    labels = np.asarray(query_labels)
    if labels.ndim != 1:
        raise ValueError(f"query_labels must be 1-D, got shape {labels.shape}")
    if not 1 <= count <= len(labels):
        raise ValueError(f"count must be between 1 and the {len(labels)} queries, got {count}")
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in generator.permutation(np.unique(labels))]
    shuffled = [generator.permutation(members) for members in classes]
    rounds = max(map(len, shuffled))
    in_turn = (int(members[i]) for i in range(rounds) for members in shuffled if i < len(members))
    return [position for position, _ in zip(in_turn, range(count), strict=False)]


def new_figure(width, height, dpi=150):
    """An empty white figure, in inches, that belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes, title=None, xlabel=None, ylabel=None):
    """Give a chart the look that all of ours have: no box, a light grid, small type."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, color=GREY)
    axes.set_title(title, fontproperties=font(8.5, "bold"), loc="left")
    axes.set_xlabel(xlabel, fontproperties=font(8))
    axes.set_ylabel(ylabel, fontproperties=font(8))


def font(size, weight="normal"):
    """Type of some size, with what is installed for scripts that matplotlib's own font lacks."""
    from matplotlib.font_manager import FontProperties, fontManager

    installed = {entry.name for entry in fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
    return FontProperties(family=family, size=size, weight=weight)


def wrap(text, room, figure, properties):
    """Text in lines, none of them wider than `room` inches; nothing is left out."""
    renderer = figure.canvas.get_renderer()

    def too_wide(line):
        wide, _, _ = renderer.get_text_width_height_descent(line, properties, ismath=False)
        return wide > room * figure.dpi

    return _wrap(" ".join(str(text).split()), too_wide)


def save_figure(figure, path, palette=False):
    """Write a figure to a file whose suffix says how (`.png`, `.pdf`, `.svg`); its folder is made if need be.

    With `palette`, a PNG has 256 colours at most: dozens of small photographs then take a third of the space.

    Returns:
        The path, as `pathlib.Path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() != ".png" or not palette:
        figure.savefig(path)
        return path
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    if pixels.getcolors(256) is None:
        pixels = pixels.quantize(256)
    pixels.save(path, optimize=True, dpi=(figure.dpi, figure.dpi))
    return path


def save_neighbour_grid(
    path, query_images, neighbour_images, query_names, neighbour_names, similarity, correct, title=None, dpi=150
):
    """Draw queries (left) with their nearest neighbours (to the right, nearest first) into an image file.

    Neighbours of the query's class have a green frame and ✓, others a red frame and ✗. Under each stand its class, in
    as many lines as it takes, and its cosine similarity to the query. Images keep their shape, and small ones (such as
    scanned digits) are enlarged without blurring.

    Args:
        path: File to write; its suffix says how (`.png`, `.pdf`, `.svg`). Its folder is made if need be.
        query_images: Q images, each a PIL image or a uint8 array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)`.
        neighbour_images: Q lists of K images.
        query_names: Q class names.
        neighbour_names: Q lists of K class names.
        similarity: `(Q, K)` cosine similarities: tensor, array or lists.
        correct: `(Q, K)` booleans, whether the neighbour is of the query's class.
        title: Line above the grid.
        dpi: Pixels per inch of the written file.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        TypeError: an image is neither a PIL image nor a uint8 array.
        ValueError: there is no query or no neighbour, or the arguments differ in length.
    """
    similarity, correct = np.asarray(similarity, dtype=float), np.asarray(correct, dtype=bool)
    _check_grid(query_images, neighbour_images, query_names, neighbour_names, similarity, correct)
    rows, columns = similarity.shape
    names = [[query, *found] for query, found in zip(query_names, neighbour_names, strict=True)]
    grid = ImageGrid(names, columns + 1, title, dpi)
    grid.column_head(0, "query")
    for column in range(columns):
        grid.column_head(column + 1, str(column + 1))
    for row in range(rows):
        grid.query(row, 0, query_images[row], query_names[row])
        for column in range(columns):
            grid.neighbour(
                row,
                column + 1,
                neighbour_images[row][column],
                neighbour_names[row][column],
                similarity[row, column],
                correct[row, column],
            )
    return save_figure(grid.figure, path, palette=True)


class ImageGrid:
    """Rows of framed images with captions, placed in inches from the top left corner of a figure of their own.

    Args:
        names: For each row, the names that stand in it, of which the longest says how tall it is.
        columns: Columns of images; column 0 holds the queries.
        title: Above the grid.
        dpi: Pixels per inch.
        gaps: Columns with a wider gap before them.
        room: Inches left free to the right of the grid.
        below: Inches left free below it.
    """

    def __init__(self, names, columns, title=None, dpi=150, gaps=(1,), room=0.0, below=0.0):
        self.gaps = gaps
        self.width = self.left(columns - 1) + _CELL + _MARGIN + room
        self._ruler = new_figure(1, 1, dpi)  # to measure texts with, before the size of the figure is known
        title_lines = wrap(title, self.width - 2 * _MARGIN, self._ruler, font(10, "bold")) if title else []
        self.head = _HEAD + (0.11 + _TITLE_LINE * len(title_lines) if title else 0.0)
        lines = [max((len(self._name_lines(name)) for name in row), default=1) for row in names]
        self._tops = [_MARGIN + self.head]
        for count in lines:
            self._tops.append(self._tops[-1] + _CELL + _CAPTION + (count - 1) * _LINE + _GAP / 2)
        self.bottom = self._tops[-1] - _GAP / 2
        self.height = self.bottom + _MARGIN + below
        self.figure = new_figure(self.width, self.height, dpi)
        for number, line in enumerate(title_lines):
            self.text(_MARGIN, _MARGIN + number * _TITLE_LINE, line, size=10, weight="bold", align="left")

    def _name_lines(self, name):
        return wrap(name, _CELL + _GAP / 2, self._ruler, font(7.5, "bold"))  # bold is widest

    def left(self, column):
        wide = sum(column >= gap for gap in self.gaps)
        return _MARGIN + column * (_CELL + _GAP) + wide * (_QUERY_GAP - _GAP)

    def corner(self, row, column):
        """Top left corner of a cell."""
        return self.left(column), self._tops[row]

    def neighbour(self, row, column, image, name, similarity, correct, note=""):
        """An image that was found, framed and signed as correct or wrong."""
        colour, sign = (CORRECT_COLOUR, CORRECT_SIGN) if correct else (WRONG_COLOUR, WRONG_SIGN)
        self.image(row, column, image, colour)
        self.caption(row, column, name, f"{sign} {similarity:.3f}{note}".replace("-", "−"), colour)

    def query(self, row, column, image, name):
        """A query: a thin frame, and its name in bold."""
        self.image(row, column, image, QUERY_COLOUR, frame=0.8)
        self.caption(row, column, name, weight="bold")

    def image(self, row, column, image, colour, frame=2.2):
        left, top = self.corner(row, column)
        bounds = left / self.width, 1 - (top + _CELL) / self.height, _CELL / self.width, _CELL / self.height
        axes = self.figure.add_axes(bounds, xticks=[], yticks=[], facecolor="#f4f4f4")
        fitted = _fit(_to_rgb(image), round(_CELL * self.figure.dpi))
        side = max(fitted.size)
        wide, tall = fitted.size
        x, y = (side - wide) / 2, (side - tall) / 2
        axes.imshow(np.asarray(fitted), extent=(x, x + wide, y + tall, y), interpolation="none")
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="auto")
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=frame)

    def column_head(self, column, text):
        self.text(self.left(column) + _CELL / 2, _MARGIN + self.head - _HEAD + 0.03, text, size=8, colour=GREY)

    def row_head(self, row, text):
        """Upright text in front of a row's neighbours."""
        left, top = self.corner(row, 1)
        self.figure.text(
            (left - 0.05) / self.width,
            1 - (top + _CELL / 2) / self.height,
            text,
            fontproperties=font(8, "bold"),
            color=GREY,
            rotation=90,
            ha="right",
            va="center",
        )

    def caption(self, row, column, name, score="", colour=None, weight="normal"):
        left, top = self.corner(row, column)
        middle, top = left + _CELL / 2, top + _CELL + 0.06
        for line in self._name_lines(name):
            self.text(middle, top, line, size=7.5, weight=weight)
            top += _LINE
        if score:
            self.text(middle, top + 0.01, score, size=7.5, colour=colour)

    def text(self, x, y, text, size, weight="normal", colour="#111111", align="center"):
        """One line of text whose top is at y."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontproperties=font(size, weight),
            color=colour,
            ha=align,
            va="top",
            parse_math=False,  # class names may hold dollar signs
        )


def _wrap(text, too_wide):
    """Lines of a text, broken after " ", "_", "-", "/" or "." where there is one, in a word where there is none."""
    lines, rest = [], text
    while too_wide(rest) and len(rest) > 1:
        fits, fails = 1, len(rest)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if too_wide(rest[:middle].rstrip()):
                fails = middle
            else:
                fits = middle
        breaks = [place for place in range(fits // 3 + 1, fits + 1) if rest[place - 1] in " _-/."]
        fits = fits + 1 if rest[fits] == " " else breaks[-1] if breaks else fits
        lines.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    return [*lines, rest]


def _fit(image, side):
    """The image enlarged or reduced so that its longer side is `side` pixels."""
    longer = max(image.size)
    size = tuple(max(1, round(length * side / longer)) for length in image.size)
    return image.resize(size, Image.Resampling.NEAREST if longer <= _SMALL_IMAGE else Image.Resampling.LANCZOS)


def _to_rgb(image):
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"an image must be a PIL image or a uint8 array, got {got}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if 0 in image.shape or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise ValueError(f"an image array must have shape (H, W) or (H, W, 1, 3 or 4), got {image.shape}")
    return Image.fromarray(image).convert("RGB")


def _check_grid(query_images, neighbour_images, query_names, neighbour_names, similarity, correct):
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity must have shape (queries, neighbours), neither of them 0, got {similarity.shape}"
        )
    rows, columns = similarity.shape
    if correct.shape != similarity.shape:
        raise ValueError(f"correct must have similarity's shape {similarity.shape}, got {correct.shape}")
    for name, values in (("query_images", query_images), ("query_names", query_names)):
        if len(values) != rows:
            raise ValueError(f"{name} must have one entry per query, {rows}, got {len(values)}")
    for name, values in (("neighbour_images", neighbour_images), ("neighbour_names", neighbour_names)):
        lengths = [len(row) for row in values]
        if lengths != [columns] * rows:
            raise ValueError(f"{name} must have {rows} rows of {columns}, got rows of {lengths}")


__all__ = [
    "COLOURS",
    "CORRECT_COLOUR",
    "GREY",
    "WRONG_COLOUR",
    "WRONG_SIGN",
    "ImageGrid",
    "choose_queries",
    "font",
    "new_figure",
    "plain_axes",
    "save_figure",
    "save_neighbour_grid",
    "wrap",
]
