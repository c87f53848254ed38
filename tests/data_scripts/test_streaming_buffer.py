"""The buffer that draws class-balanced batches from rows as they come."""

import math
import random
from collections import Counter

import pytest

from vptsp import DataError
from vptsp.data_scripts.class_buffer import ClassBuffer, StoredRow, default_buffer_size


def make_rows(sizes, order="random", seed=0):
    rows = [StoredRow(f"{label}/{i}", label, f"{label}/{i}") for label, size in enumerate(sizes) for i in range(size)]
    if order == "random":
        random.Random(seed).shuffle(rows)
    return rows


def batches_of(rows, classes, k, size, seed=0, small=None):
    buffer = ClassBuffer(classes, k, size, random.Random(seed), small)
    return list(buffer.batches(rows)), buffer


CASES = [
    # class sizes, B/k, k, buffer
    ([5, 5, 5, 5], 2, 2, 20),
    ([5, 5, 5, 5], 2, 2, 8),
    ([7, 3, 9, 4, 6, 8, 2, 5], 4, 2, 16),
    ([7, 3, 9, 4, 6, 8, 2, 5], 3, 1, 6),
    ([30, 1, 4, 2, 30, 7], 3, 3, 24),
    ([1, 1, 1, 1], 4, 1, 4),
    ([2, 1, 2, 1, 3], 2, 4, 12),
    ([6] * 41, 16, 2, 64),
    ([50], 1, 5, 10),
]


@pytest.mark.parametrize("sizes, classes, k, size", CASES)
@pytest.mark.parametrize("order", ["random", "sorted"])
def test_batches_are_what_the_documentation_says(sizes, classes, k, size, order):
    rows = make_rows(sizes, order)
    used = Counter()
    batches, buffer = batches_of(rows, classes, k, size)
    assert batches
    for groups in batches:
        labels = [{row.label for row in group.rows} for group in groups]
        assert all(len(label) == 1 for label in labels)
        assert len({label for group in labels for label in group}) == len(groups) == classes
        for group in groups:
            times = Counter(group.rows)
            whole_class = sizes[group.rows[0].label]
            assert len(group.rows) == k
            assert len(times) == min(k, whole_class)
            assert max(times.values()) - min(times.values()) <= 1
            assert len(group.spare) <= 1
            for row in group.spare:
                assert row.label == group.rows[0].label and row not in times
            used.update(times.keys())
    assert max(used.values()) == 1 and set(used) <= set(rows)
    assert buffer.passed_over <= len(rows) - len(used)


