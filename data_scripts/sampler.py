"""Class-balanced batches: B/k different classes, k images of each (letters as elsewhere, C classes, n images)."""

from collections.abc import Iterator

import numpy as np

from .labels import check_labels


__all__ = ["ClassBalancedBatchSampler", "SampleKey", "augmentation_seeds", "check_batch_sizes"]


class SampleKey(int):
    """What the sampler asks a data set for: the row, as an integer that any map-style data set takes, with a seed.

    Attributes:
        index: Row of the data set, as a plain integer.
        augmentation_seed: Seed of the random crop and flip, 0 <= seed < 2**63. It depends on (seed, epoch, position in
            the epoch), not on workers, ranks, or where a run was resumed.
    """

    def __new__(cls, index: int, augmentation_seed: int):
        key = super().__new__(cls, index)
        key.augmentation_seed = augmentation_seed
        return key

    @property
    def index(self) -> int:
        return int(self)

    def __eq__(self, other):
        if isinstance(other, SampleKey):
            return int(self) == int(other) and self.augmentation_seed == other.augmentation_seed
        return int(self) == other

    def __ne__(self, other):
        return not self == other

    __hash__ = int.__hash__

    def __getnewargs__(self):
        return int(self), self.augmentation_seed

    def __repr__(self):
        return f"SampleKey({int(self)}, {self.augmentation_seed})"


