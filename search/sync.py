"""Keeping an index in step with its sources: what is new is added, what has changed replaced, what is gone removed.

    update_index("catalogue", Embedder.from_pretrained("runs/photos"), folder_source("photos"))
    # 1 added, 0 changed, 0 removed, 299 unchanged

Only images that are new or whose content has changed are embedded. An index has the images of any number of sources;
each item knows its own, and bringing the index in step with one leaves the items of the others as they are. The ids of
the first folder's images are their paths from there; those of a further folder's begin with its name.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from ..data_scripts.data_errors import DataError, some
from ..data_scripts.data_fingerprint import content_digest
from .columns import CLASS_COLUMN, CONTENT_COLUMN, SOURCE_COLUMN, own_columns
from .embed import cached_store, on_main_rank, reading_bar
from .index import RetrievalIndex
from .milvus import MilvusIndex
from .open_index import edit_index, index_exists, is_milvus
from .store import EmbeddingStore, NothingReadableError


_READING_THREADS = 8


@dataclass
class IndexChanges:
    """What bringing an index in step has done.

    Attributes:
        added, changed, removed: Numbers of items; those that changed have another content.
        updated: Items whose class or columns are others now, but whose images are the same.
        unchanged: Items of the source that are as they were.
        left: Items that have changed or are gone, but were left as they were since only new ones were to be added.
        skipped: Images that can't be read, and so aren't in the index.
        total: Items of the index now, those of other sources included.
        built: [`IndexInfo`] of an index of faiss that is new, or None.
        exact: Whether every search of that finds the nearest.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    updated: int = 0
    unchanged: int = 0
    left: int = 0
    skipped: list[str] = field(default_factory=list)
    total: int = 0
    built: object = None
    exact: bool = True

    def __str__(self):
        other = f", {self.updated:,} with other columns" if self.updated else ""
        left = f", {self.left:,} that changed or are gone left as they were" if self.left else ""
        return (
            f"{self.added:,} added, {self.changed:,} changed, {self.removed:,} removed{other}, "
            f"{self.unchanged:,} unchanged{left}"
        )


@dataclass
class _Listing:
    """The items that a source has now: ids (paths from its folder), and what is known of each."""

    ids: list[str]
    metadata: dict[str, list]
    contents: list[str | None]
    root: str | None
    name: str
    model: dict


class _Plan(NamedTuple):
    """Rows of a listing that are new, changed, or have other columns; ids that are to be removed."""

    added: list[int]
    changed: list[int]
    updated: list[int]
    adopted: list[int]
    removed: list[str]


def update_index(
    place, embedder, source, *, replace=False, add_only=False, cache_dir=None, lock_timeout=60.0, build=None, **options
):
    """Bring an index in step with a source of images; build it where there is none.

    Args:
        place: Of the index; see [`open_index`].
        embedder: [`Embedder`]; the model that made what the index holds.
        source: `ImageSource`.
        replace: Build the index anew, of this source alone. The old one is there until the new one is complete.
        add_only: Add what is new, but replace and remove nothing.
        cache_dir: Where embeddings are kept; see [`cached_store`].
        lock_timeout: Seconds to wait for another process that is changing the index.
        build: Options of [`RetrievalIndex.build`], where it is built.
        **options: Of [`embed_to_store`].

    Returns:
        [`IndexChanges`].

    Raises:
        InUseError: another process was changing the index all that time.
        IndexMismatchError: the index holds embeddings of another model.
        DataError: an image can't be read, or an id is that of another file.
        ValueError: the index can't take the change, as a graph can't remove.
    """
    options = {"cache_dir": cache_dir, "lock_timeout": lock_timeout, **options}
    if replace or on_main_rank(lambda: not index_exists(place)):
        store = cached_store(embedder, source, **options)
        return on_main_rank(
            lambda: _build(place, store, source.ids, own_columns(source), replace, lock_timeout, build)
        )
    skipped = []

    def listing():
        names = [source.class_name(row) for row in range(len(source))]
        progress, engine = reading_bar(source, options.get("progress", True)), options.get("engine")
        with ThreadPoolExecutor(_READING_THREADS) as threads:
            digests = (
                threads.map(lambda row: content_digest(source.stored(row)), range(len(source)))
                if engine is None
                else engine.contents(source)
            )
            contents = [digest.hex() for digest in progress(digests, len(source))]
        metadata = {CLASS_COLUMN: names} | own_columns(source)
        name = _source_name(source.description, source.image_root)
        return _Listing(source.ids, metadata, contents, source.image_root, name, embedder.description())

    def embed(rows):
        try:
            store = cached_store(embedder, source.select(rows, f"{len(rows)} of {source.description}"), **options)
        except NothingReadableError:
            skipped.extend(source.ids[row] for row in rows)
            return [], torch.empty(0, embedder.embedding_dim)
        skipped.extend(store.info.skipped)
        numbers = {source.ids[row]: row for row in rows}
        return [numbers[name] for name in store.ids], store.embeddings

    changes = _sync(place, listing, embed, add_only, lock_timeout)
    changes.skipped = skipped
    return changes


