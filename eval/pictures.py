"""Pictures of what a retriever finds: queries with their nearest neighbours.

matplotlib is imported where it is used, and draws straight to a file: no display and no global state.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


RIGHT_COLOUR, WRONG_COLOUR, QUERY_COLOUR = "#1a8a4a", "#cc3311", "#333333"
RIGHT_SIGN, WRONG_SIGN = "✓", "✗"

_CELL, _GAP, _QUERY_GAP = 1.2, 0.14, 0.3  # inches: an image's side, the space between two, and after the query
_HEAD, _CAPTION, _MARGIN = 0.22, 0.42, 0.1  # column numbers, text under an image, border
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


def save_neighbour_grid(
    path, query_images, neighbour_images, query_names, neighbour_names, similarity, correct, title=None, dpi=150
):
    """Draw queries (left) with their nearest neighbours (to the right, nearest first) into an image file.

    Neighbours of the query's class have a green frame and ✓, others a red frame and ✗. Under each stand its class,
    shortened where it is too long, and its cosine similarity to the query. Images keep their shape, and small ones
    (such as scanned digits) are enlarged without blurring.

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

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = similarity.shape
    head = _HEAD + (0.3 if title else 0.0)
    width = 2 * _MARGIN + (columns + 1) * _CELL + (columns - 1) * _GAP + _QUERY_GAP
    height = 2 * _MARGIN + head + rows * (_CELL + _CAPTION) + (rows - 1) * _GAP / 2
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    grid = _Grid(figure, FigureCanvasAgg(figure).get_renderer(), width, height, head)

    if title:
        grid.text(_MARGIN, _MARGIN, title, width - 2 * _MARGIN, size=10, weight="bold", align="left")
    grid.column_head(0, "query")
    for column in range(columns):
        grid.column_head(column + 1, str(column + 1))
    for row in range(rows):
        grid.image(row, 0, query_images[row], QUERY_COLOUR)
        grid.caption(row, 0, query_names[row], "", QUERY_COLOUR)
        for column in range(columns):
            colour, sign = (RIGHT_COLOUR, RIGHT_SIGN) if correct[row, column] else (WRONG_COLOUR, WRONG_SIGN)
            grid.image(row, column + 1, neighbour_images[row][column], colour)
            score = f"{sign} {similarity[row, column]:.3f}".replace("-", "−")
            grid.caption(row, column + 1, neighbour_names[row][column], score, colour)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


class _Grid:
    """Places images and text on a figure, in inches from the top left corner."""

    def __init__(self, figure, renderer, width, height, head):
        self.figure, self.renderer = figure, renderer
        self.width, self.height, self.head = width, height, head

    def corner(self, row, column):
        """Top left corner of a cell; column 0 holds the queries."""
        left = _MARGIN + column * (_CELL + _GAP) + (_QUERY_GAP - _GAP if column else 0.0)
        return left, _MARGIN + self.head + row * (_CELL + _CAPTION + _GAP / 2)

    def image(self, row, column, image, colour):
        left, top = self.corner(row, column)
        bounds = left / self.width, 1 - (top + _CELL) / self.height, _CELL / self.width, _CELL / self.height
        axes = self.figure.add_axes(bounds, xticks=[], yticks=[], facecolor="#f4f4f4")
        fitted = _fit(_to_rgb(image), round(_CELL * self.figure.dpi))
        side, (wide, tall) = _CELL * self.figure.dpi, fitted.size
        x, y = (side - wide) / 2, (side - tall) / 2
        axes.imshow(np.asarray(fitted), extent=(x, x + wide, y + tall, y), interpolation="none")
        axes.set(xlim=(0, side), ylim=(side, 0), aspect="auto")
        for spine in axes.spines.values():
            spine.set(edgecolor=colour, linewidth=2.2 if column else 0.8)

    def column_head(self, column, text):
        left, _ = self.corner(0, column)
        self.text(left + _CELL / 2, _MARGIN + self.head - _HEAD + 0.03, text, _CELL, size=8, colour="#666666")

    def caption(self, row, column, name, score, colour):
        left, top = self.corner(row, column)
        weight = "normal" if column else "bold"
        self.text(left + _CELL / 2, top + _CELL + 0.06, name, _CELL + _GAP / 2, size=7.5, weight=weight)
        if score:
            self.text(left + _CELL / 2, top + _CELL + 0.2, score, _CELL, size=7.5, colour=colour)

    def text(self, x, y, text, room, size, weight="normal", colour="#111111", align="center"):
        """One line of text whose top is at y, cut with an ellipsis to `room` inches."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)

        def too_wide(line):
            wide, _, _ = self.renderer.get_text_width_height_descent(line, font, ismath=False)
            return wide > room * self.figure.dpi

        line = _shorten(" ".join(str(text).split()), too_wide)
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            line,
            fontproperties=font,
            color=colour,
            ha=align,
            va="top",
            parse_math=False,  # class names may hold dollar signs
        )


def _shorten(text, too_wide):
    """The text, or as many of its first characters as leave room for an ellipsis."""
    if not too_wide(text):
        return text
    fits, fails = 0, len(text)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if too_wide(text[:middle].rstrip(" -_.,") + "…"):
            fails = middle
        else:
            fits = middle
    return text[:fits].rstrip(" -_.,") + "…"


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


__all__ = ["choose_queries", "save_neighbour_grid"]
