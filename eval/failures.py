"""The worst failures: queries whose first correct neighbour comes late, and what came before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .metrics import check_sets
from .pictures import ImageGrid, save_figure


@dataclass(frozen=True)
class Failures:
    """Queries that found an item of another class first, the worst of them first. F failures.

    Attributes:
        query: `(F,)` int64, rows of the queries.
        rank: `(F,)` int64, where the first correct item comes, >= 2.
        correct: `(F,)` int64, row of that item in the gallery.
        correct_similarity: `(F,)` its similarity.
        wrong_similarity: `(F,)` that of the nearest wrong item.
    """

    query: torch.Tensor
    rank: torch.Tensor
    correct: torch.Tensor
    correct_similarity: torch.Tensor
    wrong_similarity: torch.Tensor


@torch.no_grad()
def find_failures(
    query_embeddings, query_labels, gallery_embeddings=None, gallery_labels=None, *, device=None, excluded=None
):
    """Queries whose nearest neighbour is wrong, by how late the first correct one comes.

    The rank of the first correct item is 1 plus the number of wrong items that are nearer; one that is just as near
    doesn't count against it. Of equal ranks, the one with the higher wrong similarity is worse. Queries that can't be
    answered are no failures.

    Args:
        query_embeddings, query_labels, gallery_embeddings, gallery_labels, device, excluded: As of
            [`retrieval_metrics`].

    Returns:
        [`Failures`], on the CPU; of length 0 if there is none.

    Raises:
        TypeError, ValueError: as for [`retrieval_metrics`].

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> failures = find_failures(embeddings, torch.tensor([0, 1, 0]))
        >>> failures.query.tolist(), failures.rank.tolist()
        ([0, 2], [2, 2])
    """
    blocks, query_labels, gallery_labels = check_sets(
        query_embeddings, query_labels, gallery_embeddings, gallery_labels, device, excluded
    )
    found = []
    for rows in torch.arange(blocks.num_queries).split(blocks.block_size(1)):
        similarity = blocks.rows(rows)
        same = query_labels[rows.to(blocks.device), None] == gallery_labels
        correct, where = similarity.masked_fill(~same, -torch.inf).max(1)
        wrong = similarity.masked_fill_(same, -torch.inf)
        rank = 1 + (wrong > correct[:, None]).sum(1)
        failed = (rank > 1) & correct.isfinite()
        columns = (rows.to(blocks.device), rank, where, correct, wrong.amax(1))
        found.append([values[failed].cpu() for values in columns])
    failures = [torch.cat(parts) for parts in zip(*found, strict=True)]
    order = failures[4].argsort(descending=True, stable=True)
    order = order[failures[1][order].argsort(descending=True, stable=True)]
    return Failures(*(values[order] for values in failures))


def choose_failures(failures, query_labels, count):
    """The worst failures for a picture: each class gives its worst before any gives a second.

    Args:
        failures: Of [`find_failures`].
        query_labels: `(Q,)` integer.
        count: How many at most.

    Returns:
        List of positions in `failures`.
    """
    turns, taken = [], {}
    for position, label in enumerate(query_labels[failures.query.to(query_labels.device)].tolist()):
        taken[label] = taken.get(label, 0) + 1
        turns.append((taken[label], position))
    return [position for _, position in sorted(turns)[:count]]


def save_failure_grid(path, query, wrong, correct, ranks, title=None, dpi=150):
    """Draw failed queries with what they found instead, and with their first correct neighbour.

    Like [`save_neighbour_grid`], with one more column on the right: the first correct neighbour and its rank.

    Args:
        path: File to write; its suffix says how.
        query: F pairs of an image and its class name.
        wrong: F lists of K triples: image, class name and similarity of the nearest neighbours, nearest first, all of
            them before the first correct one.
        correct: F triples: the same of the first correct neighbour.
        ranks: F ranks of it.
        title: Line above the grid.
        dpi: Pixels per inch.

    Returns:
        The path, as `pathlib.Path`.

    Raises:
        TypeError: an image is neither a PIL image nor a uint8 array.
        ValueError: there is no failure, or the arguments differ in length.
    """
    lengths = {"query": len(query), "wrong": len(wrong), "correct": len(correct), "ranks": len(ranks)}
    if len(set(lengths.values())) > 1 or not query:
        raise ValueError(
            f"query, wrong, correct and ranks must have one entry per failure, at least one, got {lengths}"
        )
    columns = max(map(len, wrong))
    last = columns + 1
    names = [
        [name, correct[row][1], *(neighbour[1] for neighbour in wrong[row])] for row, (_, name) in enumerate(query)
    ]
    grid = ImageGrid(names, last + 1, title, dpi, gaps=(1, last))
    for column, text in enumerate(("query", *range(1, last), "first correct")):
        grid.column_head(column, str(text))
    for row, (image, name) in enumerate(query):
        grid.query(row, 0, image, name)
        for column, neighbour in enumerate(wrong[row], start=1):
            grid.neighbour(row, column, *neighbour, correct=False)
        grid.neighbour(row, last, *correct[row], correct=True, note=f", rank {ranks[row]:,}")
    return save_figure(grid.figure, path, palette=True)


__all__ = ["Failures", "choose_failures", "find_failures", "save_failure_grid"]
