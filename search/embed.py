"""Embed a source of images into a store: resumable, on several processes, cached by model and content.

    from vptsp import Embedder, cached_store, folder_source

    store = cached_store(Embedder.from_pretrained("runs/photos"), folder_source("photos"))

Under `torchrun`, rank r of w writes every w-th of the shards that are missing. Nothing is gathered: the shards on disk
are the result, and the same whatever the number of processes. An engine ([`RayEngine`]) computes shards elsewhere;
they are written here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from huggingface_hub import constants
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data_scripts.data_errors import DataError, ImageError
from ..data_scripts.data_fingerprint import content_digest
from ..eval.embedding_loop import embed_batches
from .columns import arrow_column, own_columns
from .store import (
    EMBEDDING_DTYPES,
    EmbeddingStore,
    StoreInfo,
    begin_store,
    find_store,
    finish_store,
    missing_shards,
    store_lock,
    write_shard,
)
from .worker_counts import choose_workers


def cached_store(embedder, source, cache_dir=None, **options):
    """The store of these embeddings in the cache, made if it is not there.

    Its folder is named by the fingerprints of model and data, so neither an image nor a weight can change unnoticed.

    Args:
        embedder, source, **options: As for [`embed_to_store`].
        cache_dir: Folder of all cached stores; None for `vptsp/embeddings` beside the caches of Hugging Face.

    Returns:
        [`EmbeddingStore`].
    """
    cache_dir = Path(constants.HF_HOME) / "vptsp" / "embeddings" if cache_dir is None else Path(cache_dir)
    engine, progress = options.get("engine"), options.get("progress", True)
    data_fingerprint = on_main_rank(lambda: data_fingerprint_of(source, engine, progress))
    dtype = str(embedder.dtype).removeprefix("torch.")
    folder = cache_dir / f"{embedder.fingerprint[:16]}-{data_fingerprint[:16]}-{dtype}"
    return embed_to_store(embedder, source, folder, data_fingerprint=data_fingerprint, **options)


def embed_to_store(
    embedder,
    source,
    folder,
    *,
    num_workers=None,
    shard_size=1024,
    embedding_dtype="float32",
    skip_corrupt=False,
    progress=True,
    data_fingerprint=None,
    lock_timeout=60.0,
    engine=None,
):
    """Embed all images of a source into a folder, or what is still missing there.

    Args:
        embedder: [`Embedder`].
        source: `ImageSource`.
        folder: New, or with what an earlier run of the same model on the same data has left.
        num_workers: Processes that decode images while the model runs; 0: this one; None: see [`choose_workers`]. With
            an engine: of each of its workers, and None is one less than its CPUs.
        shard_size: Rows of a shard: what an interruption may cost, and what is shared out between processes.
        embedding_dtype: `float32`, or `float16` for half the size.
        skip_corrupt: Leave out images that can't be read, and list them, instead of stopping.
        progress: Show progress bars (of rank 0).
        data_fingerprint: The source's fingerprint, if it is known already.
        lock_timeout: Seconds to wait for another run that writes the same store.
        engine: [`RayEngine`], which embeds on other processes and machines; None: this process does.

    Returns:
        [`EmbeddingStore`], complete.

    Raises:
        InUseError: another run was writing the store all that time.
        ImageError: an image can't be read; the message names it.
        DataError: the folder holds something else.
        ValueError: an option is out of range.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be >= 1, got {shard_size}")
    if embedding_dtype not in EMBEDDING_DTYPES:
        raise ValueError(f"embedding_dtype must be one of {', '.join(EMBEDDING_DTYPES)}, got {embedding_dtype!r}")

    columns = {name: arrow_column(values) for name, values in own_columns(source).items()}

    def prepare():
        fingerprint = data_fingerprint or data_fingerprint_of(source, engine, progress)
        info = StoreInfo(
            model=embedder.description(),
            data={"description": source.description, "fingerprint": fingerprint},
            num_images=len(source),
            embedding_dim=embedder.embedding_dim,
            embedding_dtype=embedding_dtype,
            shard_size=shard_size,
            image_root=source.image_root,
        )
        found = find_store(folder, info)  # refuses a folder of something else before a lock is left in it
        if found is not None and found.complete:
            return found
        held.enter_context(store_lock(folder, lock_timeout))
        return begin_store(folder, info)

    with ExitStack() as held:  # the main rank's lock, for all ranks
        info = on_main_rank(prepare)
        if not info.complete:
            rank, world_size = _rank_and_world_size()
            shards = on_main_rank(lambda: missing_shards(folder, info))[rank::world_size]
            jobs = [(shard, info.shard_rows(shard)) for shard in shards]
            if engine is None:
                workers = choose_workers(len(source)) if num_workers is None else num_workers
                finished = embed_shards(embedder, source, jobs, workers, skip_corrupt, progress and rank == 0)
            else:
                finished = engine.embed_shards(embedder, source, jobs, num_workers, skip_corrupt, progress)
            with closing(finished):
                for shard, parts in finished:
                    _write_parts(folder, info, source, columns, shard, parts)
            _barrier()
            on_main_rank(lambda: finish_store(folder, info))
    return EmbeddingStore.open(folder)


