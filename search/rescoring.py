"""Indexes that find by a bit of each value and score anew what they found: what faiss leaves to do.

faiss's `IndexRefine` below keys takes selectors of its own places, and removes nothing; its two parts do.
"""

from __future__ import annotations

import faiss
import numpy as np


def rescoring_of(index):
    """The part of an index (below its keys) that finds by bits and scores anew, or None."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIDMap):
        index = faiss.downcast_index(index.index)
    return index if isinstance(index, faiss.IndexRefine) else None


def search_rescoring(index, queries, k, keys):
    """The k nearest among the items of some keys.

    Args:
        index: With a [`rescoring_of`].
        queries: `(Q, d)` float32 array.
        k: At most so many as there are keys.
        keys: int64 array.

    Returns:
        Similarities `(Q, k)` and keys, -1 where fewer were found.
    """
    known, rescoring = faiss.vector_to_array(index.id_map), rescoring_of(index)
    inner = faiss.SearchParameters(sel=faiss.IDSelectorBatch(np.flatnonzero(np.isin(known, keys))))
    parameters = faiss.IndexRefineSearchParameters(k_factor=rescoring.k_factor, base_index_params=inner)
    search = getattr(rescoring, "search_numpy", rescoring.search)  # see `RetrievalIndex`
    similarity, found = search(queries, k, params=parameters)
    return similarity, np.where(found < 0, -1, known[found])


def remove_keys(index, keys):
    """Remove vectors by key, of any index that has keys.

    Raises:
        RuntimeError: faiss can't.
    """
    rescoring = rescoring_of(index)
    if rescoring is None:
        index.remove_ids(keys)
        return
    known = faiss.vector_to_array(index.id_map)  # faiss removes from both of its parts, but not from the whole
    places = np.flatnonzero(np.isin(known, keys))
    for part in (rescoring.base_index, rescoring.refine_index):
        faiss.downcast_index(part).remove_ids(places)
    faiss.copy_array_to_vector(np.delete(known, places), index.id_map)
    index.ntotal = rescoring.ntotal = len(known) - len(places)
    index.construct_rev_map()


__all__ = ["remove_keys", "rescoring_of", "search_rescoring"]
