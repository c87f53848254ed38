"""Many requests, one forward pass: what waits while the model runs is embedded together next time."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

import torch


class TooManyWaitingError(RuntimeError):
    """The queue is full."""


class BatchingEmbedder:
    """Preprocessed images of many threads, embedded in batches by a thread of its own.

    Nothing waits for a batch to fill up: an idle model takes a single image at once.

    Args:
        embedder: [`Embedder`].
        max_batch: Images of a batch at most.
        max_waiting: Images that may wait.
        on_batch: Called with the size of each batch, or None.
    """

    def __init__(self, embedder, max_batch=16, max_waiting=256, on_batch=None):
        if max_batch < 1 or max_waiting < 1:
            raise ValueError(f"max_batch and max_waiting must be >= 1, got {max_batch} and {max_waiting}")
        self.embedder = embedder
        self._max_batch, self._max_waiting, self._on_batch = max_batch, max_waiting, on_batch
        self._waiting = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="embedding", daemon=True)
        self._thread.start()

    @property
    def waiting(self):
        """How many images wait."""
        return len(self._waiting)

    def submit(self, pixel_values):
        """Have an image embedded.

        Args:
            pixel_values: `(3, S, S)` as `embedder.preprocess` gives it.

        Returns:
            `concurrent.futures.Future` of the embedding, `(1, E)` float32. Cancelled in time, it is not computed.

        Raises:
            TooManyWaitingError: the queue is full.
            RuntimeError: this was closed.
        """
        future = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the embedder was closed")
            if len(self._waiting) >= self._max_waiting:
                raise TooManyWaitingError(f"{len(self._waiting)} images wait already")
            self._waiting.append((pixel_values, future))
            self._changed.notify()
        return future

    def close(self):
        """Embed what waits, then stop."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
            batch = [(pixels, future) for pixels, future in batch if future.set_running_or_notify_cancel()]
            if batch:
                self._embed(batch)

    def _embed(self, batch):
        if self._on_batch is not None:
            self._on_batch(len(batch))
        try:
            embeddings = self.embedder.embed_pixels(torch.stack([pixels for pixels, _ in batch]))
        except Exception as error:  # whoever asked gets it
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), embedding in zip(batch, embeddings.split(1), strict=True):
            future.set_result(embedding)


__all__ = ["BatchingEmbedder", "TooManyWaitingError"]