def embed_shards(embedder, source, jobs, num_workers, skip_corrupt, progress):
    """Embed some shards, in batches that don't reach from one into the next.

    Args:
        embedder, source, num_workers, skip_corrupt, progress: As for [`embed_to_store`].
        jobs: Pairs of a shard's number and its rows.

    Yields:
        Shard after shard, its number and its parts: rows that were asked for, those that could be read, their
        embeddings and the digests of their contents.
    """
    size = embedder.batch_size
    batches = [
        (shard, list(rows[start : start + size])) for shard, rows in jobs for start in range(0, len(rows), size)
    ]
    loader = DataLoader(
        _Rows(source, embedder.preprocess, skip_corrupt),
        batch_sampler=[rows for _, rows in batches],
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=embedder.device.type == "cuda",
    )
    none = torch.empty(0, embedder.embedding_dim)
    sizes = [len(rows) for _, rows in batches]
    embedded = embed_batches(
        zip(sizes, loader, strict=True),
        lambda batch: embedder.embed_pixels(batch[1]) if batch[0] else none,
        total=sum(sizes),
        hidden=not progress,
    )
    parts = []
    for i, ((readable, _, contents), embeddings) in enumerate(embedded):
        shard, rows = batches[i]
        parts.append((rows, readable, embeddings, contents))
        if i + 1 == len(batches) or batches[i + 1][0] != shard:
            yield shard, parts
            parts = []


def _write_parts(folder, info, source, columns, shard, parts):
    rows = [row for _, readable, _, _ in parts for row in readable]
    skipped = [source.ids[row] for asked, readable, _, _ in parts for row in asked if row not in readable]
    write_shard(
        folder,
        info,
        shard,
        ids=[source.ids[row] for row in rows],
        labels=source.labels[rows],
        class_names=[source.class_name(row) for row in rows],
        embeddings=torch.cat([embeddings for _, _, embeddings, _ in parts]),
        skipped=skipped,
        contents=[content for *_, contents in parts for content in contents],
        columns={name: values.take(pa.array(rows, pa.int64())) for name, values in columns.items()},
    )


class _Rows(Dataset):
    """Preprocessed images of a source: `(row, pixel_values, digest of the content)`, or None twice for one skipped."""

    def __init__(self, source, preprocess, skip_corrupt):
        self.source = source
        self.preprocess = preprocess
        self.skip_corrupt = skip_corrupt

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        stored = self.source.stored(row)
        try:
            pixels = self.preprocess(stored, stored if isinstance(stored, str) else self.source.ids[row])
            return row, pixels, content_digest(stored).hex()
        except ImageError:
            if not self.skip_corrupt:
                raise
            return row, None, None


def _collate(examples):
    """Rows that could be read, their `pixel_values` (None if there are none), and digests of their contents."""
    readable = [example for example in examples if example[1] is not None]
    if not readable:
        return [], None, []
    rows, pixels, contents = zip(*readable, strict=True)
    return list(rows), torch.stack(pixels), list(contents)


def data_fingerprint_of(source, engine, progress):
    """The fingerprint of a source, whose images an engine reads if there is one."""
    contents = None if engine is None else engine.contents(source)
    return source.fingerprint(reading_bar(source, progress), contents)


def reading_bar(source, progress):
    def bar(rows, total):
        return tqdm(rows, "Reading", total=total, unit="image", disable=not progress or total < 1000, leave=False)

    return bar


def _rank_and_world_size():
    """Of this process under `torchrun`; (0, 1) without."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        # One rank may have more to do than another, and the main rank hashes alone
        dist.init_process_group("gloo", timeout=timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


def _barrier():
    if _rank_and_world_size()[1] > 1:
        dist.barrier()


def on_main_rank(compute):
    """What `compute` gives on rank 0, on all ranks; its error too, so that no rank waits for one that has stopped."""
    rank, world_size = _rank_and_world_size()
    if world_size == 1:
        return compute()
    outcome = [None]
    if rank == 0:
        try:
            outcome = [(compute(), None)]
        except Exception as error:
            outcome = [(None, f"{error}")]
            dist.broadcast_object_list(outcome)
            raise
    dist.broadcast_object_list(outcome)
    value, error = outcome[0]
    if error is not None:
        raise DataError(error)
    return value


__all__ = ["cached_store", "data_fingerprint_of", "embed_shards", "embed_to_store", "on_main_rank", "reading_bar"]
