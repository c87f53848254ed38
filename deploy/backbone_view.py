"""The items of an index as the backbone alone sees them, so that the page can show what tuning brought."""

from __future__ import annotations

import numpy as np

from vptsp.data_scripts.data_errors import DataError
from vptsp.search.backbone_alone import backbone_alone
from vptsp.search.embed import cached_store
from vptsp.search.image_sources import ImageSource
from vptsp.search.index import RetrievalIndex


def backbone_index(page, cache_dir=None):
    """An index of the page's items, embedded by the backbone that its retriever was tuned on.

    The embeddings are kept in a store: the next start takes them from there, as long as images and backbone are the
    same.

    Args:
        page: [`SearchPage`] of a retriever's index.
        cache_dir: As for [`cached_store`].

    Returns:
        [`RetrievalIndex`] with an embedder, and the ids of the items that it lacks, whose images can't be read.

    Raises:
        DataError: the index is that of a bare backbone, the pretrained backbone is not to be had, or an image's file
            is missing.
    """
    index = page.index
    embedder = backbone_alone(index.embedder)
    items, total = index.list_items(len(index))
    if len(items) != total:
        raise DataError(f"compare_backbone: the index gives {len(items):,} of its {total:,} items")
    ids = [item.id for item in items]
    stored = [str(page.image_path(name)) for name in ids]
    source = ImageSource(ids, np.ma.masked_all(len(ids), np.int64), [], stored.__getitem__, "items of an index", None)
    store = cached_store(embedder, source, cache_dir, skip_corrupt=True)
    metadata = {item.id: item.metadata for item in items}
    columns = {name: [metadata[item][name] for item in store.ids] for name in index.columns}
    built = RetrievalIndex.build(store.ids, store.embeddings, columns, factory="Flat", model=embedder.description())
    return built.use_embedder(embedder), store.info.skipped


__all__ = ["backbone_index"]
