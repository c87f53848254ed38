"""A buffer of rows by class, from which class-balanced batches are drawn."""

import heapq
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .data_errors import DataError


__all__ = ["ClassBuffer", "RowGroup", "StoredRow", "default_buffer_size"]


class StoredRow(NamedTuple):
    """One row of a stream, not decoded.

    Attributes:
        source: The image: path or contents.
        label: Its class.
        name: What to call it in errors.
    """

    source: str | bytes
    label: int
    name: str


class RowGroup(NamedTuple):
    """What a class gives to a batch.

    Attributes:
        rows: k rows, different unless the class has fewer than k.
        spare: One more row of the class if the buffer holds one; it stays there.
    """

    rows: list[StoredRow]
    spare: list[StoredRow]


class ClassBuffer:
    """Makes the batches of one pass over a stream; `StreamBatchSampler` says how.

    Args:
        classes_per_batch: B/k.
        images_per_class: k.
        size: Rows that it holds, >= B.
        rng: Where all random numbers come from.
        small: Classes known to have fewer than k images, and how many; they needn't wait for the end of the pass.
        num_classes: C, for an error's advice; by default the classes seen so far.

    Attributes:
        passed_over: Rows that found no place because their class had its share.
    """

    def __init__(
        self,
        classes_per_batch: int,
        images_per_class: int,
        size: int,
        rng: random.Random,
        small: Mapping[int, int] | None = None,
        num_classes: int | None = None,
    ):
        self.passed_over = 0
        self._classes_per_batch = classes_per_batch
        self._k = images_per_class
        self._size = size
        self._share = size // classes_per_batch
        self._rng = rng
        self._small = dict(small or {})
        self._num_classes = num_classes
        self._rows: dict[int, list[StoredRow]] = {}
        self._held = 0
        self._seen: dict[int, int] = {}  # rows per class, in this pass
        self._offered: dict[int, int] = {}  # rows that competed for a class's places since it was last drawn
        self._groups: dict[int, int] = {}  # groups that a class can give; classes that can give none are not in it
        self._tickets: list[int] = []  # every class as often as it has groups

    @property
    def small_classes(self) -> dict[int, int]:
        """Classes that have fewer than k images, and how many; complete after a whole pass."""
        return self._small

    def batches(self, rows: Iterable[StoredRow]) -> Iterator[list[RowGroup]]:
        """The batches of a pass.

        Args:
            rows: All rows of the stream.

        Yields:
            B/k groups of different classes.

        Raises:
            DataError: there are no rows or fewer than B/k classes, or the buffer is full and can't fill a batch.
        """
        for row in rows:
            self._add(row)
            if self._held == self._size:
                if len(self._groups) < self._classes_per_batch:
                    self._refuse_full_buffer()
                yield self._draw(self._random_classes())
        self._check_stream()
        self._end_of_pass()
        yield from self._drain()

    def _add(self, row: StoredRow) -> None:
        label = row.label
        rows = self._rows.setdefault(label, [])
        self._seen[label] = self._seen.get(label, 0) + 1
        self._offered[label] = self._offered.get(label, 0) + 1
        if len(rows) < self._share:
            rows.append(row)
            self._held += 1
            if len(rows) % self._small.get(label, self._k) == 0:
                self._groups[label] = self._groups.get(label, 0) + 1
                self._tickets.append(label)
            return
        self.passed_over += 1
        place = self._rng.randrange(self._offered[label])
        if place < len(rows):  # so that every row offered has the same chance to stay
            rows[place] = row

    def _random_classes(self) -> list[int]:
        """B/k classes, without replacement, weighted by the number of their groups: tickets are drawn."""
        drawn: dict[int, None] = {}
        for _ in range(20 * self._classes_per_batch):
            place = self._rng.randrange(len(self._tickets))
            label = self._tickets[place]
            if label not in drawn:
                drawn[label] = None
                self._tickets[place] = self._tickets[-1]
                self._tickets.pop()
                if len(drawn) == self._classes_per_batch:
                    return list(drawn)
        # A few classes hold nearly all tickets: the other ones are drawn without chance having to find them.
        while len(drawn) < self._classes_per_batch:
            others = [label for label in self._tickets if label not in drawn]
            label = self._rng.choice(others)
            drawn[label] = None
            self._tickets.remove(label)
        return list(drawn)

    def _drain(self) -> Iterator[list[RowGroup]]:
        """Batches of what is left, always of the classes with the most groups: this leaves the least."""
        heap = [(-groups, self._rng.random(), label) for label, groups in self._groups.items()]
        heapq.heapify(heap)
        while len(heap) >= self._classes_per_batch:
            largest = [heapq.heappop(heap) for _ in range(self._classes_per_batch)]
            yield self._draw([label for _, _, label in largest])
            for groups, _, label in largest:
                if groups < -1:
                    heapq.heappush(heap, (groups + 1, self._rng.random(), label))

    def _draw(self, labels: list[int]) -> list[RowGroup]:
        self._rng.shuffle(labels)
        return [self._draw_group(label) for label in labels]

    def _draw_group(self, label: int) -> RowGroup:
        rows = self._rows[label]
        self._rng.shuffle(rows)
        taken, left = rows[: self._k], rows[self._k :]
        self._rows[label] = left
        self._held -= len(taken)
        self._offered[label] = len(left)
        self._groups[label] -= 1
        if self._groups[label] == 0:
            del self._groups[label]
        return RowGroup([taken[i % len(taken)] for i in range(self._k)], left[:1])

    def _end_of_pass(self) -> None:
        """Let classes with fewer than k images in the whole stream be drawn."""
        self._small = {label: count for label, count in self._seen.items() if count < self._k}
        for label, count in self._small.items():
            if len(self._rows[label]) == count:
                self._groups[label] = 1

    def _check_stream(self) -> None:
        if not self._seen:
            raise DataError("the stream is empty: it gave no row")
        if len(self._seen) < self._classes_per_batch:
            raise DataError(
                f"the stream has images of {len(self._seen)} classes only, but a batch needs "
                f"{self._classes_per_batch}: use a smaller batch_size, or more images_per_class"
            )

    def _refuse_full_buffer(self) -> None:
        present = sum(bool(rows) for rows in self._rows.values())
        num_classes = self._num_classes or len(self._seen)
        enough = default_buffer_size(num_classes, self._classes_per_batch, self._k, least=0)
        raise DataError(
            f"the buffer of {self._size} rows is full and can't fill a batch: of its {present} classes, "
            f"{len(self._groups)} have images_per_class {self._k} images, but a batch needs "
            f"{self._classes_per_batch} such classes. Use a larger buffer_size (for {num_classes} classes "
            f"{max(enough, 2 * self._size)} or more), a smaller batch_size or fewer images_per_class"
        )


def default_buffer_size(num_classes: int, classes_per_batch: int, images_per_class: int, least: int = 4096) -> int:
    """Rows that a buffer must have room for: k - 1 of every class, which can't be drawn yet, and four batches."""
    return max(num_classes * (images_per_class - 1) + 4 * classes_per_batch * images_per_class, least)
