"""Queries that are in the gallery too: there they would find themselves, and even noise would score 100 %.

What is found here goes to the measures as `excluded`, pairs of a query and a gallery item that it may not find.
"""

from __future__ import annotations

import hashlib
import logging
import struct

import torch

from .data_errors import DataError
from .data_fingerprint import content_digest


logger = logging.getLogger(__name__)


def same_items(query_ids, gallery_ids):
    """Pairs of a query and a gallery item that have the same id.

    Args:
        query_ids: Q ids: texts, numbers or anything else that can be a key; None for an item without one.
        gallery_ids: G ids.

    Returns:
        `(n, 2)` int64: rows of queries and gallery, in the order of the queries. What [`retrieval_metrics`] and others
        take as `excluded`.

    Example:
        >>> same_items(["a", "b", "c"], ["c", "d", "a", "c"]).tolist()
        [[0, 2], [2, 0], [2, 3]]
    """
    places = {}
    for row, name in enumerate(gallery_ids):
        places.setdefault(name, []).append(row)
    places.pop(None, None)
    pairs = [(query, row) for query, name in enumerate(query_ids) for row in places.get(name, ())]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def same_images(query_ids, gallery_ids, query_contents, gallery_contents):
    """Pairs of a query and a gallery item that are one image: of the same id, else of the same content.

    Where a query's id is in the gallery, copies of it under other ids stay, as they do where the queries are the
    gallery. Where it isn't, all items of its content are the query itself under another name.

    Args:
        query_ids, gallery_ids: As for [`same_items`].
        query_contents, gallery_contents: Digests of contents, likewise.

    Returns:
        `(n, 2)` int64, as of [`same_items`].
    """
    by_id = same_items(query_ids, gallery_ids)
    by_content = same_items(query_contents, gallery_contents)
    pairs = torch.cat([by_id, by_content[~torch.isin(by_content[:, 0], by_id[:, 0])]])
    return pairs[pairs[:, 0].argsort(stable=True)]


def same_stored_images(queries, gallery):
    """[`same_images`] of two [`EmbeddingStore`]s.

    Ids mean the same in both where both are relative to one `image_root`, or the stores are of the same data. Else
    only the contents tell, and a warning says so where they are not known (older stores) and ids are shared.
    """
    one, other = queries.info, gallery.info
    comparable = one.data["fingerprint"] == other.data["fingerprint"] or (
        one.image_root is not None and one.image_root == other.image_root
    )
    ids = (queries.ids, gallery.ids) if comparable else ((), ())
    contents = (queries.contents, gallery.contents)
    if None in contents:
        contents = ((), ())
        shared = 0 if comparable else len(set(queries.ids) & set(gallery.ids))
        if shared:
            logger.warning(
                "%d ids are in both %s and %s, which have different image roots, and an older version wrote one of "
                "them without digests of the images: whether these are the same images can't be told, and none is "
                "excluded. Embed anew to know",
                shared,
                queries.folder,
                gallery.folder,
            )
    return same_images(*ids, *contents)


def has_names(dataset) -> bool:
    """Whether a data set says what holds its images (`stored_images`), by which they are told from others."""
    return hasattr(dataset, "stored_images")


def pixel_digests(pixel_values):
    """A digest of each image's pixels, for data sets without names.

    Args:
        pixel_values: `(B, 3, height, width)` on the CPU, of any dtype.

    Returns:
        `(B, 2)` int64.
    """
    rows = [hashlib.blake2b(row.contiguous().view(torch.uint8).numpy(), digest_size=16) for row in pixel_values]
    return torch.tensor([struct.unpack("2q", row.digest()) for row in rows], dtype=torch.int64).reshape(-1, 2)


def same_dataset_images(queries, gallery, num_queries, digests=None):
    """[`same_images`] of two data sets.

    Args:
        queries, gallery: [`ImageDataset`], [`StreamedImages`] or others; perhaps the same one twice.
        num_queries: Q.
        digests: Of both sets, what tells their images apart where one of them does not say what holds its images: Q
            and G values, None for an image that could not be read. Without, such sets have none in common.
    """
    if queries is gallery:
        return torch.arange(num_queries)[:, None].expand(-1, 2)
    if not (has_names(queries) and has_names(gallery)):
        return same_items(*(digests or ((), ())))
    (query_ids, query_contents), (gallery_ids, gallery_contents) = (_identities(d) for d in (queries, gallery))
    return same_images(query_ids, gallery_ids, query_contents, gallery_contents)


def _identities(dataset):
    """Paths (None where contents are stored), and digests of the contents (None where they can't be read)."""
    ids, contents = [], []
    for stored in dataset.stored_images():
        ids.append(stored if isinstance(stored, str) else None)
        try:
            contents.append(content_digest(stored))
        except DataError:  # evaluation has skipped it by name, or not got as far as here
            contents.append(None)
    return ids, contents


__all__ = [
    "has_names",
    "pixel_digests",
    "same_dataset_images",
    "same_images",
    "same_items",
    "same_stored_images",
]
