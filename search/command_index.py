"""`vptsp index`: build an index of embeddings, add to it, remove from it."""

from __future__ import annotations

from ..data_scripts.data_errors import DataError
from .index import RetrievalIndex
from .index_files import find_info
from .inputs import is_main_rank, model_or_store, stores_of
from .milvus import MilvusIndex
from .open_index import edit_index, is_milvus


def run(options):
    """Build or change an index, and print what it is."""
    if is_milvus(options.index) and options.factory != "auto":
        raise DataError("--factory is for faiss: Milvus chooses its index itself")
    if options.remove is not None:
        if options.model is not None or options.store is not None or options.add:
            raise DataError("--remove goes without --model, --store and --add")
        with edit_index(options.index, options.lock_timeout) as index:
            before = len(index)
            index.remove(options.remove)
            removed, left = before - len(index), len(index)
        print(f"{options.index}: removed {removed:,}, {left:,} items")
        return
    store, _ = stores_of(model_or_store(options), options)
    if not is_main_rank():
        return
    if options.add:
        _add(store, options)
    else:
        _build(store, options)


def _add(store, options):
    with edit_index(options.index, options.lock_timeout) as index:
        index.check_model(store.info.model)
        present = index.present(store.ids)
        rows = [row for row, name in enumerate(store.ids) if name not in present]
        if rows:
            names = store.class_names
            ids = store.ids
            index.add([ids[r] for r in rows], store.embeddings[rows], {"class_name": [names[r] for r in rows]})
        total = len(index)
    print(f"{options.index}: added {len(rows):,}, {len(present):,} were there, {total:,} items")


def _build(store, options):
    content = (store.ids, store.embeddings, {"class_name": store.class_names})
    origin = {"model": store.info.model, "image_root": store.info.image_root}
    if is_milvus(options.index):
        index = MilvusIndex.build(options.index, *content, **origin)
        print(f"{options.index}: {len(index):,} items")
        return
    if find_info(options.index) is not None:  # now, and not after hours of training
        raise DataError(f"{options.index} holds an index: --add adds to it; give another folder for a new one")
    index = RetrievalIndex.build(
        *content,
        **origin,
        factory=options.factory,
        target_recall=options.target_recall,
        memory_gb=options.memory_gb,
    )
    index.save(options.index, overwrite=False, timeout=options.lock_timeout)
    info = index.info
    print(f"{options.index}: {len(index):,} items, {info.factory} ({info.reason})")
    if not index.is_exact:
        effort = "" if info.effort is None else f" with {info.effort}"
        print(f"recall@10 against exact search {info.recall_at_10:.3f}{effort}")
