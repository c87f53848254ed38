"""An index of embeddings in one folder: faiss for the vectors, Parquet for ids and metadata.

    store = EmbeddingStore.open("runs/photos/embeddings")
    metadata = {"class_name": store.class_names}
    index = RetrievalIndex.build(store.ids, store.embeddings, metadata, model=store.info.model)
    index.save("runs/photos/index")

    index = RetrievalIndex.open("runs/photos/index", embedder=Embedder.from_pretrained("runs/photos"))
    index.search_images(["query.jpg"], k=10, where={"class_name": ["red_mug", "blue_mug"]})

Ids are texts. Inside, each item has an int64 key, given once and never again, under which faiss keeps its vector; the
table is sorted by key.

A folder has `index.json`, which names the two files that belong together. Saving writes new files, then replaces
`index.json`, then deletes the old ones: whenever it stops, the folder holds the old index or the new one. All files
are data: faiss's own format, Parquet and JSON, nothing that can run code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from ..data_scripts.errors import DataError, some
from ..files.atomic import TEMPORARY_SUFFIX, atomic_path
from .factory import choose_factory, effort_of, graph_of, inverted_lists, tune_effort
from .records import load_record, save_record
from .vector_index import Hit, VectorIndex, check_items


FORMAT_VERSION = 1
INDEX_FILE = "index.json"
RECALL_AT = 10
# Up to so many items that pass a filter are compared one by one: an approximate index may not visit them at all.
_COMPARE_ALL = 20_000
_ADD_ROWS = 65_536


@dataclass
class IndexInfo:
    """What `index.json` says.

    Attributes:
        factory: faiss's name of the index.
        reason: Why this one.
        embedding_dim: E.
        model: Who made the embeddings, or None.
        image_root: Folder that the ids are relative to, or None.
        num_items: Items in the index.
        next_key: Key of the next item.
        recall_at_10: Measured against exact search when the index was built, in [0, 1]; 1 for an exact index.
        effort: What that took, as `nprobe 16`; None for an exact index.
        generation: Number in the names of the two other files.
        format_version: Of this layout.
    """

    factory: str
    reason: str
    embedding_dim: int
    model: dict | None = None
    image_root: str | None = None
    num_items: int = 0
    next_key: int = 0
    recall_at_10: float | None = None
    effort: str | None = None
    generation: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def index_name(self):
        return f"index-{self.generation:06d}.faiss"

    @property
    def metadata_name(self):
        return f"metadata-{self.generation:06d}.parquet"


class RetrievalIndex(VectorIndex):
    """Exact or approximate search in one process's memory, or memory-mapped; see [`RetrievalIndex.build`] and `open`.

    Args:
        index: faiss index by inner product, whose ids are keys.
        table: Columns `key` (int64, ascending), `id`, and the metadata.
        info: [`IndexInfo`].
        mapped: Whether the vectors stay on disk, so that nothing can be changed.
    """

    def __init__(self, index, table, info, mapped=False):
        self.info = info
        self._index = index
        self._mapped = mapped
        self._gpu_index = None
        self._set_table(table)

    @property
    def model(self):
        return self.info.model

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
        target_recall=0.95,
        memory_gb=16.0,
        seed=0,
    ):
        """A new index.

        Args:
            ids: n different texts.
            embeddings: `(n, E)` floating-point tensor, L2-normalised.
            metadata: Column -> n texts.
            factory: faiss's name, such as `Flat`, `IVF1024,Flat`, `HNSW32`, `OPQ64,IVF4096,PQ64`; or `auto`, which
                chooses by size ([`choose_factory`]) and says why in `info.reason`.
            model: Who made the embeddings (`Embedder.description`); None where nobody will search by image.
            image_root: Folder that the ids are relative to.
            target_recall: Recall@10 that an approximate index's effort (`nprobe`, `efSearch`) is raised to. What it
                reached is in `info.recall_at_10`.
            memory_gb: What `auto` may take.
            seed: Of the queries that recall is measured with.

        Raises:
            TypeError, ValueError: ids, embeddings and metadata don't fit together, or faiss can't make this index.
        """
        if not 0 <= target_recall <= 1:
            raise ValueError(f"target_recall must be in [0, 1], got {target_recall}")
        if not len(embeddings):
            raise ValueError("an index is built from at least one embedding, got none")
        reason = "as asked for"
        if factory == "auto":
            factory, reason = choose_factory(len(embeddings), embeddings.shape[1], memory_gb)
        info = IndexInfo(factory, reason, embeddings.shape[1], model, None if image_root is None else str(image_root))
        columns = ["key", "id", *(metadata or {})]
        table = pa.table({name: pa.array([], pa.int64() if name == "key" else pa.string()) for name in columns})
        self = cls(_empty_index(factory, embeddings.shape[1]), table, info)
        vectors = self._check_width(embeddings).numpy()
        try:
            self._index.train(vectors)
        except RuntimeError as error:
            raise ValueError(f"faiss can't train {factory!r} with {len(vectors)} embeddings: {error}") from error
        self.add(ids, embeddings, metadata)
        info.recall_at_10 = 1.0
        if not self.is_exact and len(self) > RECALL_AT:
            keys = np.arange(len(self))
            info.recall_at_10 = tune_effort(self._index, vectors, keys, target_recall, RECALL_AT, seed=seed)
            name, effort = effort_of(self._index)
            info.effort = None if name is None else f"{name} {effort}"
        return self

    @property
    def is_exact(self):
        """Whether every search finds the nearest."""
        return isinstance(faiss.downcast_index(getattr(self._index, "index", self._index)), faiss.IndexFlat)

    def add(self, ids, embeddings, metadata=None):
        """Add items; see [`VectorIndex.add`]. Centroids and codebooks stay as they were learned by `build`."""
        self._refuse_mapped("add to")
        vectors = self._check_width(embeddings).numpy()
        ids, columns = check_items(ids, vectors, metadata)
        expected = self._table.column_names[2:]
        if sorted(columns) != sorted(expected):
            raise ValueError(f"metadata must have the columns {expected}, got {sorted(columns)}")
        self.refuse_present(ids)
        keys = np.arange(self.info.next_key, self.info.next_key + len(ids))
        for start in range(0, len(ids), _ADD_ROWS):
            self._index.add_with_ids(vectors[start : start + _ADD_ROWS], keys[start : start + _ADD_ROWS])
        self.info.next_key += len(ids)
        rows = {"key": pa.array(keys), "id": pa.array(ids, pa.string())}
        rows |= {name: pa.array(columns[name], pa.string()) for name in expected}
        self._set_table(pa.concat_tables([self._table, pa.table(rows)]).combine_chunks())

    def remove(self, ids):
        """Remove items; see [`VectorIndex.remove`]. A graph can't, nor can a few other indexes of faiss."""
        self._refuse_mapped("remove from")
        keys = self._keys(ids)
        if graph_of(self._index) is not None:
            raise ValueError(
                f"{self.info.factory} can't remove: the graph's other items are reached through them. Build the index "
                "anew without these items, or choose an IVF or Flat index"
            )
        try:
            self._index.remove_ids(keys)
        except RuntimeError as error:
            raise ValueError(f"{self.info.factory} can't remove items ({error}); build the index anew") from error
        self._set_table(self._table.filter(pc.invert(pc.is_in(self._table.column("key"), pa.array(keys)))))

    # ---- Searching

    def search(self, embeddings, k=10, where=None, containing=None):
        """See [`VectorIndex.search`]. Among equal similarities the item that was added first comes first."""
        queries = self._check_queries(embeddings, k).numpy()
        k = min(k, len(self))
        keys = self._keys_that_pass(where, containing) if where or containing else None
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
        wanted = self._table.drop_columns(["key"]).take(pa.array(rows.ravel())).to_pylist()
        results = []
        for query in range(len(found)):
            items = wanted[query * found.shape[1] : (query + 1) * found.shape[1]]
            results.append(
                [
                    Hit(item.pop("id"), float(value), item)
                    for item, value, key in zip(items, similarity[query], found[query], strict=True)
                    if key >= 0
                ]
            )
        return results

    def embeddings_of(self, ids):
        """See [`VectorIndex.embeddings_of`]."""
        return F.normalize(torch.from_numpy(self._vectors(self._keys(ids))), dim=1)

    def _vectors(self, keys):
        return self._index.reconstruct_batch(np.ascontiguousarray(keys))

    def _keys_that_pass(self, where, containing):
        """Keys of the items that pass a filter, ascending."""
        columns = self._table.column_names[1:]
        masks = []
        for name, values in (where or {}).items():
            if name not in columns:
                raise ValueError(f"there is no column {name!r}; the columns are {columns}")
            values = [values] if isinstance(values, str) else list(values)
            masks.append(pc.is_in(self._table.column(name), pa.array(values, pa.string())))
        if containing:
            found = [pc.match_substring(self._table.column(name), containing, ignore_case=True) for name in columns]
            masks.append(reduce(pc.or_, found))
        return self._table_keys[reduce(pc.and_, masks).to_numpy()]

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

    def save(self, folder):
        """Write the index to a folder, or replace the one that is there; see the module for what happens when.

        Raises:
            DataError: the folder holds something else.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX_FILE).is_file():
            self.info.generation = load_record(IndexInfo, folder / INDEX_FILE, "index").generation + 1
        elif others := [p.name for p in folder.iterdir() if not p.name.startswith((".", "index-", "metadata-"))]:
            raise DataError(f"{folder} must be a new or empty folder or an index, got one with {some(sorted(others))}")
        self.info.num_items = len(self)
        with atomic_path(folder / self.info.index_name) as path:
            faiss.write_index(self._index, str(path))
        with atomic_path(folder / self.info.metadata_name) as path:
            pq.write_table(self._table, path, compression="zstd")
        save_record(folder / INDEX_FILE, self.info)
        kept = {INDEX_FILE, self.info.index_name, self.info.metadata_name}
        for pattern in ("index-*.faiss", "metadata-*.parquet", f".*{TEMPORARY_SUFFIX}"):
            for path in folder.glob(pattern):
                if path.name not in kept:
                    path.unlink()

    @classmethod
    def open(cls, folder, embedder=None, *, mmap=False):
        """Open a saved index.

        Args:
            folder: Where it was saved.
            embedder: The model that searches by image will use.
            mmap: Leave the vectors on disk and read what a search visits: opening takes no time and little memory,
                and several processes share it. Such an index can't be changed.

        Raises:
            DataError: there is no index, or its files don't belong together.
            IndexMismatchError: the embedder is not the model that made the embeddings.
        """
        folder = Path(folder)
        info = load_record(IndexInfo, folder / INDEX_FILE, "index")
        flags = 0
        if mmap and "fs" in info.factory.rpartition("PQ")[2]:
            raise ValueError(f"faiss can't memory-map {info.factory}: open it with mmap=False")
        if mmap:  # lists are mapped by one flag, plain vectors and graphs by the other
            lists = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            flags = lists if "IVF" in info.factory else faiss.IO_FLAG_MMAP_IFC
        try:
            index = faiss.read_index(str(folder / info.index_name), flags)
            with pq.ParquetFile(folder / info.metadata_name) as file:
                table = file.read()
        except (OSError, RuntimeError, pa.ArrowInvalid) as error:
            raise DataError(f"the index in {folder} can't be read: {error}") from error
        if not index.ntotal == len(table) == info.num_items:
            raise DataError(
                f"the files of the index in {folder} don't belong together: {index.ntotal} vectors, {len(table)} rows "
                f"of metadata, {info.num_items} expected"
            )
        self = cls(index, table, info, mapped=mmap)
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

    def sample_ids(self, count):
        """See [`VectorIndex.sample_ids`]; spread evenly over the index."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)
        return self._table.column("id").take(pa.array(rows)).to_pylist()

    def _keys(self, ids):
        return np.array([self._key_of[name] for name in self.require(ids)], dtype=np.int64)

    def _refuse_mapped(self, verb):
        if self._mapped:
            raise ValueError(f"can't {verb} a memory-mapped index: open it with mmap=False")


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


__all__ = ["IndexInfo", "RetrievalIndex"]