def update_index_from_store(place, store, *, replace=False, add_only=False, lock_timeout=60.0, build=None):
    """[`update_index`] by embeddings that are stored already; nothing is embedded.

    Args:
        store: [`EmbeddingStore`].
        place, replace, add_only, lock_timeout, build: As for [`update_index`].
    """
    if replace or not index_exists(place):
        return _build(place, store, store.ids, store.columns, replace, lock_timeout, build)
    info, contents = store.info, store.contents or [None] * len(store)
    metadata = {CLASS_COLUMN: store.class_names} | store.columns
    name = _source_name(info.data["description"], info.image_root)
    listing = _Listing(store.ids, metadata, contents, info.image_root, name, info.model)
    changes = _sync(place, lambda: listing, lambda rows: (rows, store.embeddings[rows]), add_only, lock_timeout)
    changes.skipped = list(info.skipped)
    return changes


def _build(place, store: EmbeddingStore, all_ids, columns, replace, lock_timeout, build):
    """A new index of a store; the columns are those of all ids, of which the store may have skipped some."""
    ids, info, rows = store.ids, store.info, {name: row for row, name in enumerate(all_ids)}
    metadata = {CLASS_COLUMN: store.class_names}
    metadata |= {name: [values[rows[item]] for item in ids] for name, values in columns.items()}
    name = _source_name(info.data["description"], info.image_root)
    options = {
        "model": info.model,
        "image_root": info.image_root,
        "contents": store.contents,
        "source": {"root": info.image_root, "name": name, "prefix": ""},
    }
    changes = IndexChanges(added=len(ids), total=len(ids), skipped=list(info.skipped))
    if is_milvus(place):
        if build:
            raise ValueError(f"build must be empty for Milvus, which chooses its index itself, got {some(build)}")
        MilvusIndex.build(place, ids, store.embeddings, metadata, replace=replace, **options).close()
    else:
        index = RetrievalIndex.build(ids, store.embeddings, metadata, **options, **(build or {}))
        index.save(place, overwrite=replace, timeout=lock_timeout)
        changes.built, changes.exact = index.info, index.is_exact
    return changes


def _source_name(description, root):
    """What tells a source from others of its folder, wherever that lies: `images in {root}`."""
    name = description.partition(", classes are the folders in ")[0]  # of a list, which may change with its files
    return name if root is None else name.replace(str(root), "{root}")


# ---- In step


def _sync(place, listing, embed, add_only, lock_timeout):
    """Compare, embed what is new on all ranks, change the index. It is locked all the while, and read as it was."""
    with ExitStack() as held:

        def compare():
            index = held.enter_context(edit_index(place, lock_timeout))
            here = listing()
            index.check_model(here.model)
            return index, here, *_compare(index, here)

        found = []
        rows = on_main_rank(lambda: _kept(found, compare(), add_only))
        readable, embeddings = embed(rows) if rows else ([], None)
        return on_main_rank(lambda: _change(*found[0], readable, embeddings, add_only))


def _kept(found, compared, add_only):
    """Rows to embed, which all ranks are told; what belongs to the main rank is kept there."""
    found.append(compared)
    plan = compared[-1]
    return plan.added if add_only else [*plan.added, *plan.changed]


def _compare(index, here):
    """Number of the source in the index (None if it is new), prefix of its ids, and the [`_Plan`]."""
    items = index.items()
    number, prefix = _find_source(index, here, items)
    ids = [prefix + name for name in here.ids]
    plan = _Plan([], [], [], [], [])
    for row, name in enumerate(ids):
        old = items.get(name)
        if old is None:
            plan.added.append(row)
            continue
        _refuse_other_file(index, name, old[SOURCE_COLUMN], here, number, here.ids[row])
        if old[CONTENT_COLUMN] is None or old[CONTENT_COLUMN] != here.contents[row]:
            plan.changed.append(row)
        elif any(old.get(column) != values[row] for column, values in here.metadata.items()) or any(
            old[column] is not None for column in set(index.columns) - set(here.metadata)
        ):
            plan.updated.append(row)
        elif old[SOURCE_COLUMN] != number:
            plan.adopted.append(row)
    there = set(ids)
    gone = (name for name in items if name not in there)
    plan.removed.extend(name for name in gone if _is_gone(index, name, items[name][SOURCE_COLUMN], number, here))
    return number, prefix, plan


