"""Embedding on the processes and machines of a Ray cluster.

    vptsp embed --model facebook/dinov2-small --images s3://bucket/photos --output store --engine ray

A shard of the store is one task: its rows, in the batches of a single process, so that the embeddings are the same.
Workers (Ray calls them actors) each hold one `Embedder`; this process writes the shards as they come. A shard that Ray
computes twice, since a worker died, is written once, and one that is written is not asked for again.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data_scripts.data_errors import DataError
from ..data_scripts.data_fingerprint import content_digest
from .embed import embed_shards


_READ_AT_ONCE = 1024
_MOST_ATTEMPTS = 4
"""Of a shard: an image that ends every worker must not go round for ever, as Ray lets it."""


class EngineError(OSError):
    """The engine failed: its workers died too often, or the cluster is gone. What is written stays."""


@dataclass
class RayEngine:
    """Where embeddings are computed, as `engine` of `embed_to_store`.

    It takes the cluster of `ray.init()`: the one of this process, of `RAY_ADDRESS`, or that runs on this machine; else
    Ray is started here, for as long as this process lasts.

    Args:
        load: Picklable function that makes the `Embedder` in a worker; the model must be there, as a name on the Hub
            or a folder that all machines see.
        workers: How many; None: as many as the cluster's CPUs (or GPUs) suffice for.
        cpus: CPUs of each; the worker and its `num_workers` decoding processes share them.
        gpus: GPUs of each; a fraction shares one. 0: it computes on the CPU.

    Raises:
        ImportError: Ray is not installed.
        ValueError: an option is out of range, or this is one of several processes that `torchrun` started.
    """

    load: Any
    workers: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"engine_workers must be >= 1, got {self.workers}")
        if self.cpus < 1 or not 0 <= self.gpus < float("inf"):
            raise ValueError(
                f"engine_cpus must be >= 1 and engine_gpus >= 0, got engine_cpus={self.cpus} and "
                f"engine_gpus={self.gpus}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the engine ray starts its own processes: run the command without torchrun")
        import_ray()

    def contents(self, source):
        """`content_digest` of every image, in order, read by the cluster's CPUs."""
        starts = range(0, len(source), _READ_AT_ONCE)
        jobs = [(number, range(start, min(start + _READ_AT_ONCE, len(source)))) for number, start in enumerate(starts)]
        ray = _started()
        waiting, expected = {}, 0
        results = self._results(source, jobs, lambda items: items.map_batches(_digests, batch_size=1), ray)
        for number, digests in results:  # they may come in another order
            waiting[number] = digests
            while expected in waiting:
                yield from waiting.pop(expected)
                expected += 1

    def embed_shards(self, embedder, source, jobs, num_workers, skip_corrupt, progress):
        """As [`embed_shards`] in this process, but shards come as they end; of `embedder` the fingerprint is used."""
        ray = _started()
        options = {
            "load": self.load,
            "fingerprint": embedder.fingerprint,
            "num_workers": self.cpus - 1 if num_workers is None else num_workers,
            "threads": self.cpus,
            "skip_corrupt": skip_corrupt,
            "attempts": ray.remote(num_cpus=0)(_Attempts).remote(),
        }

        def embed(items):
            return items.map_batches(
                _EmbedShard,
                batch_size=1,
                fn_constructor_kwargs=options,
                compute=ray.data.ActorPoolStrategy(size=self._count(ray, len(jobs))),
                num_cpus=self.cpus,
                num_gpus=self.gpus or None,
            )

        rows = sum(len(rows) for _, rows in jobs)
        with tqdm(total=rows, desc="Embedding", unit="image", disable=not progress, leave=False) as bar:
            for shard, parts in self._results(source, jobs, embed, ray):
                yield shard, parts
                bar.update(sum(len(asked) for asked, *_ in parts))

    def _count(self, ray, jobs):
        there = ray.cluster_resources()
        fit = [int(there.get("CPU", 0) // self.cpus)]
        if self.gpus:
            fit.append(int(there.get("GPU", 0) // self.gpus))
        if self.workers is None and min(fit) < 1:
            raise ValueError(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, too few for a "
                f"worker of {self.cpus} (engine_cpus) and {self.gpus:g} (engine_gpus); where more will come, say how "
                "many workers (engine_workers)"
            )
        return min(self.workers or min(fit), jobs)

    def _results(self, source, jobs, transform, ray):
        """What tasks give, in the order in which they end: number of the job and its outcome."""
        items = [
            {"job": number, "part": pickle.dumps((rows.start, _part(source, rows)), pickle.HIGHEST_PROTOCOL)}
            for number, rows in jobs
        ]
        try:
            # a block for each, or a task would end with several jobs, and all be lost where it is interrupted
            results = transform(ray.data.from_items(items, override_num_blocks=len(items)))
            for row in results.iter_rows():
                outcome = pickle.loads(row["outcome"])  # of our own worker
                if isinstance(outcome, Exception):
                    raise outcome
                yield int(row["job"]), outcome
        except ray.exceptions.RayError as error:
            cause = " ".join(str(error).split())
            raise EngineError(
                f"Ray stopped ({type(error).__name__}: {cause[:500]}); the same command goes on"
            ) from error


def import_ray():
    """The package `ray` with its part for data.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"the engine ray needs Ray Data: pip install 'vptsp[ray]' ({error})") from error
    return ray


def _started():
    ray = import_ray()
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is started here
        ray.init(log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray


def _part(source, rows):
    """What a task needs of a source: ids and images of its rows."""
    unlabelled = np.ma.masked_all(len(rows), dtype=np.int64)
    return source.select(rows, source.description, labels=unlabelled, class_names=[], columns={})


def _outcome(compute, batch):
    """What a task gives; errors of images and options too, as Ray would wrap them in its own."""
    start, part = pickle.loads(batch["part"][0])  # of our own driver
    try:
        outcome = compute(start, part)
    except (DataError, ValueError, OSError, ImportError) as error:
        outcome = error
    return {"job": batch["job"], "outcome": [pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)]}


def _digests(batch):
    return _outcome(lambda start, part: [content_digest(part.stored(row)) for row in range(len(part))], batch)


class _Attempts:
    """Counts how often each shard was begun, by workers that may have ended since."""

    def __init__(self):
        self._begun = Counter()

    def begin(self, start):
        self._begun[start] += 1
        return self._begun[start]


class _EmbedShard:
    """What a worker does: it loads the model at its first task, so that its errors come back as those of tasks do."""

    def __init__(self, load, fingerprint, num_workers, threads, skip_corrupt, attempts):
        self._load, self._fingerprint, self._attempts = load, fingerprint, attempts
        self._num_workers, self._threads, self._skip_corrupt = num_workers, threads, skip_corrupt
        self._embedder = None

    def __call__(self, batch):
        return _outcome(self._embed, batch)

    def _embed(self, start, part):
        if import_ray().get(self._attempts.begin.remote(start)) > _MOST_ATTEMPTS:
            raise EngineError(
                f"{_MOST_ATTEMPTS} workers ended while they embedded the {len(part)} images from {part.ids[0]!r} on "
                "(out of memory, or by one of these images?); what is written stays, and the same command goes on"
            )
        if self._embedder is None:
            torch.set_num_threads(self._threads)
            embedder = self._load()
            if embedder.fingerprint != self._fingerprint:
                raise DataError(
                    f"a worker found another model under the name {embedder.name} (fingerprint "
                    f"{embedder.fingerprint[:12]}, expected {self._fingerprint[:12]}): all machines must have the same"
                )
            self._embedder = embedder
        jobs = [(0, range(len(part)))]
        ((_, parts),) = embed_shards(self._embedder, part, jobs, self._num_workers, self._skip_corrupt, False)
        return [
            ([start + row for row in asked], [start + row for row in readable], embeddings, contents)
            for asked, readable, embeddings, contents in parts
        ]


__all__ = ["EngineError", "RayEngine", "import_ray"]
