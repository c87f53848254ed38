"""Confusion between classes: which class is taken for which by nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_labels
from .pictures import GREY, WRONG_COLOUR, WRONG_SIGN, ImageGrid, font, new_figure, save_figure, wrap


_MATRIX, _NAMES = 3.6, 1.3  # inches: the side of the matrix, and the least space of the names beside it
_LEAST_MATRIX, _HEAD_ROOM, _ROW = 2.0, 0.5, 1.6  # its least height, what is above it, about a row of images
_NAME_LINES = 2  # of a name beside the matrix, at most


@dataclass(frozen=True)
class ConfusedPair:
    """A class and another that its queries find first.

    Attributes:
        label: Class of the queries.
        found: Class of their nearest neighbour.
        count: Queries of `label` whose nearest neighbour is of `found`.
        total: Queries of `label` that can be answered.
        example: One of those queries, as a row of the queries.
    """

    label: int
    found: int
    count: int
    total: int
    example: int


def confused_pairs(query_labels, found_labels, num_relevant=None, similarity=None):
    """Pairs of classes (A taken for B), by the share of A's queries whose nearest neighbour is of class B.

    The direction counts: A may be taken for B more often than B for A. Of equal shares, the pair with more queries
    comes first, then the one with the lower labels.

    Args:
        query_labels: `(Q,)` integer.
        found_labels: `(Q,)` integer, class of each query's nearest neighbour.
        num_relevant: `(Q,)` integer, items of its class that each query could have found ([`count_relevant`]); those
            with 0 are left out. None: all queries count.
        similarity: `(Q,)` float, of the nearest neighbour; the example of a pair is the query where it is highest.
            None: the first.

    Returns:
        List of [`ConfusedPair`], the most confused first; empty where all nearest neighbours are correct.

    Raises:
        TypeError: labels aren't integer tensors.
        ValueError: lengths differ.

    Example:
        >>> pairs = confused_pairs(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1]))
        >>> pairs[0].label, pairs[0].found, pairs[0].count, pairs[0].total
        (0, 1, 2, 3)
    """
    labels = check_labels(query_labels, "query_labels").cpu().numpy()
    columns = {"found_labels": found_labels, "num_relevant": num_relevant}
    columns = {
        name: check_labels(values, name).cpu().numpy() for name, values in columns.items() if values is not None
    }
    if similarity is not None:
        columns["similarity"] = torch.as_tensor(similarity).cpu().numpy()
    for name, values in columns.items():
        if values.shape != labels.shape:
            raise ValueError(f"{name} must have one entry per query, {len(labels)}, got shape {values.shape}")
    found, relevant = columns["found_labels"], columns.get("num_relevant", np.ones_like(labels))
    nearness = columns.get("similarity", np.zeros(len(labels)))
    totals = dict(zip(*(part.tolist() for part in np.unique(labels[relevant > 0], return_counts=True)), strict=True))

    members = {}
    for row in np.flatnonzero((found != labels) & (relevant > 0)).tolist():
        members.setdefault((int(labels[row]), int(found[row])), []).append(row)
    pairs = [
        ConfusedPair(label, other, len(rows), totals[label], example=max(rows, key=lambda row: (nearness[row], -row)))
        for (label, other), rows in members.items()
    ]
    return sorted(pairs, key=lambda pair: (-pair.count / pair.total, -pair.count, pair.label, pair.found))


def confusion_shares(pairs, query_labels, found_labels, num_classes=10):
    """How often queries of the most confused classes find one another first.

    Args:
        pairs: Of [`confused_pairs`]; the classes are the first `num_classes` that occur in them.
        query_labels, found_labels: `(Q,)` integers, as for that function, only queries that can be answered.
        num_classes: How many classes at most.

    Returns:
        classes: List of n labels.
        shares: `(n, n + 1)` float64: share of each class's queries whose nearest neighbour is of each of the classes,
            and, last, of any other. Rows sum to 1.
    """
    classes = list(dict.fromkeys(label for pair in pairs for label in (pair.label, pair.found)))[:num_classes]
    place = {label: number for number, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes) + 1))
    for label, found in zip(query_labels.tolist(), found_labels.tolist(), strict=True):
        if label in place:
            counts[place[label], place.get(found, len(classes))] += 1
    return classes, counts / np.maximum(counts.sum(1, keepdims=True), 1)


def save_confusion(path, pairs, query_images, found_images, class_names, classes, shares, title=None, dpi=150):
    """Draw confused pairs of classes with an example of each, and beside them the shares of the classes involved.

    Args:
        path: File to write; its suffix says how.
        pairs: [`ConfusedPair`]s, drawn two in a row.
        query_images: The example query of each pair: PIL images or uint8 arrays.
        found_images: What it found.
        class_names: Name of each label: a sequence or dict.
        classes, shares: Of [`confusion_shares`].
        title: Line above.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        TypeError: an image is neither a PIL image nor a uint8 array.
        ValueError: there is no pair, or the arguments differ in length.
    """
    if not pairs or len({len(pairs), len(query_images), len(found_images)}) > 1:
        raise ValueError(
            "there must be a query image and a found image for each of the pairs, at least one, got "
            f"{len(pairs)} pairs, {len(query_images)} and {len(found_images)} images"
        )
    rows = max(-(-len(pairs) // 2), 2)  # room for the matrix beside them
    named = [str(class_names[label]) for label in classes]
    room, lines = _name_room(named)
    below = max(_HEAD_ROOM + _LEAST_MATRIX + room - rows * _ROW, 0.0)
    in_rows = [(class_names[pair.label], class_names[pair.found]) for pair in pairs]
    names = [[name for pair in in_rows[2 * row : 2 * row + 2] for name in pair] for row in range(rows)]
    grid = ImageGrid(names, 4, title, dpi, gaps=(2,), room=room + _MATRIX + 0.1, below=below)
    for number, (pair, query, found) in enumerate(zip(pairs, query_images, found_images, strict=True)):
        row, column = number // 2, 2 * (number % 2)
        if row == 0:
            grid.column_head(column, "query")
            grid.column_head(column + 1, "taken for")
        grid.query(row, column, query, class_names[pair.label])
        grid.image(row, column + 1, found, WRONG_COLOUR)
        share = f"{WRONG_SIGN} {pair.count:,} of {pair.total:,} ({pair.count / pair.total:.0%})"
        grid.caption(row, column + 1, class_names[pair.found], share, WRONG_COLOUR)
    _draw_matrix(grid, grid.left(4) + room, grid.corner(0, 0)[1], room, lines, shares)
    return save_figure(grid.figure, path, palette=True)


def _name_room(names):
    """Inches that the names beside the matrix take, and the lines of each name: two at most, and nothing left out."""
    ruler, properties = new_figure(1, 1), font(6.5)
    room = _NAMES
    while True:
        lines = [wrap(name, room - 0.1, ruler, properties) for name in names]
        if max(map(len, lines), default=0) <= _NAME_LINES:
            return room, ["\n".join(parts) for parts in lines]
        room += 0.1


def _draw_matrix(grid, left, top, room, names, shares):
    """A square of percentages; rows are classes of queries, columns those of their nearest neighbours."""
    if not shares[:, -1].any():  # there is no other class
        shares = shares[:, :-1]
    height = min(_MATRIX, grid.height - top - room)
    bounds = left / grid.width, 1 - (top + height) / grid.height, _MATRIX / grid.width, height / grid.height
    axes = grid.figure.add_axes(bounds)
    darkest = max(shares.max(), 0.01)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    small = font(6.5)
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        colour = "white" if shares[row, column] > 0.6 * darkest else "black"
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontproperties=small)
    axes.set_yticks(range(len(names)), names, fontproperties=small, parse_math=False)
    columns = [*names, "any other"][: shares.shape[1]]
    axes.set_xticks(range(len(columns)), columns, fontproperties=small, rotation=90, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("class of the nearest neighbour, % of each row's queries", fontproperties=font(8), color=GREY)


__all__ = ["ConfusedPair", "confused_pairs", "confusion_shares", "save_confusion"]