def _find_source(index, here, items):
    """Number of a source among those of an index (None: not yet), and the prefix of its ids."""
    known = [*index.sources]
    for number, source in enumerate(known):
        if _same(source["root"], here.root) and source["name"] == here.name:
            return number, source["prefix"]
    if any(item[SOURCE_COLUMN] is None for item in items.values()):
        known.append({"root": index.image_root, "name": None, "prefix": ""})
    for source in known:
        if here.root is not None and _same(source["root"], here.root):
            return None, source["prefix"]
    taken = {source["prefix"] for source in known}
    name = "images" if here.root is None else Path(here.root).name or "images"
    candidates = ["", f"{name}/", *(f"{name}-{number}/" for number in range(2, len(known) + 2))]
    return None, next(prefix for prefix in candidates if prefix not in taken)


def _same(root, other):
    return root == other or (None not in (root, other) and os.path.realpath(root) == os.path.realpath(other))


def _refuse_other_file(index, name, old_source, here, number, own_name):
    """A DataError if an id is that of another file already."""
    if old_source == number and number is not None:
        return
    there = index.path_of(name, old_source)
    if there is None or here.root is None or os.path.realpath(there) != os.path.realpath(Path(here.root, own_name)):
        raise DataError(
            f"the index has the id {name!r} already, of {there or 'an image of another source'}: build it anew, or "
            "another index"
        )


def _is_gone(index, name, source, number, here):
    """Whether an item that the source doesn't have should go: it was the source's, or its file lay in its folder."""
    if number is not None and source == number:
        return True
    root = index.image_root if source is None else index.sources[source]["root"]
    if root is None or here.root is None or not _same(root, here.root):
        return False
    return not Path(index.path_of(name, source)).exists()


def _change(index, here, number, prefix, plan, readable, embeddings, add_only):
    """Bring the index in step with the plan, of whose images some may not be readable."""
    before = plan
    if add_only:
        plan = _Plan(plan.added, [], [], [], [])
    if number is None and (plan.added or plan.changed or plan.updated or plan.adopted):
        number = index.add_source({"root": here.root, "name": here.name, "prefix": prefix})
    columns = _columns(index, here, plan, prefix, add_only)
    if columns != index.columns and (plan.added or not add_only):
        index.set_columns(columns)
    metadata = here.metadata | {
        name: [None] * len(here.ids) for name in index.columns if name not in here.metadata
    }  # columns of other sources

    def rows_of(rows):
        return [prefix + here.ids[row] for row in rows], {
            name: [values[row] for row in rows] for name, values in metadata.items()
        }

    replaced, _ = rows_of(plan.changed)
    if replaced or plan.removed:
        index.remove([*replaced, *plan.removed])
    if readable:
        ids, values = rows_of(readable)
        index.add(ids, embeddings, values, contents=[here.contents[row] for row in readable], source=number)
    if others := [*plan.updated, *plan.adopted]:
        index.update(*rows_of(others), source=number)
    added, changed = len(set(readable) & set(plan.added)), len(set(readable) & set(plan.changed))
    unchanged = len(here.ids) - len(before.added) - len(before.changed) - len(before.updated)
    removed = len(plan.removed) + len(plan.changed) - changed
    left = len([*before.changed, *before.updated, *before.removed]) if add_only else 0
    return IndexChanges(added, changed, removed, len(plan.updated), unchanged, left, total=len(index))


def _columns(index, here, plan, prefix, add_only):
    """Columns that the index needs: those of the source, and those in which another source's items hold something."""
    own = {CLASS_COLUMN: None} | dict.fromkeys(here.metadata)
    if add_only:
        return list(dict.fromkeys([*index.columns, *own]))
    leaving = {prefix + name for name in here.ids} | set(plan.removed)
    others = [item for name, item in index.items().items() if name not in leaving]
    kept = [name for name in index.columns if name in own or any(item[name] is not None for item in others)]
    return list(dict.fromkeys([*kept, *own]))


__all__ = ["IndexChanges", "update_index", "update_index_from_store"]
