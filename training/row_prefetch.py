"""Rows of a table in host memory that a second thread brings to a device before they are asked for."""

from __future__ import annotations

import concurrent.futures
import functools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch


# One thread for all tables: reads must not overtake each other.
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="class_prompts")


class RowPrefetch:
    """Rows of a [`HostTable`] that are read ahead, to be taken in the same order, as the table is by then."""

    def __init__(self):
        self._coming = deque()

    def start(self, table, classes):
        """Start to bring the rows of classes, `(M,)` int64 on the CPU, to the device of the table's `anchor`."""
        _ = table.tokens  # drawn here, not in the other thread
        future = _reader.submit(_read_ahead, table, classes, table.anchor.device)
        self._coming.append(_Coming(classes, future, []))

    def take(self, table, classes):
        """Classes `(M,)` on the host, and their rows `(M, P, D)` on the classes' device: prefetched, or read now."""
        if not (self._coming and self._is_next(classes)):
            host_classes = classes.cpu()
            return host_classes, table.read(host_classes, classes.device)
        classes, future, updated = self._coming.popleft()
        rows = future.result()
        if rows.device.type == "cuda":  # was allocated on another stream
            rows.record_stream(torch.cuda.current_stream(rows.device))
        if updated:
            stale = torch.isin(classes, torch.cat(updated)).nonzero().flatten()
            if len(stale):
                rows.index_copy_(0, stale.to(rows.device), table.read(classes[stale], rows.device))
        return classes, rows

    def _is_next(self, classes):
        expected = self._coming[0].classes
        if classes.device.type != "cuda":
            return torch.equal(expected, classes.cpu())
        if expected.shape != classes.shape:
            return False
        torch._assert_async((expected.to(classes.device, non_blocking=True) == classes).all())
        return True

    def note_update(self, classes):
        """Remember whose rows were changed: of what is on its way, they are read again."""
        for coming in self._coming:
            coming.updated.append(classes)

    def discard(self):
        """Forget what is on its way."""
        concurrent.futures.wait([coming.future for coming in self._coming])  # a read that failed is forgotten too
        self._coming.clear()


class _Coming(NamedTuple):
    """Rows on their way: classes `(M,)`, who brings them, and the classes that were updated meanwhile."""

    classes: torch.Tensor
    future: Future
    updated: list


def _read_ahead(table, classes, device):
    if table.folder is not None:  # one value of every page, so that the step will not wait for the disk
        for state in table.states.values():
            state.view(len(state), -1)[classes, ::1024].sum()
    if device.type != "cuda":
        return table.read(classes, device)
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        rows = table.read(classes, device)
    stream.synchronize()
    return rows


@functools.cache
def _copy_stream(device):
    return torch.cuda.Stream(device)


__all__ = ["RowPrefetch"]
