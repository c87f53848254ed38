"""Checks of embeddings and labels, shared by all measures: what isn't usable is refused by name."""

from __future__ import annotations

import numpy as np
import torch


# How far the norm of an embedding may be from 1; bfloat16 can't hold a vector of norm 1 as exactly as that.
NORM_TOLERANCE = 1e-3


def as_tensor(values):
    """A tensor of an array of numpy, with its memory where torch can have that; anything else as it is."""
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        return values
    # torch takes neither other byte orders nor negative strides, and warns of memory that is read-only
    values = values.astype(values.dtype.newbyteorder("="), copy=not values.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(values))


def check_embeddings(embeddings, name):
    """The embeddings, if they are a finite, L2-normalised `(items, width)` float tensor or array; else an error.

    Returns:
        The tensor itself; of an array of numpy, a tensor.

    Raises:
        TypeError: not a floating-point tensor or array.
        ValueError: another shape, empty, NaN or infinite values, or not L2-normalised.
    """
    embeddings = as_tensor(embeddings)
    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        got = embeddings.dtype if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(f"{name} must have shape (items, width), neither of them 0, got {tuple(embeddings.shape)}")
    broken = (~embeddings.isfinite().all(1)).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"{name} must be finite: {len(broken)} of {len(embeddings)} rows have NaN or infinite values, "
            f"the first at {broken[:5].tolist()}"
        )
    norms = torch.linalg.vector_norm(
        embeddings.detach(), dim=1, dtype=torch.promote_types(embeddings.dtype, torch.float32)
    )
    off = ((norms - 1).abs() > max(NORM_TOLERANCE, torch.finfo(embeddings.dtype).eps)).nonzero().flatten()
    if len(off):
        raise ValueError(
            f"{name} must be L2-normalised: {len(off)} of {len(embeddings)} rows are not, the first at "
            f"{off[:5].tolist()} with norms {[round(norm, 4) for norm in norms[off[:5]].tolist()]}; "
            "torch.nn.functional.normalize(embeddings, dim=1) does it"
        )
    return embeddings


def refuse_same_sets(query_embeddings, query_labels, gallery_embeddings, gallery_labels):
    """Raise if queries and gallery are the same rows in the same order, where every query would find itself.

    However they came: one tensor twice, or two that were made of one list. A model that embeds everything alike is
    no such mistake.

    Args:
        query_embeddings, query_labels, gallery_embeddings, gallery_labels: `(N, E)` and `(N,)`, checked.

    Raises:
        ValueError: they are; the message says what to do instead.
    """
    queries, gallery = as_tensor(query_embeddings).detach(), as_tensor(gallery_embeddings).detach()
    if queries.shape != gallery.shape or not torch.equal(query_labels, gallery_labels.to(query_labels)):
        return
    if (queries != queries[:1]).any() and torch.equal(queries, gallery.to(queries)):
        raise ValueError(
            f"query_embeddings and gallery_embeddings are the same {len(queries)} rows, so that every query would "
            "find itself: leave the gallery out, and each query searches the others; or say by `excluded` which "
            "gallery item is which query"
        )


def check_labels(labels, name, length=None):
    """The labels, of a tensor or an array of numpy, as an int64 tensor.

    Raises:
        TypeError: not an integer tensor or array.
        ValueError: wrong number of dimensions or length, empty, or a negative label.
    """
    labels = as_tensor(labels)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an integer tensor, got {got}")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"{name} must be a 1-D tensor that is not empty, got shape {tuple(labels.shape)}")
    if length is not None and len(labels) != length:
        raise ValueError(f"{name} must have one label per embedding, {length}, got {len(labels)}")
    negative = (labels < 0).nonzero()
    if len(negative):
        row = int(negative[0])
        raise ValueError(f"{name} must be >= 0: row {row} has {labels[row]}")
    return labels.long()


def check_labelled(embeddings, labels):
    """Embeddings and their labels (as int64, on the embeddings' device), if they fit together; else an error."""
    embeddings = check_embeddings(embeddings, "embeddings")
    return embeddings.detach(), check_labels(labels, "labels", length=len(embeddings)).to(embeddings.device)


__all__ = [
    "NORM_TOLERANCE",
    "as_tensor",
    "check_embeddings",
    "check_labelled",
    "check_labels",
    "refuse_same_sets",
]
