"""Stored embeddings with the images that they come from, for pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data_scripts.data_errors import DataError
from ..data_scripts.images import open_image
from ..eval.evaluated_images import EvaluatedImages
from .report import labelled_sets


class StoredImages:
    """Images of a store, as [`EvaluatedImages`] opens them.

    Args:
        store: [`EmbeddingStore`] of images in a folder.
        class_names: Label -> name.

    Raises:
        DataError: the images are in no folder.
    """

    def __init__(self, store, class_names):
        if store.info.image_root is None:
            raise DataError(f"{store.folder}: its images are in no folder, so they can't be drawn")
        self.class_names = class_names
        self._root, self._ids = Path(store.info.image_root), store.ids

    def open_images(self, rows):
        """Row -> PIL image."""
        return {row: open_image(self._root / self._ids[row]) for row in rows}


def evaluated_stores(queries, gallery=None):
    """[`EvaluatedImages`] of stored queries and gallery (or None); see [`labelled_sets`].

    Raises:
        DataError: as [`labelled_sets`], or the images are in no folder.
    """
    sets = labelled_sets(queries, gallery)
    parts = {"query": (queries, "query"), **({} if gallery is None else {"gallery": (gallery, "gallery")})}
    embeddings, names = {"gallery": None, "excluded": sets.get("excluded")}, {}
    for name, (store, prefix) in parts.items():
        labels = sets[f"{prefix}_labels"]
        embeddings[name] = sets[f"{prefix}_embeddings"], labels, torch.ones(len(labels), dtype=torch.bool)
        names |= dict(zip(labels.tolist(), store.class_names, strict=True))
    images = {name: StoredImages(store, names) for name, (store, _) in parts.items()}
    return EvaluatedImages(images["query"] if gallery is None else images, embeddings)


__all__ = ["StoredImages", "evaluated_stores"]
