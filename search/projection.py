"""Shorter or whitened embeddings: a linear map that is learned from an index's embeddings and kept in the index.

    projection = Projection.learn("whiten", embeddings, dim=128)
    projection(embeddings)  # (n, 128), L2-normalised

faiss does the mathematics; what comes out is normalised anew, so that similarities stay cosines.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch

from ..data_scripts.data_errors import some
from ..names.registry import nearest


# Name -> what becomes of an embedding.
PROJECTIONS = {
    "pca": "its first principal components",
    "whiten": "its first principal components, each scaled to variance 1",
    "truncate": "its first entries",
}
# Directions with less than this share of the largest variance are rounding noise, which whitening would blow up.
_NOISE = 1e-6


class Projection:
    """Embeddings to those of an index's own space; see [`Projection.learn`].

    Args:
        transform: faiss's `VectorTransform`.
        variance: Share of the variance that the components have, in [0, 1]; None for `truncate`.
    """

    def __init__(self, transform, variance=None):
        self.transform = transform
        self.variance = variance

    @classmethod
    def learn(cls, kind, embeddings, dim=None):
        """Learn a projection from embeddings, without labels.

        Args:
            kind: `pca` (centred), `whiten` (PCA-whitening: Jegou and Chum, "Negative evidences and co-occurences in
                image retrieval", ECCV 2012), or `truncate`, which learns nothing and is meant for models that were
                trained so that their first entries suffice (Kusupati et al., "Matryoshka Representation Learning",
                NeurIPS 2022).
            embeddings: `(n, E)` float32 tensor; more than `dim` of them for `pca` and `whiten`.
            dim: d, width of what comes out, 1 to E; None for E, with `whiten` only.

        Raises:
            ValueError: kind or dim is none of these, or the embeddings vary in less than `dim` directions.
        """
        if kind not in PROJECTIONS:
            raise ValueError(
                f"projection must be one of {', '.join(PROJECTIONS)}, got {kind!r}{nearest(kind, PROJECTIONS)}"
            )
        count, width = embeddings.shape
        if dim is None and kind != "whiten":
            raise ValueError(f"projection {kind!r} needs dim, the width of what comes out")
        dim = width if dim is None else dim
        if not 1 <= dim <= width:
            raise ValueError(f"dim must be in 1 to {width}, the width of the embeddings, got {dim}")
        if kind == "truncate":
            return cls(faiss.RemapDimensionsTransform(width, dim, False))
        if count <= dim:
            raise ValueError(f"projection {kind!r} to dim {dim} is learned from more than {dim} items, got {count}")
        transform = faiss.PCAMatrix(width, dim, -0.5 if kind == "whiten" else 0.0)
        transform.train(embeddings.numpy())
        variances = faiss.vector_to_array(transform.eigenvalues)
        rank = int((variances > _NOISE * variances.max()).sum())
        if rank < dim:
            raise ValueError(f"dim must be at most {rank} here: the {count} embeddings vary in no more directions")
        return cls(transform, float(variances[:dim].sum() / variances.clip(0).sum()))

    @property
    def dim(self):
        """d, the width of what comes out."""
        return self.transform.d_out

    def __call__(self, embeddings):
        """`(n, E)` float32 tensor -> `(n, d)`, L2-normalised.

        Raises:
            ValueError: nothing of an embedding is left.
        """
        projected = self.transform.apply(np.ascontiguousarray(embeddings.numpy()))
        norms = np.linalg.norm(projected, axis=1, keepdims=True)
        if empty := np.flatnonzero(norms[:, 0] == 0).tolist():
            raise ValueError(f"nothing is left of {len(empty)} embeddings after the projection, rows {some(empty)}")
        return torch.from_numpy(projected / norms)


def learn_projection(kind, dim, embeddings):
    """[`Projection`] and the record of it for JSON, or None twice where kind is None.

    Raises:
        ValueError: as [`Projection.learn`], or dim without a kind.
    """
    if kind is None:
        if dim is not None:
            raise ValueError(f"dim goes with projection, got dim {dim} alone")
        return None, None
    learned = Projection.learn(kind, embeddings.detach().float().cpu(), dim)
    record = {"kind": kind, "dim": learned.dim, "num_items": len(embeddings), "variance": learned.variance}
    return learned, record


def wrapped(index, projection):
    """faiss index that holds a projection along, for one file; the index itself where there is none."""
    if projection is None:
        return index
    outer = faiss.IndexPreTransform(projection.transform, index)
    outer.ntotal = index.ntotal
    return outer


def unwrapped(index):
    """faiss index and the [`Projection`] that [`wrapped`] put around it.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(index, faiss.IndexPreTransform) or index.chain.size() != 1:
        raise ValueError("it holds no projection")
    inner, transform = faiss.downcast_index(index.index), faiss.downcast_VectorTransform(index.chain.at(0))
    inner.referenced_objects = transform.referenced_objects = [index]  # which owns them
    return inner, Projection(transform)


def projection_text(record):
    """A line on a projection, of what `index.json` or a report says of it."""
    share = record["variance"]
    kept = (
        "" if share is None else f", {100 * share:.1f} % of the variance, learned from {record['num_items']:,} items"
    )
    return f"compared in width {record['dim']}: {PROJECTIONS[record['kind']]}{kept}"


__all__ = ["PROJECTIONS", "Projection", "learn_projection", "projection_text", "unwrapped", "wrapped"]
