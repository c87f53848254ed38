"""`vptsp index`: build an index of embeddings, bring it in step with its images, remove from it."""

from __future__ import annotations

from ..data_scripts.data_errors import DataError
from .inputs import (
    choose_sets,
    engine_of,
    is_main_rank,
    load_embedder,
    load_sources,
    model_of,
    model_or_store,
    refuse_model_options,
    store_options,
)
from .open_index import edit_index, index_exists, is_milvus, open_index
from .projection import projection_text
from .store import EmbeddingStore
from .sync import update_index, update_index_from_store


_BUILD_OPTIONS = ("factory", "target_recall", "memory_gb", "projection", "dim", "quantise")


def run(options):
    """Build or change an index, and print what was done and what it is."""
    build = {name: value for name in _BUILD_OPTIONS if (value := getattr(options, name)) is not None}
    if is_milvus(options.index) and build:
        raise DataError(f"--{next(iter(build))} is for faiss: Milvus chooses its index itself")
    if options.remove is not None:
        _remove(options, build)
        return
    if options.where:
        raise DataError("--where goes with --remove")
    if options.add and options.replace:
        raise DataError("give either --add or --replace, got both")
    exists = index_exists(options.index)
    if exists and not options.replace and build:
        raise DataError(
            f"{options.index} holds an index, which stays of its kind: --{next(iter(build))} goes with --replace"
        )
    changes = _update(options, exists, build)
    if is_main_rank():
        print(_summary(options.index, changes, new=options.replace or not exists))


def _remove(options, build):
    if build:
        raise DataError(f"--remove goes without --{next(iter(build))}, which is for new indexes")
    if options.model is not None or options.store is not None or options.add or options.replace:
        raise DataError("--remove goes without --model, --store and --add or --replace")
    if options.images is not None or options.data:
        raise DataError("--remove goes without --images and the options of data sets: it takes ids or --where")
    refuse_model_options(options, "images")
    if bool(options.remove) == bool(options.where):
        got = "both" if options.remove else "neither"
        raise DataError(f"--remove takes either ids or --where (which items), got {got}")
    with edit_index(options.index, options.lock_timeout) as index:
        before = len(index)
        if options.where:
            index.require_values(options.where)
        index.remove(options.remove or index.ids_where(options.where))
        removed, left = before - len(index), len(index)
    print(f"{options.index}: removed {removed:,}, {left:,} items")


def _update(options, exists, build):
    how = {
        "replace": options.replace,
        "add_only": options.add,
        "lock_timeout": options.lock_timeout,
        "build": build,
    }
    if exists and options.store is None and (options.model is None or not options.replace):  # it says of which model
        index = open_index(options.index)
        options.model = model_of(index, options)
        if is_milvus(options.index):
            index.close()
    name = model_or_store(options)
    if name == options.store:
        return update_index_from_store(options.index, EmbeddingStore.open(name), **how) if is_main_rank() else None
    engine = engine_of(name, options)
    source, _ = choose_sets(load_sources(options), options.split, whole=True)
    embedder = load_embedder(name, options)
    how |= {"cache_dir": options.embeddings_cache, "engine": engine, **store_options(options)}
    return update_index(options.index, embedder, source, **how)


def _summary(place, changes, new):
    lines = []
    if new:
        info = changes.built
        kind = "" if info is None else f", {info.factory} ({info.reason})"
        lines.append(f"{place}: {changes.total:,} items{kind}")
        if info is not None and info.projection is not None:
            lines.append(projection_text(info.projection))
        if not changes.exact:
            effort = "" if info.effort is None else f" with {info.effort}"
            lines.append(f"recall@10 against exact search {info.recall_at_10:.3f}{effort}")
    else:
        lines.append(f"{place}: {changes}; {changes.total:,} items")
    return "\n".join([*lines, *(f"skipped, can't be read: {name}" for name in changes.skipped)])
