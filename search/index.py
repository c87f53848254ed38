"""An index of embeddings in one folder: faiss for the vectors, Parquet for ids and metadata.

    store = EmbeddingStore.open("runs/photos/embeddings")
    metadata = {"class_name": store.class_names}
    index = RetrievalIndex.build(store.ids, store.embeddings, metadata, model=store.info.model)
    index.save("runs/photos/index")

    index = RetrievalIndex.open("runs/photos/index", embedder=Embedder.from_pretrained("runs/photos"))
    index.search_images(["query.jpg"], k=10, where={"class_name": ["red_mug", "blue_mug"]})

Ids are texts. Inside, each item has an int64 key, given once and never again, under which faiss keeps its vector; the
table is sorted by key.

What its folder holds, and who may write there, is in `index_files`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from ..data_scripts.data_errors import DataError
from ..eval.checks import check_embeddings
from .columns import (
    CONTENT_COLUMN,
    HIDDEN_COLUMNS,
    SOURCE_COLUMN,
    arrow_column,
    check_items,
    kind_of,
    kind_of_arrow,
)
from .index_factory import (
    choose_factory,
    effort_of,
    graph_of,
    inverted_lists,
    quantised_factory,
    tune_effort,
)
from .index_files import (
    INDEX_FILE,
    DamagedIndexError,
    IndexChangedError,
    IndexInfo,
    find_info,
    folder_state,
    index_lock,
    read_index,
    write_index,
)
from .item_table import as_table, passes, with_hidden, with_rows
from .journal import JOURNAL_FILE, apply_change
from .projection import learn_projection
from .records import check_model, load_record
from .rescoring import remove_keys, rescoring_of, search_rescoring
from .vector_index import Hit, VectorIndex


RECALL_AT = 10
# Up to so many items that pass a filter are compared one by one: an approximate index may not visit them at all.
_COMPARE_ALL = 20_000
_ADD_ROWS = 65_536


class RetrievalIndex(VectorIndex):
    """Exact or approximate search in one process's memory, or memory-mapped; see [`RetrievalIndex.build`] and `open`.

    Args:
        index: faiss index by inner product, whose ids are keys.
        table: Columns `key` (int64, ascending), `id`, and the metadata.
        info: [`IndexInfo`].
        mapped: Whether the vectors stay on disk, so that nothing can be changed.
        projection: [`Projection`] of embeddings before they are added or compared, or None.
    """

    def __init__(self, index, table, info, mapped=False, projection=None):
        self.info = info
        self._index = index
        self._projection = projection
        self._mapped = mapped
        self._gpu_index = None
        self._states = {}  # of the folders that this index was opened from or saved to: what they held then
        self._set_table(with_hidden(table))

    @property
    def model(self):
        return self.info.model

    @property
    def columns(self):
        return [name for name in self._table.column_names[2:] if name not in HIDDEN_COLUMNS]

    @property
    def sources(self):
        return self.info.sources

    @property
    def embedding_dim(self):
        return self.info.embedding_dim

    @property
    def image_root(self):
        return self.info.image_root

    @property
    def ids(self):
        """n texts, in the order in which they were added."""
        return self._table.column("id").to_pylist()

    def __len__(self):
        return len(self._table)

    # ---- Building

    @classmethod
    def build(
        cls,
        ids,
        embeddings,
        metadata=None,
        *,
        factory="auto",
        model=None,
        image_root=None,
        contents=None,
        source=None,
        target_recall=0.95,
        memory_gb=16.0,
        projection=None,
        dim=None,
        quantise=None,
        seed=0,
    ):
        """A new index.

        Args:
            ids: n different texts.
            embeddings: `(n, E)` floating-point tensor or array of numpy, L2-normalised.
            metadata: Column -> n texts, or n numbers, or None among either.
            factory: faiss's name, such as `Flat`, `IVF1024,Flat`, `HNSW32`, `OPQ64,IVF4096,PQ64`; or `auto`, which
                chooses by size ([`choose_factory`]) and says why in `info.reason`.
            model: Who made the embeddings (`Embedder.description`); None where nobody will search by image.
            image_root: Folder that the ids are relative to.
            contents: As for `add`.
            source: Where the items come from, as in `sources`; None where nobody will bring the index in step with it.
            target_recall: Recall@10 that an approximate index's effort (`nprobe`, `efSearch`, `k_factor`) is raised
                to. What it reached is in `info.recall_at_10`, against exact search of what is projected.
            memory_gb: What `auto` may take.
            projection: `pca`, `whiten` or `truncate`: embeddings are made shorter, or whitened, before they are
                added or compared, queries alike; see [`Projection.learn`]. Similarities are those of what comes out.
            dim: Width of what comes out.
            quantise: `int8` or `binary`: vectors are kept in fewer bytes; see [`quantised_factory`].
            seed: Of the queries that recall is measured with.

        Raises:
            TypeError, ValueError: ids, embeddings and metadata don't fit together, or faiss can't make this index.
        """
        if not 0 <= target_recall <= 1:
            raise ValueError(f"target_recall must be in [0, 1], got {target_recall}")
        if not len(embeddings):
            raise ValueError("an index is built from at least one embedding, got none")
        check_model(model, "an index")
        embeddings = check_embeddings(embeddings, "embeddings")
        ids, columns = check_items(ids, embeddings, metadata)
        info = IndexInfo("", "", embeddings.shape[1], model, None if image_root is None else str(image_root))
        info.sources, info.quantise = [] if source is None else [source], quantise
        learned, info.projection = learn_projection(projection, dim, embeddings)
        width = embeddings.shape[1] if learned is None else learned.dim
        info.factory, info.reason = _factory(factory, len(embeddings), width, memory_gb, quantise)
        empty = as_table([], [], {name: arrow_column([], kind_of(values)) for name, values in columns.items()})
        self = cls(_empty_index(info.factory, width), empty, info, projection=learned)
        vectors = self._project(self._check_width(embeddings)).numpy()
        try:
            self._index.train(vectors)
        except RuntimeError as error:
            raise ValueError(f"faiss can't train {info.factory!r} with {len(vectors)} embeddings: {error}") from error
        self.add(ids, embeddings, columns, contents=contents, source=None if source is None else 0)
        info.recall_at_10 = 1.0
        if not self.is_exact and len(self) > RECALL_AT:
            keys = np.arange(len(self))
            info.recall_at_10 = tune_effort(self._index, vectors, keys, target_recall, RECALL_AT, seed=seed)
            name, effort = effort_of(self._index)
            info.effort = None if name is None else f"{name} {effort:g}"
        return self

    @property
    def is_exact(self):
        """Whether every search finds the nearest."""
        return isinstance(faiss.downcast_index(getattr(self._index, "index", self._index)), faiss.IndexFlat)

    def add(self, ids, embeddings, metadata=None, *, contents=None, source=None):
        """Add items; see [`VectorIndex.add`]. Centroids and codebooks stay as they were learned by `build`."""
        self._refuse_mapped("add to")
        ids, embeddings, columns = self._check_added(ids, embeddings, metadata)
        vectors = self._project(embeddings).numpy()
        keys = np.arange(self.info.next_key, self.info.next_key + len(ids))
        columns |= {CONTENT_COLUMN: contents or [None] * len(ids), SOURCE_COLUMN: [source] * len(ids)}
        table = with_rows(self._table, keys, ids, columns).combine_chunks()
        self.info.next_key += len(ids)  # first: a key is never given again, whatever happens now
        for start in range(0, len(ids), _ADD_ROWS):
            self._index.add_with_ids(vectors[start : start + _ADD_ROWS], keys[start : start + _ADD_ROWS])
        self._set_table(table)

    def update(self, ids, metadata, *, source=None):
        """Give items other metadata; see [`VectorIndex.update`]."""
        self._refuse_mapped("change")
        ids, columns = self._check_updated(ids, metadata)
        keys = self._keys(ids)
        changed = pc.is_in(self._table.column("key"), pa.array(keys))
        before = self._table.filter(changed)
        order = pc.index_in(pa.array(keys), before.column("key").combine_chunks())
        contents = before.column(CONTENT_COLUMN).take(order).to_pylist()
        columns |= {CONTENT_COLUMN: contents, SOURCE_COLUMN: [source] * len(ids)}
        table = with_rows(self._table.filter(pc.invert(changed)), keys, ids, columns)
        self._set_table(table.sort_by("key").combine_chunks())

    def set_columns(self, columns):
        """Have these columns from now on; see [`VectorIndex.set_columns`]."""
        self._refuse_mapped("change")
        table = self._table.select(["key", "id", *(name for name in columns if name in self.columns), *HIDDEN_COLUMNS])
        for name in columns:
            if name not in self.columns:
                table = table.append_column(name, arrow_column([None] * len(table)))
        self._set_table(table)

    def remove(self, ids):
        """Remove items; see [`VectorIndex.remove`]. A graph can't, nor can a few other indexes of faiss."""
        self._refuse_mapped("remove from")
        keys = self._keys(ids)
        self.check_removable()
        table = self._table.filter(pc.invert(pc.is_in(self._table.column("key"), pa.array(keys))))
        try:
            remove_keys(self._index, keys)
        except RuntimeError as error:
            raise ValueError(f"{self.info.factory} can't remove items ({error}); build the index anew") from error
        self._set_table(table)

    def check_removable(self):
        """See [`VectorIndex.check_removable`]."""
        if graph_of(self._index) is not None:
            raise ValueError(
                f"{self.info.factory} can't remove: the graph's other items are reached through them. Build the index "
                "anew without these items, or choose an IVF or Flat index"
            )

    def _check_kinds(self, columns):
        count = len(next(iter(columns.values()), []))
        keys = range(self.info.next_key, self.info.next_key + count)
        hidden = {name: [None] * count for name in HIDDEN_COLUMNS}
        try:
            with_rows(self._table, keys, [""] * count, columns | hidden)
        except (pa.ArrowInvalid, OverflowError) as error:  # a fraction beside whole numbers that no float holds, say
            raise ValueError(f"the index can't hold these values beside those that it has: {error}") from error

    def add_source(self, source):
        """See [`VectorIndex.add_source`]."""
        self.sources.append(source)
        return len(self.sources) - 1

    def items(self, ids=None):
        """See [`VectorIndex.items`]."""
        table = self._table
        if ids is not None:
            table = table.take(pa.array(np.searchsorted(self._table_keys, self._keys(ids))))
        return {row.pop("id"): row for row in table.drop_columns(["key"]).to_pylist()}

    # ---- Searching

    def _project(self, embeddings):
        return embeddings if self._projection is None else self._projection(embeddings)

    def _nearest(self, queries, k, conditions, containing):
        """See [`VectorIndex.search`]. Among equal similarities the item that was added first comes first."""
        queries, k = queries.numpy(), min(k, len(self))
        keys = self._keys_that_pass(conditions, containing) if conditions or containing else None
        if k == 0 or (keys is not None and not len(keys)):
            return [[] for _ in queries]
        similarity, found = self._search_keys(queries, k, keys)
        order = np.lexsort((found, -similarity))
        similarity, found = (np.take_along_axis(values, order, 1) for values in (similarity, found))
        return self._hits(similarity, found)

    def _search_keys(self, queries, k, keys):
        """Similarities `(Q, k)` and keys, -1 where fewer were found; among all items, or those of `keys`."""
        if keys is None:
            searcher = self._index if self._gpu_index is None else self._gpu_index
            return searcher.search(queries, k)
        k = min(k, len(keys))
        if not self.is_exact and len(keys) <= _COMPARE_ALL:
            similarity, found = faiss.knn(queries, self._vectors(keys), k, metric=faiss.METRIC_INNER_PRODUCT)
            return similarity, keys[found]
        if rescoring_of(self._index) is not None:
            return search_rescoring(self._index, queries, k, keys)
        # faiss's additions for torch, which other packages import, replace `search` by one without `params`
        search = getattr(self._index, "search_numpy", self._index.search)
        return search(queries, k, params=self._parameters(faiss.IDSelectorBatch(keys)))

    def _parameters(self, selector):
        """Search parameters of the index's type that carry a selector and leave its effort as it is."""
        name, effort = effort_of(self._index)
        if name is None:
            return faiss.SearchParameters(sel=selector)
        if name == "efSearch":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=effort)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=effort)
        if isinstance(self._index, faiss.IndexPreTransform):
            return faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    def _hits(self, similarity, found):
        rows = np.searchsorted(self._table_keys, found.clip(0)).clip(max=len(self) - 1)
        if ((self._table_keys[rows] != found) & (found >= 0)).any():
            raise DamagedIndexError(
                "this index has vectors without rows: adding to it was interrupted, or it is damaged and was opened "
                "without verifying. Open it again"
            )
        wanted = self._table.drop_columns(["key"]).take(pa.array(rows.ravel())).to_pylist()
        results = []
        for query in range(len(found)):
            items = wanted[query * found.shape[1] : (query + 1) * found.shape[1]]
            results.append(
                [
                    self._hit(item, float(value))
                    for item, value, key in zip(items, similarity[query], found[query], strict=True)
                    if key >= 0
                ]
            )
        return results

    def _hit(self, item, similarity):
        name, source = item.pop("id"), item.pop(SOURCE_COLUMN)
        item.pop(CONTENT_COLUMN)
        return Hit(name, similarity, item, self.path_of(name, source))

    def _paths(self, ids):
        rows = pa.array(np.searchsorted(self._table_keys, self._keys(ids)))
        sources = self._table.column(SOURCE_COLUMN).take(rows).to_pylist()
        return [self.path_of(name, source) for name, source in zip(ids, sources, strict=True)]

    def embeddings_of(self, ids):
        """See [`VectorIndex.embeddings_of`]; of an index with a projection those of its space, `(n, dim)`."""
        return F.normalize(torch.from_numpy(self._vectors(self._keys(ids))), dim=1)

    def _vectors(self, keys):
        return self._index.reconstruct_batch(np.ascontiguousarray(keys))

    def ids_where(self, where, containing=None):
        """See [`VectorIndex.ids_where`]."""
        keys = self._keys_that_pass(self._conditions(where), containing)
        return self._table.filter(pc.is_in(self._table.column("key"), pa.array(keys))).column("id").to_pylist()

    def values_of(self, column):
        """See [`VectorIndex.values_of`]."""
        return pc.drop_null(pc.unique(self._table.column(column))).to_pylist()

    def _kinds(self):
        return {name: kind_of_arrow(self._table.schema.field(name).type) for name in ["id", *self.columns]}

    def _keys_that_pass(self, conditions, containing):
        """Keys of the items that pass a filter, ascending."""
        mask = pa.array(np.ones(len(self), dtype=bool))
        for condition in conditions:
            mask = pc.and_(mask, passes(self._table.column(condition.column), condition))
        if containing:
            texts = [name for name, kind in self._kinds().items() if kind == "text"]
            found = [pc.match_substring(self._table.column(name), containing, ignore_case=True) for name in texts]
            mask = pc.and_(mask, reduce(pc.or_, [pc.fill_null(matches, False) for matches in found]))
        return self._table_keys[mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy()]

    def use_gpus(self):
        """Search on the GPUs that faiss sees, until the index is changed; filters stay on the CPU.

        Raises:
            ValueError: faiss sees none (the package `faiss-cpu` never does), or can't run this index on one.
        """
        if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
            raise ValueError("this faiss sees no GPU; faiss-gpu in place of faiss-cpu does")
        try:
            self._gpu_index = faiss.index_cpu_to_all_gpus(self._index)
        except RuntimeError as error:
            raise ValueError(f"faiss can't run {self.info.factory} on a GPU: {error}") from error
        return self

    # ---- Files

    def save(self, folder, *, overwrite=True, timeout=60.0):
        """Write the index to a folder, or replace the one that is there, all files at once.

        Args:
            folder: New, empty or that of an index.
            overwrite: Whether an index may be there that this one was not opened from.
            timeout: Seconds to wait for another process that is changing the index there.

        Raises:
            DataError: the folder holds something else, or an index that was not to be replaced.
            IndexChangedError: this index was opened from the folder, and another process has saved to it since.
            InUseError: another process was changing it all that time.
        """
        folder = Path(folder)
        find_info(folder)  # refuses a folder of something else before a lock is left in it
        with index_lock(folder, timeout):
            there, known = find_info(folder), self._states.get(folder.resolve())
            if there is not None and known is None and not overwrite:
                raise DataError(f"{folder} holds an index already: give another folder, or add to that one")
            if there is not None and known not in (None, folder_state(folder, there)):
                raise IndexChangedError(
                    f"the index in {folder} has been changed by another process since it was opened or saved here: "
                    "open it again and repeat the changes, or use edit_index, which keeps others waiting"
                )
            self.save_held(folder)

    def save_held(self, folder):
        """[`save`][RetrievalIndex.save] to a folder whose lock the caller holds."""
        folder = Path(folder)
        self.info = write_index(folder, self._index, self._table, self.info, self._projection)
        self._states[folder.resolve()] = folder_state(folder, self.info)

    @classmethod
    @contextmanager
    def edit(cls, folder, timeout=60.0):
        """Open an index, lock it, and save what was changed when the block ends; see [`edit_index`]."""
        folder = Path(folder)
        load_record(IndexInfo, folder / INDEX_FILE, "index")  # or the lock would make a folder
        with index_lock(folder, timeout):
            self = cls.open(folder)
            before = self._table
            yield self
            if self._table is not before or (folder / JOURNAL_FILE).exists():
                self.save_held(folder)

    @classmethod
    def open(cls, folder, embedder=None, *, mmap=False, verify=True):
        """Open a saved index.

        Args:
            folder: Where it was saved.
            embedder: The model that searches by image will use.
            mmap: Leave the vectors on disk and read what a search visits: opening takes little memory, and several
                processes share it. Such an index can't be changed.
            verify: Read the files through and compare them with the checksums of what was saved, so that no damage
                goes unnoticed. Without, opening with `mmap` takes no time.

        Raises:
            DataError: there is no index, its files are damaged or don't belong together.
            IndexMismatchError: the embedder is not the model that made the embeddings.
        """
        index, projection, table, info, changes, state = read_index(folder, mmap, verify)
        self = cls(index, table, info, mapped=mmap, projection=projection)
        if mmap and changes:
            raise ValueError(
                f"{folder} holds {len(changes)} changes that a service took and that are not in its files yet "
                f"({JOURNAL_FILE}): open it with mmap=False, or stop the service, or bring the index in step once"
            )
        for change in changes:
            apply_change(self, change)
        self._states[Path(folder).resolve()] = state
        return self if embedder is None else self.use_embedder(embedder)

    # ---- The table

    def _set_table(self, table):
        self._table = table
        self._table_keys = table.column("key").to_numpy()
        self._ids_to_keys = None
        self._gpu_index = None

    @property
    def _key_of(self):
        """Id -> key; made when the first id is looked up."""
        if self._ids_to_keys is None:
            self._ids_to_keys = dict(zip(self.ids, self._table_keys.tolist(), strict=True))
        return self._ids_to_keys

    def present(self, ids):
        """See [`VectorIndex.present`]."""
        return {name for name in ids if name in self._key_of}

    def list_items(self, count, start=0, containing=None, one_per=None):
        """See [`VectorIndex.list_items`]; in the order in which they were added."""
        keys = self._keys_that_pass([], containing) if containing else self._table_keys
        if one_per is not None:
            if one_per not in self.columns:
                raise ValueError(f"there is no column {one_per!r}; the columns are {self.columns}")
            values = self._table.column(one_per).take(pa.array(np.searchsorted(self._table_keys, keys))).to_pylist()
            first = {
                key if value in ("", None) else (value,): key
                for key, value in zip(keys[::-1], values[::-1], strict=True)
            }
            keys = np.sort(np.fromiter(first.values(), np.int64, len(first)))
        chosen = keys[start : start + count]
        if not len(chosen):
            return [], len(keys)
        return self._hits(np.full((1, len(chosen)), np.nan), chosen[None])[0], len(keys)

    def _keys(self, ids):
        return np.array([self._key_of[name] for name in self.require(ids)], dtype=np.int64)

    def _refuse_mapped(self, verb):
        if self._mapped:
            raise ValueError(f"can't {verb} a memory-mapped index: open it with mmap=False")


def _factory(factory, num_items, width, memory_gb, quantise):
    """Factory string and reason of what was asked for."""
    if factory.startswith("PCAW"):
        raise ValueError(
            f"factory {factory!r} would compare what is not normalised: projection='whiten' and dim do that"
        )
    reason = "as asked for"
    if factory == "auto":
        factory, reason = choose_factory(num_items, width, memory_gb, quantise)
    return quantised_factory(factory, quantise), reason


def _empty_index(factory, embedding_dim):
    """faiss index whose ids are keys of our choice, and that gives vectors back by key."""
    try:
        index = faiss.index_factory(embedding_dim, factory, faiss.METRIC_INNER_PRODUCT)
        lists = inverted_lists(index)
        if lists is not None:
            lists.set_direct_map_type(faiss.DirectMap.Hashtable)
            return index
    except RuntimeError as error:
        raise ValueError(f"faiss can't make {factory!r} for width {embedding_dim}: {error}") from error
    return index if isinstance(index, faiss.IndexIDMap2) else faiss.IndexIDMap2(index)


__all__ = ["IndexChangedError", "IndexInfo", "RetrievalIndex"]