class ClassBalancedBatchSampler:
    """Batch sampler of B/k classes with k images each, class-major, every batch of equal size.

    An epoch has `max(n // B, 1)` batches (or `num_batches`), so a data set smaller than a batch still trains.

    Classes are drawn from shuffled decks: every deck holds each class once, and batches take from it until it is used
    up. Where a batch spans two decks, the second is arranged so that the batch's classes stay different. So in an
    epoch no class is drawn more than once oftener than another.

    Images of a class likewise come from shuffled decks of its images. A deck gives `floor(size / k)` draws of k
    different images (what is left over, fewer than k, sits out), then the class is shuffled anew. A class with fewer
    than k images fills its k places by repeating: each of its images `floor(k / size)` times, or one more.

    Everything depends on (seed, epoch) alone: an epoch can be had without running those before it. With several
    processes, `batch_size` is the batch of all together; each rank gets a contiguous part of it, made of whole
    classes, and the ranks' parts in order are the batch that a single process would see.

    Args:
        labels: `(n,)` integers, exactly the classes 0..C-1.
        batch_size: B, images in the global batch.
        images_per_class: k.
        seed: Seed of the whole run, >= 0.
        num_batches: Batches per epoch, or None for `max(n // B, 1)`.
        rank: This process, 0 <= rank < world_size.
        world_size: Number of processes.

    Attributes:
        global_batch_size: B.
        batch_size: Images in a batch of this rank, `B / world_size` (what torch means by a batch sampler's size).
        num_classes: C.

    Raises:
        ValueError: labels are empty, not integers, or not 0..C-1; B is not divisible by k; B/k is more than C, or not
            divisible by world_size; another argument is out of range.
    """

    drop_last = True  # torch-style attribute: no batch is ever short

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        images_per_class: int,
        seed: int,
        num_batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        labels = _check_labels(labels)
        class_sizes = np.bincount(labels)
        num_classes = len(class_sizes)
        check_batch_sizes(batch_size, images_per_class, num_classes, rank, world_size)
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"num_batches must be >= 1 or None, got {num_batches}")
        self.global_batch_size = batch_size
        self.batch_size = batch_size // world_size
        self.images_per_class = images_per_class
        self.num_classes = num_classes
        self.seed = seed
        self.num_batches = max(len(labels) // batch_size, 1) if num_batches is None else num_batches
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._class_sizes = class_sizes
        self._class_starts = np.concatenate([[0], np.cumsum(class_sizes)[:-1]])
        self._rows = np.argsort(labels, kind="stable")  # rows of class 0, then of class 1, ...

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next `iter` gives.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """This rank's batches of the current epoch."""
        rows, seeds = self.epoch_batches(self.epoch)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for batch_rows, batch_seeds in zip(rows[:, mine], seeds[:, mine], strict=True):
            yield [SampleKey(*key) for key in zip(batch_rows.tolist(), batch_seeds.tolist(), strict=True)]

    def epoch_batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All global batches of an epoch.

        Args:
            epoch: >= 0.

        Returns:
            Rows and augmentation seeds, both `(num_batches, B)` int64, class-major.
        """
        rng = np.random.default_rng([self.seed, epoch])
        shape = (self.num_batches, self.global_batch_size)
        classes = self._draw_classes(rng)
        rows = self._draw_images(classes, rng).reshape(shape)
        return rows, augmentation_seeds(self.seed, epoch, rows.size).reshape(shape)

    def _draw_classes(self, rng: np.random.Generator) -> np.ndarray:
        """Classes in the order drawn, `(num_batches * B / k,)`; every run of B/k from a batch's start is distinct."""
        per_batch = self.global_batch_size // self.images_per_class
        total = self.num_batches * per_batch
        decks, drawn = [], 0
        while drawn < total:
            deck = np.argsort(rng.random(self.num_classes))
            begun = drawn % per_batch  # classes that the batch in progress already has
            if begun:
                taken = np.isin(deck, decks[-1][-begun:])
                first = np.flatnonzero(~taken)[: per_batch - begun]
                deck = np.concatenate([deck[first], np.delete(deck, first)])
            decks.append(deck)
            drawn += len(deck)
        return np.concatenate(decks)[:total]

    def _draw_images(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """k rows for every drawn class, `(len(classes) * k,)`."""
        k = self.images_per_class
        sizes = self._class_sizes
        draws = np.bincount(classes, minlength=self.num_classes)
        draws_per_deck = np.maximum(sizes // k, 1)
        num_decks = -(-draws // draws_per_deck)
        # All decks of all classes in one array: deck d holds the rows of its class, shuffled by sorting on d + noise.
        deck_class = np.repeat(np.arange(self.num_classes), num_decks)
        deck_sizes = sizes[deck_class]
        deck_starts = np.cumsum(deck_sizes) - deck_sizes
        deck_of = np.repeat(np.arange(len(deck_class)), deck_sizes)
        within = np.arange(len(deck_of)) - deck_starts[deck_of]
        order = np.argsort(deck_of + rng.random(len(deck_of)))
        cards = self._rows[self._class_starts[deck_class[deck_of]] + within][order]
        # The v-th draw of class c takes its deck v // draws_per_deck, from place (v % draws_per_deck) * k on.
        by_class = np.argsort(classes, kind="stable")
        visit = np.empty(len(classes), dtype=np.int64)
        visit[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(draws) - draws, draws)
        deck = (np.cumsum(num_decks) - num_decks)[classes] + visit // draws_per_deck[classes]
        place = (visit % draws_per_deck[classes] * k)[:, None] + np.arange(k)
        return cards[deck_starts[deck][:, None] + place % deck_sizes[deck][:, None]].reshape(-1)


def augmentation_seeds(seed: int, epoch: int, count: int, start: int = 0) -> np.ndarray:
    """Seeds of places `start`, `start + 1`, ... of an epoch.

    Returns:
        `(count,)` int64 >= 0: SplitMix64 (Steele et al., 2014) from a hash of (seed, epoch), 63 bits.
    """
    origin = np.random.SeedSequence([seed, epoch, 0x617567]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        state = origin + np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _check_labels(labels) -> np.ndarray:
    labels = check_labels(labels)
    if labels.size == 0:
        raise ValueError("labels are empty; expected at least one training image")
    found = np.unique(labels)
    if found[-1] != len(found) - 1:
        missing = next(i for i, label in enumerate(found) if label != i)
        raise ValueError(
            f"labels must be contiguous integers 0..C-1: found {len(found)} classes between {found[0]} and "
            f"{found[-1]}, but {missing} has no image; number them 0..{len(found) - 1} (C = {len(found)})"
        )
    return labels


def check_batch_sizes(batch_size: int, images_per_class: int, num_classes: int, rank: int, world_size: int) -> None:
    """Check that class-balanced batches can be made, and shared out among processes.

    Raises:
        ValueError: see `ClassBalancedBatchSampler`.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be >= 1, got {images_per_class}")
    if batch_size < 1 or batch_size % images_per_class:
        raise ValueError(f"batch_size must be a multiple of images_per_class {images_per_class}, got {batch_size}")
    classes_per_batch = batch_size // images_per_class
    if classes_per_batch > num_classes:
        raise ValueError(
            f"batch_size {batch_size} / images_per_class {images_per_class} asks for {classes_per_batch} different "
            f"classes in a batch, but there are {num_classes}: use batch_size <= {num_classes * images_per_class}, or "
            f"images_per_class >= {-(-batch_size // num_classes)}"
        )
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 <= rank < world_size, got rank {rank} of world_size {world_size}")
    if classes_per_batch % world_size:
        raise ValueError(
            f"the {classes_per_batch} classes of a batch (batch_size {batch_size} / images_per_class "
            f"{images_per_class}) must divide evenly among world_size {world_size} processes"
        )
