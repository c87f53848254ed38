import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch

from vptsp import ClassBalancedBatchSampler, SampleKey


CASES = [
    # class sizes, B, k
    ([5, 5, 5, 5], 4, 2),
    ([7, 3, 9, 4, 6, 8, 2, 5], 8, 2),
    ([7, 3, 9, 4, 6, 8, 2, 5], 6, 1),
    ([10, 1, 4, 2, 30], 9, 3),
    ([3, 3, 3], 12, 4),
    ([1, 1, 1, 1], 4, 1),
    ([6] * 41, 32, 2),
    ([50], 5, 5),
]


def make_labels(sizes, seed=0):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    random.Random(seed).shuffle(labels)
    return np.array(labels)


@pytest.mark.parametrize("sizes, batch_size, k", CASES)
@pytest.mark.parametrize("num_batches", [None, 50])
def test_batches_are_what_the_documentation_says(sizes, batch_size, k, num_batches):
    labels = make_labels(sizes)
    sampler = ClassBalancedBatchSampler(labels, batch_size, k, seed=3, num_batches=num_batches)
    batches = list(sampler)
    assert len(batches) == len(sampler) == (num_batches or max(len(labels) // batch_size, 1))
    class_draws = Counter(dict.fromkeys(range(len(sizes)), 0))
    for batch in batches:
        assert len(batch) == batch_size
        assert all(
            isinstance(key, SampleKey) and type(key.index) is type(key.augmentation_seed) is int for key in batch
        )
        groups = [batch[i : i + k] for i in range(0, batch_size, k)]
        classes = []
        for group in groups:
            of_group = {labels[key.index] for key in group}
            assert len(of_group) == 1  # class-major
            label = of_group.pop()
            classes.append(label)
            times = Counter(key.index for key in group).values()
            if sizes[label] >= k:
                assert set(times) == {1}
            else:  # every image of the class, as evenly as can be
                assert len(times) == sizes[label]
                assert max(times) - min(times) <= 1
        assert len(set(classes)) == batch_size // k
        class_draws.update(classes)
    assert max(class_draws.values()) - min(class_draws.values()) <= 1


@pytest.mark.parametrize("sizes, batch_size, k", CASES)
def test_images_of_a_class_come_from_shuffled_decks(sizes, batch_size, k):
    labels = make_labels(sizes)
    sampler = ClassBalancedBatchSampler(labels, batch_size, k, seed=1, num_batches=80)
    draws = {label: [] for label in range(len(sizes))}
    for batch in sampler:
        for i in range(0, batch_size, k):
            draws[labels[batch[i].index]].append([key.index for key in batch[i : i + k]])
    for label, size in enumerate(sizes):
        per_deck = size // k
        if per_deck == 0:
            continue
        for start in range(0, len(draws[label]), per_deck):
            deck = [index for draw in draws[label][start : start + per_deck] for index in draw]
            assert len(set(deck)) == len(deck)  # none twice before the class is used up
    seen = Counter(index for label in draws for draw in draws[label] for index in draw)
    assert set(seen) == set(range(len(labels)))


def test_one_pass_uses_every_image_once_where_it_divides():
    labels = make_labels([6] * 8)
    indices = [key.index for batch in ClassBalancedBatchSampler(labels, 8, 2, seed=0) for key in batch]
    assert sorted(indices) == list(range(48))


def test_draws_are_uniform_over_seeds():
    """Each class in first place, and each pair of images of a class together, equally often."""
    labels = np.repeat(np.arange(5), 4)
    firsts, pairs = Counter(), Counter()
    for epoch in range(2000):
        sampler = ClassBalancedBatchSampler(labels, 4, 2, seed=9, num_batches=1)
        sampler.set_epoch(epoch)
        ((a, b, c, d),) = sampler
        firsts[labels[a.index]] += 1
        pairs[frozenset((a.index, b.index))] += 1
        pairs[frozenset((c.index, d.index))] += 1
    for counts, cells, total in ((firsts, 5, 2000), (pairs, 30, 4000)):
        expected = total / cells
        chi_square = sum((counts[cell] - expected) ** 2 / expected for cell in counts)
        assert len(counts) == cells
        assert chi_square < cells - 1 + 4 * (2 * (cells - 1)) ** 0.5


def test_epochs_are_reproducible_on_their_own():
    labels = make_labels([9, 5, 7, 3, 4, 8])
    one = ClassBalancedBatchSampler(labels, 6, 2, seed=4)
    epochs = []
    for epoch in range(4):
        one.set_epoch(epoch)
        epochs.append(list(one))
        assert list(one) == epochs[-1]
    other = ClassBalancedBatchSampler(labels, 6, 2, seed=4)
    other.set_epoch(3)
    assert list(other) == epochs[3]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 4
    assert list(ClassBalancedBatchSampler(labels, 6, 2, seed=5)) != epochs[0]
    np.random.seed(0)  # global state has no part in it
    assert list(ClassBalancedBatchSampler(labels, 6, 2, seed=4)) == epochs[0]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_see_the_global_batch(world_size):
    labels = make_labels([9, 5, 7, 3, 4, 8, 6, 6, 2, 10])
    whole = ClassBalancedBatchSampler(labels, 16, 2, seed=4)
    ranks = [
        ClassBalancedBatchSampler(labels, 16, 2, seed=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in (whole, *ranks):
        sampler.set_epoch(2)
        assert len(sampler) == len(whole) == 60 // 16
        assert sampler.global_batch_size == 16
    assert {sampler.batch_size for sampler in ranks} == {16 // world_size}
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert [key for part in parts for key in part] == batch
        assert {len(part) for part in parts} == {16 // world_size}


def slow_seeds(start, count):
    """SplitMix64 with Python's integers."""
    mask, seeds = 2**64 - 1, []
    for _ in range(count):
        start = (start + 0x9E3779B97F4A7C15) & mask
        value = start
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        seeds.append((value ^ (value >> 31)) >> 1)
    return seeds


def test_augmentation_seeds():
    labels = make_labels([9, 5, 7])
    sampler = ClassBalancedBatchSampler(labels, 6, 3, seed=4, num_batches=30)
    sampler.set_epoch(7)
    seeds = [key.augmentation_seed for batch in sampler for key in batch]
    start = int(np.random.SeedSequence([4, 7, 0x617567]).generate_state(1, np.uint64)[0])
    assert seeds == slow_seeds(start, 180)
    assert len(set(seeds)) == 180 and min(seeds) >= 0 and max(seeds) < 2**63
    sampler.set_epoch(8)
    assert not set(seeds) & {key.augmentation_seed for batch in sampler for key in batch}


def test_fewer_images_than_a_batch_still_train():
    sampler = ClassBalancedBatchSampler([0, 1, 1], 8, 4, seed=0)
    assert len(sampler) == 1
    assert Counter(key.index for key in next(iter(sampler))) == {0: 4, 1: 2, 2: 2}


def test_large_sets_are_quick():
    """A long tail of 5,690 classes; the bound is loose, it is there to notice a loop over images."""
    import time

    sizes = np.maximum((np.arange(5690) + 1.0) ** -0.5 * 2160, 1).astype(int)
    labels = np.repeat(np.arange(5690), sizes)
    sampler = ClassBalancedBatchSampler(labels, 64, 1, seed=0)
    start = time.perf_counter()
    rows, seeds = sampler.epoch_batches(0)
    assert time.perf_counter() - start < 5
    assert rows.shape == seeds.shape == (len(labels) // 64, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": []}, "labels are empty"),
        ({"labels": [0.0, 1.0]}, r"labels: row 0 has the label 0\.0; expected an integer >= 0"),
        ({"labels": np.array([[0, 1]])}, "labels must be one-dimensional, got shape .1, 2."),
        (
            {"labels": [0, 1, 3, 3, 7]},
            r"contiguous integers 0..C-1: found 4 classes between 0 and 7, but 2 has no image",
        ),
        ({"labels": [1, 2, 3]}, r"between 1 and 3, but 0 has no image; number them 0..2 \(C = 3\)"),
        ({"labels": [0, -1, 1]}, "labels: row 1 has the label -1; expected an integer >= 0"),
        ({"batch_size": 7}, "batch_size must be a multiple of images_per_class 2, got 7"),
        ({"batch_size": 0}, "batch_size must be a multiple of images_per_class 2, got 0"),
        ({"images_per_class": 0}, "images_per_class must be >= 1, got 0"),
        (
            {"batch_size": 12},
            r"batch_size 12 / images_per_class 2 asks for 6 different classes in a batch, but there are 4: "
            r"use batch_size <= 8, or images_per_class >= 3",
        ),
        ({"world_size": 3}, r"4 classes of a batch \(batch_size 8 / images_per_class 2\) must divide .* world_size 3"),
        ({"rank": 2, "world_size": 2}, "0 <= rank < world_size, got rank 2 of world_size 2"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"num_batches": 0}, "num_batches must be >= 1 or None, got 0"),
    ],
)
def test_errors(change, message):
    values = {"labels": [0, 1, 2, 3] * 3, "batch_size": 8, "images_per_class": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        ClassBalancedBatchSampler(**values)


def test_epoch_must_not_be_negative():
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        ClassBalancedBatchSampler([0, 1], 2, 1, seed=0).set_epoch(-1)


def test_a_key_is_the_integer_that_any_data_set_takes():
    key = SampleKey(3, 7)
    assert key == 3 and [0, 1, 2, "three"][key] == "three" and torch.arange(5)[key] == 3
    assert key == SampleKey(3, 7) != SampleKey(3, 8)
    again = pickle.loads(pickle.dumps(key))
    assert type(again) is SampleKey and again == key and again.augmentation_seed == 7
    assert type(key.index) is int and repr(key) == "SampleKey(3, 7)"
