"""What tuning brought: the same queries with what the backbone alone and the tuned model find, and both maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .embedding_map import add_legend, draw_map, legend_height, legend_names
from .pictures import GREY, ImageGrid, save_figure


BEFORE, AFTER = "backbone alone", "tuned"
_MAP, _MAP_HEAD, _LEGEND = 3.9, 0.45, 1.75  # inches: a map's height, what is above it, and the names beside both


@dataclass(frozen=True)
class Row:
    """What one of the models finds for a query. K neighbours, nearest first.

    Attributes:
        images: K images, PIL or uint8 arrays.
        names: K class names.
        similarity: K cosine similarities.
        correct: K booleans.
    """

    images: list
    names: list[str]
    similarity: list[float]
    correct: list[bool]


@dataclass(frozen=True)
class Maps:
    """Both models' embeddings of the same items in two dimensions, of [`map_embeddings`]. N items.

    Attributes:
        before, after: `(N, 2)`.
        labels: `(N,)` integer.
        class_names: Name of each label: a sequence or dict.
        classes: Labels to colour; see [`choose_mapped`].
    """

    before: np.ndarray
    after: np.ndarray
    labels: np.ndarray
    class_names: object
    classes: list[int]


def save_before_after(path, queries, before, after, maps=None, title=None, dpi=150):
    """Draw each query with two rows of neighbours, those of the backbone alone above those of the tuned model.

    Args:
        path: File to write; its suffix says how.
        queries: Q pairs of an image and its class name.
        before, after: Q [`Row`]s each, all of as many neighbours.
        maps: [`Maps`], side by side below; None: none.
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        TypeError: an image is neither a PIL image nor a uint8 array.
        ValueError: there is no query, or the arguments differ in length.
    """
    lengths = {"queries": len(queries), "before": len(before), "after": len(after)}
    if len(set(lengths.values())) > 1 or not queries:
        raise ValueError(f"queries, before and after must have one entry per query, at least one, got {lengths}")
    columns = {len(values) for row in (*before, *after) for values in vars(row).values()}
    if len(columns) > 1 or columns == {0}:
        raise ValueError(f"every row must have as many neighbours, at least one, got {sorted(columns)}")
    (count,) = columns
    rows = [row for pair in zip(before, after, strict=True) for row in pair]
    names = [row.names if number % 2 else [queries[number // 2][1], *row.names] for number, row in enumerate(rows)]
    legend = [] if maps is None else legend_names(maps.labels, maps.class_names, maps.classes)
    map_height = max(_MAP, legend_height(legend))
    below = 0.0 if maps is None else _MAP_HEAD + map_height + 0.35
    grid = ImageGrid(names, count + 1, title, dpi, below=below)
    grid.column_head(0, "query")
    for column in range(1, count + 1):
        grid.column_head(column, str(column))
    for number, row in enumerate(rows):
        if number % 2 == 0:
            grid.query(number, 0, *queries[number // 2])
        grid.row_head(number, AFTER if number % 2 else BEFORE)
        for column, found in enumerate(zip(row.images, row.names, row.similarity, row.correct, strict=True), start=1):
            grid.neighbour(number, column, *found)
    if maps is not None:
        _draw_maps(grid, maps, legend, map_height)
    return save_figure(grid.figure, path, palette=maps is None)  # a palette has no room for the colours of classes


def _draw_maps(grid, maps, legend, height):
    wide = (grid.width - _LEGEND - 0.6) / 2
    top = grid.bottom + _MAP_HEAD
    for number, (name, points) in enumerate(((BEFORE, maps.before), (AFTER, maps.after))):
        left = 0.3 + number * (wide + 0.2)
        bounds = left / grid.width, 1 - (top + height) / grid.height, wide / grid.width, height / grid.height
        axes = grid.figure.add_axes(bounds)
        draw_map(axes, np.asarray(points), np.asarray(maps.labels), maps.classes, title=f"Embeddings, {name}")
        axes.set(xlabel=None, ylabel=None)
    add_legend(axes, legend)
    note = "t-SNE: neighbours stay together, distances between groups mean little"
    grid.text(0.3, top + height + 0.08, note, size=7.5, colour=GREY, align="left")


__all__ = ["AFTER", "BEFORE", "Maps", "Row", "save_before_after"]