@pytest.mark.parametrize("sizes, classes, k, size", CASES)
def test_a_buffer_for_everything_makes_as_many_batches_as_can_be(sizes, classes, k, size):
    """t batches can be made if the classes' groups, at most one per batch and class, add up to t batches."""
    groups = [max(size // k, 1) for size in sizes]
    possible = max(t for t in range(1000) if sum(min(g, t) for g in groups) >= t * classes)
    batches, _ = batches_of(make_rows(sizes), classes, k, 10_000)
    assert len(batches) == possible


def test_rows_are_read_only_as_far_as_the_buffer_needs():
    taken = []
    rows = (taken.append(row) or row for row in make_rows([20] * 10))
    batches = ClassBuffer(4, 2, 40, random.Random(0)).batches(rows)
    next(batches)
    assert len(taken) == 40
    next(batches)
    assert len(taken) == 48


def test_a_frequent_class_does_not_take_up_the_buffer():
    """A stream sorted by class: of each class as much as its share stays, every row with the same chance."""
    kept = Counter()
    for seed in range(600):
        batches, buffer = batches_of(make_rows([40, 40], "sorted"), 2, 2, 20, seed)
        used = {row.name for groups in batches for group in groups for row in group.rows}
        assert 30 <= buffer.passed_over <= 60 and len(batches) == 5
        kept.update(name for name in used if name.startswith("0/"))
    assert len(kept) == 40 and sum(kept.values()) == 600 * 10
    assert sum((count - 150) ** 2 / 112.5 for count in kept.values()) < 39 + 4 * math.sqrt(2 * 39)


def test_classes_are_drawn_by_the_number_of_their_groups():
    """One class of two: with 6 against 2 groups, three times in four."""
    first = Counter(
        batches_of(make_rows([12, 4], seed=seed), 1, 2, 16, seed + 10**6)[0][0][0].rows[0].label
        for seed in range(2000)
    )
    assert abs(first[0] / 2000 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 2000)


def test_order_in_a_batch_and_images_of_a_group_are_random():
    places, pairs = Counter(), Counter()
    for seed in range(1200):
        groups = batches_of(make_rows([4, 4], "sorted"), 2, 2, 8, seed)[0][0]
        places[groups[0].rows[0].label] += 1
        pairs.update(frozenset(row.name for row in group.rows) for group in groups)
    assert abs(places[0] - 600) < 4 * math.sqrt(300)
    assert len(pairs) == 12 and max(pairs.values()) < 200 + 4 * math.sqrt(200)


def test_small_classes_are_known_after_a_pass():
    sizes = [4, 1, 4, 2]
    _, buffer = batches_of(make_rows(sizes), 2, 3, 12)
    assert buffer.small_classes == {1: 1, 3: 2}
    # then they needn't wait: both can be drawn while the rest of the stream is still to come
    rows = [row for row in make_rows(sizes, "sorted") if row.label in (1, 3)]
    taken = []
    more = (taken.append(row) or row for row in [*rows, *make_rows([4, 0, 4], "sorted")])
    batches = ClassBuffer(2, 3, 6, random.Random(0), buffer.small_classes).batches(more)
    assert len(next(batches)) == 2 and len(taken) == 6


def test_errors():
    with pytest.raises(DataError, match="the stream is empty: it gave no row"):
        batches_of([], 2, 2, 8)
    with pytest.raises(DataError, match="images of 2 classes only, but a batch needs 3: use a smaller batch_size"):
        batches_of(make_rows([5, 5]), 3, 2, 12)
    with pytest.raises(
        DataError,
        match=r"buffer of 8 rows is full and can't fill a batch: of its 8 classes, 0 have images_per_class 2 images, "
        r"but a batch needs 4 such classes. Use a larger buffer_size \(for 8 classes 40 or more\)",
    ):
        batches_of(sorted(make_rows([2] * 50, "sorted"), key=lambda row: row.name[-1]), 4, 2, 8)
    crowded = ClassBuffer(4, 2, 8, random.Random(0), num_classes=50)
    with pytest.raises(DataError, match=r"for 50 classes 82 or more"):
        list(crowded.batches(make_rows([2] * 50)))
    batches, _ = batches_of(sorted(make_rows([2] * 50, "sorted"), key=lambda row: row.name[-1]), 4, 2, 64)
    assert len(batches) == 12


def test_few_classes_with_nearly_all_groups():
    """999 groups of one class and one of each other: drawing at random would hardly ever find the others."""
    rows = make_rows([1998, 2, 2, 2], "sorted")
    batches, _ = batches_of(rows, 4, 2, 8000)
    assert len(batches) == 1
    buffer = ClassBuffer(3, 2, 2004, random.Random(0))
    buffer._share = 2004  # no limit per class
    drawn = Counter(group.rows[0].label for groups in buffer.batches(rows) for group in groups)
    assert drawn[0] >= 1 and sum(drawn.values()) == 3


@pytest.mark.parametrize("k", [2, 4])
def test_the_default_size_is_enough_for_many_classes(k):
    """A stream in random order with 500 classes of 3 to 9 images."""
    sizes = [3 + label % 7 for label in range(500)]
    size = default_buffer_size(500, 16, k, least=0)
    assert size == 500 * (k - 1) + 64 * k and default_buffer_size(500, 16, 1) == 4096
    for seed in range(5):
        batches, buffer = batches_of(make_rows(sizes, seed=seed), 16, k, size, seed)
        groups = sum(max(size // k, 1) for size in sizes)
        assert groups // 16 - 3 <= len(batches) <= groups // 16 and buffer.passed_over == 0
