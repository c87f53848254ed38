"""An evaluation's embeddings with the images that they come from, and the pictures that are made of both."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .before_after import Maps, Row, save_before_after
from .confusion import confused_pairs, confusion_shares, save_confusion
from .embedding_map import choose_mapped, map_embeddings, save_embedding_map
from .failures import choose_failures, find_failures, save_failure_grid
from .metrics import count_relevant, select_pairs
from .neighbours import nearest_neighbours
from .pictures import choose_queries, save_neighbour_grid


GRID_DPI = 96  # of pictures full of photographs
SUBJECT = "classes that training has not seen"


@dataclass
class EvaluatedImages:
    """Embeddings of an evaluation, together with the data sets that they come from.

    Images that could not be read are left out. Rows are those of the data sets.

    Args:
        dataset: An [`ImageDataset`] or [`StreamedImages`], or a dict of two, `query` and `gallery`: whatever has
            `open_images(rows)`, `class_names` and, for attention, `transform`.
        embeddings: `VPTSPTrainer.last_evaluated`: a dict of `query` and `gallery`, each embeddings `(N, E)`, labels
            `(N,)` and which images could be read `(N,)` bool, in the data set's order; the gallery's is None where the
            queries are the gallery. Its `excluded`, if there, are pairs of a query and a gallery item that it may not
            find.
        subject: What the images are of, for titles.
    """

    dataset: object
    embeddings: dict
    subject: str = SUBJECT

    def __post_init__(self):
        both = isinstance(self.dataset, dict)
        self.queries = self.dataset["query"] if both else self.dataset
        self.gallery = self.dataset["gallery"] if both else self.dataset
        self.query_rows, self.query_embeddings, self.query_labels = _readable(*self.embeddings["query"])
        self.gallery_rows, self.gallery_labels, self.gallery_embeddings = self.query_rows, self.query_labels, None
        if both:
            self.gallery_rows, self.gallery_embeddings, self.gallery_labels = _readable(*self.embeddings["gallery"])
        pairs = self.embeddings.get("excluded")
        self.excluded = None if pairs is None else select_pairs(pairs, self.query_rows, self.gallery_rows)

    @property
    def sets(self):
        """Arguments of [`retrieval_metrics`] and its like."""
        gallery = (self.gallery_embeddings, self.gallery_labels) if self.gallery_embeddings is not None else ()
        return self.query_embeddings, self.query_labels, *gallery

    @functools.cached_property
    def neighbours(self):
        """The eight nearest neighbours of every query: similarity and index, `(Q, 8)`, fewer in a small gallery."""
        most = len(self.gallery_labels) - int(self.gallery_embeddings is None)
        if self.excluded is not None and len(self.excluded):
            most -= int(self.excluded[:, 0].bincount().max())
        return nearest_neighbours(self.query_embeddings, min(8, most), self.gallery_embeddings, excluded=self.excluded)

    @functools.cached_property
    def num_relevant(self):
        """`(Q,)` int64, R of each query; see [`count_relevant`]."""
        gallery_labels = None if self.gallery_embeddings is None else self.gallery_labels
        return count_relevant(self.query_labels, gallery_labels, self.excluded)

    def query_images(self, chosen):
        """Images of some queries, a list in their order."""
        return _open(self.queries, self.query_rows[chosen])

    def gallery_images(self, chosen):
        """Images of some gallery items, a list in their order."""
        return _open(self.gallery, self.gallery_rows[chosen])

    def query_names(self, chosen):
        return [self.queries.class_names[label] for label in self.query_labels[chosen].tolist()]

    def gallery_names(self, chosen):
        return [self.gallery.class_names[label] for label in self.gallery_labels[chosen].tolist()]


def draw_neighbours(path, evaluated, count=8, seed=0):
    """Queries, spread over the classes, with their nearest neighbours."""
    chosen = choose_queries(evaluated.query_labels, min(count, len(evaluated.query_labels)), seed)
    similarity, index = (values[chosen] for values in evaluated.neighbours)
    images, names = evaluated.gallery_images(index.flatten()), evaluated.gallery_names(index.flatten())
    columns = index.shape[1]
    return save_neighbour_grid(
        path,
        query_images=evaluated.query_images(chosen),
        neighbour_images=_in_rows(images, columns),
        query_names=evaluated.query_names(chosen),
        neighbour_names=_in_rows(names, columns),
        similarity=similarity,
        correct=evaluated.gallery_labels[index] == evaluated.query_labels[chosen][:, None],
        title=f"Nearest neighbours of {evaluated.subject}",
        dpi=GRID_DPI,
    )


def draw_before_after(path, frozen, tuned, count=4, seed=0, heading="What tuning brought"):
    """The same queries with what the backbone alone and the tuned model find, and both maps of their embeddings.

    Args:
        path: File to write.
        frozen, tuned: [`EvaluatedImages`] of the same data.
        count: Queries at most, spread over the classes at random.
        seed: Of their choice, and of the maps.
        heading: How the line above begins.

    Raises:
        ValueError: the two are of other images.
    """
    if not (torch.equal(frozen.query_rows, tuned.query_rows) and torch.equal(frozen.gallery_rows, tuned.gallery_rows)):
        raise ValueError("before and after must be of the same images")
    chosen = choose_queries(tuned.query_labels, min(count, len(tuned.query_labels)), seed)
    queries = list(zip(tuned.query_images(chosen), tuned.query_names(chosen), strict=True))
    before, after = (_found_rows(evaluated, chosen) for evaluated in (frozen, tuned))
    first = [found_first(evaluated) for evaluated in (frozen, tuned)]
    answered = tuned.num_relevant > 0
    gained, lost = (int((a & ~b & answered).sum()) for a, b in (first[::-1], first))
    shares = [f"{100 * (correct & answered).sum() / answered.sum().clamp(min=1):.1f} %" for correct in first]
    title = (
        f"{heading}: R@1 {shares[0]} before, {shares[1]} after. Of {int(answered.sum()):,} "
        f"queries, {gained:,} find a correct image first only with tuning, {lost:,} only without"
    )
    maps = None
    if len(tuned.query_labels) >= 5:
        rows, classes = choose_mapped(tuned.query_labels, seed=seed)
        points = [map_embeddings(evaluated.query_embeddings[rows], seed=seed) for evaluated in (frozen, tuned)]
        maps = Maps(*points, tuned.query_labels[rows], tuned.queries.class_names, classes)
    return save_before_after(path, queries, before, after, maps, title, dpi=GRID_DPI)


def found_first(evaluated):
    """`(Q,)` bool: whether the nearest neighbour of each query is of its class."""
    return evaluated.gallery_labels[evaluated.neighbours[1][:, 0]] == evaluated.query_labels


def _found_rows(evaluated, chosen):
    """What some queries find, a [`Row`] for each."""
    similarity, index = (values[chosen] for values in evaluated.neighbours)
    correct = evaluated.gallery_labels[index] == evaluated.query_labels[chosen][:, None]
    return [
        Row(evaluated.gallery_images(found), evaluated.gallery_names(found), near.tolist(), same.tolist())
        for found, near, same in zip(index, similarity, correct, strict=True)
    ]


def draw_failures(path, evaluated, count=8):
    """The worst failures, spread over the classes, with what was found instead and the first correct neighbour."""
    failures = find_failures(*evaluated.sets, excluded=evaluated.excluded)
    places = choose_failures(failures, evaluated.query_labels, count)
    chosen, correct, ranks = failures.query[places], failures.correct[places], failures.rank[places].tolist()
    nearest, index = (values[chosen] for values in evaluated.neighbours)
    before = [min(rank - 1, 6, index.shape[1]) for rank in ranks]
    found = torch.cat([correct, *(index[row, :number] for row, number in enumerate(before))])
    similarity = torch.cat([failures.correct_similarity[places], *(nearest[row, :n] for row, n in enumerate(before))])
    images, names = evaluated.gallery_images(found), evaluated.gallery_names(found)
    triples = list(zip(images, names, similarity.tolist(), strict=True))
    ends = [len(correct) + sum(before[: row + 1]) for row in range(len(correct))]
    return save_failure_grid(
        path,
        query=list(zip(evaluated.query_images(chosen), evaluated.query_names(chosen), strict=True)),
        wrong=[triples[end - number : end] for end, number in zip(ends, before, strict=True)],
        correct=triples[: len(correct)],
        ranks=ranks,
        title=f"Queries whose first correct neighbour comes last ({len(failures.query):,} of "
        f"{len(evaluated.query_labels):,} find a wrong one first)",
        dpi=GRID_DPI,
    )


def draw_confusion(path, evaluated, count=6):
    """The classes most often taken for another, with examples."""
    similarity, index = (values[:, 0] for values in evaluated.neighbours)
    relevant = evaluated.num_relevant
    found = evaluated.gallery_labels[index]
    pairs = confused_pairs(evaluated.query_labels, found, relevant, similarity)
    examples = torch.tensor([pair.example for pair in pairs[:count]], dtype=torch.int64)
    names = dict(enumerate(evaluated.queries.class_names)) | dict(enumerate(evaluated.gallery.class_names))
    answered = relevant > 0
    classes, shares = confusion_shares(pairs, evaluated.query_labels[answered], found[answered])
    return save_confusion(
        path,
        pairs[:count],
        evaluated.query_images(examples),
        evaluated.gallery_images(index[examples]),
        names,
        classes,
        shares,
        title="Most confused classes",
        dpi=GRID_DPI,
    )


def draw_map(path, evaluated, method="tsne", seed=0):
    """The queries' embeddings in two dimensions."""
    rows, classes = choose_mapped(evaluated.query_labels, seed=seed)
    points = map_embeddings(evaluated.query_embeddings[rows], method, seed)
    total = len(evaluated.query_labels)
    shown = f"{total:,}" if len(rows) == total else f"{len(rows):,} of {total:,}"
    title = f"Embeddings of {shown} images of {evaluated.subject}"
    labels = evaluated.query_labels[rows]
    return save_embedding_map(path, points, labels, evaluated.queries.class_names, classes, title, method=method)


def _readable(embeddings, labels, readable):
    """Rows, embeddings and labels without the images that could not be read."""
    rows = readable.nonzero().flatten()
    return rows, embeddings[rows], labels[rows]


def _open(dataset, rows):
    images = dataset.open_images(set(rows.tolist()))
    return [images[row] for row in rows.tolist()]


def _in_rows(values, columns):
    return [values[start : start + columns] for start in range(0, len(values), columns)]


__all__ = [
    "GRID_DPI",
    "EvaluatedImages",
    "draw_before_after",
    "draw_confusion",
    "draw_failures",
    "draw_map",
    "draw_neighbours",
    "found_first",
]
