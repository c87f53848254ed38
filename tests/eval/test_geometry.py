"""Distances within and between classes against loops over pairs, and spectral decay against a plain SVD."""

import doctest
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch.nn.functional import normalize

from vptsp.eval import geometry
from vptsp.eval.geometry import (
    class_distances,
    geometry_metrics,
    inter_class_distance,
    intra_class_distance,
    spectral_decay,
)


def root_mean_square(squares):
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else None


def squared_distance(first, second):
    return math.fsum((a - b) ** 2 for a, b in zip(first, second, strict=True))


def slow_distances(embeddings, labels):
    """Intra and inter by loops over pairs; None without a pair."""
    items, labels = embeddings.double().tolist(), labels.tolist()
    members = {c: [item for item, label in zip(items, labels, strict=True) if label == c] for c in set(labels)}
    means = [[math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in members.values()]
    intra = [squared_distance(*pair) for rows in members.values() for pair in combinations(rows, 2)]
    return root_mean_square(intra), root_mean_square([squared_distance(*pair) for pair in combinations(means, 2)])


def random_set(generator, dtype):
    count, width = (int(torch.randint(1, high, (), generator=generator)) for high in (25, 9))
    embeddings = normalize(torch.randn(count, width, generator=generator), dim=1)
    embeddings[: count // 4] = embeddings[torch.randint(0, count, (count // 4,), generator=generator)]  # copies
    num_classes = int(torch.randint(1, 9, (), generator=generator))
    labels = torch.randint(0, num_classes, (count,), generator=generator)
    return embeddings.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block_rows", [7, 16384])
def test_distances_equal_loops_over_pairs(dtype, block_rows, monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(1)
    seen = {"both": 0, "none within": 0, "none between": 0}
    for _ in range(120):
        embeddings, labels = random_set(generator, dtype)
        intra, inter = slow_distances(embeddings, labels)
        if intra is None:
            with pytest.raises(ValueError, match="a class with two items"):
                intra_class_distance(embeddings, labels)
        else:
            assert intra_class_distance(embeddings, labels) == pytest.approx(intra, abs=1e-12)
        if inter is None:
            with pytest.raises(ValueError, match="two classes"):
                inter_class_distance(embeddings, labels)
        else:
            assert inter_class_distance(embeddings, labels) == pytest.approx(inter, abs=1e-12)
        if intra is not None and inter is not None:
            got = class_distances(embeddings, labels)
            assert got["intra_class_distance"] == intra_class_distance(embeddings, labels)
            assert got["inter_class_distance"] == inter_class_distance(embeddings, labels)
            if inter > 1e-9:
                assert got["intra_inter_ratio"] == pytest.approx(intra / inter)
        seen["none within" if intra is None else "none between" if inter is None else "both"] += 1
    assert min(seen.values()) > 3


def test_intra_class_distance_follows_from_cosines():
    embeddings = normalize(torch.randn(40, 6, dtype=torch.float64), dim=1)
    labels = torch.arange(40) % 3
    cosines = [float(embeddings[i] @ embeddings[j]) for i, j in combinations(range(40), 2) if labels[i] == labels[j]]
    expected = math.sqrt(2 - 2 * sum(cosines) / len(cosines))
    assert intra_class_distance(embeddings, labels) == pytest.approx(expected, abs=1e-12)
    plain = [
        float((embeddings[i] - embeddings[j]).norm()) for i, j in combinations(range(40), 2) if labels[i] == labels[j]
    ]
    assert intra_class_distance(embeddings, labels) >= sum(plain) / len(plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_collapsed_embeddings(dtype):
    collapsed = normalize(torch.randn(1, 7, dtype=torch.float64), dim=1).to(dtype).expand(50, 7)
    got = geometry_metrics(collapsed, torch.arange(50) // 7)
    assert got["intra_class_distance"] == got["inter_class_distance"] == 0
    assert math.isnan(got["intra_inter_ratio"])
    assert got["spectral_decay"] == pytest.approx(math.log(7), abs=1e-12)
    assert spectral_decay(collapsed, "uniform_to_spectrum") == math.inf
    # each class collapsed, on its own point
    got = class_distances(torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5))
    assert got["intra_class_distance"] == got["intra_inter_ratio"] == 0
    assert got["inter_class_distance"] == pytest.approx(math.sqrt(2))
    # the same mean in both classes, by opposite items
    got = class_distances(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]), torch.tensor([0, 0, 1, 1]))
    assert got == {"intra_class_distance": 2, "inter_class_distance": 0, "intra_inter_ratio": math.inf}


def test_small_distances_within_classes_are_not_lost():
    angles = torch.tensor([0.0, 1e-7], dtype=torch.float64)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert intra_class_distance(embeddings, torch.zeros(2).long()) == pytest.approx(1e-7, rel=1e-6)


@pytest.mark.parametrize("block_rows", [3, 16384])
def test_spectral_decay_equals_a_plain_svd(block_rows, monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK_ROWS", block_rows)
    generator = torch.Generator().manual_seed(2)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    full = 0
    for case in range(200):
        embeddings, _ = random_set(generator, dtypes[case % 4])
        count, width = embeddings.shape
        values = np.zeros(width)
        singular = np.linalg.svd(embeddings.double().numpy(), compute_uv=False)
        values[: min(count, width)] = singular
        shares, uniform = values / values.sum(), np.full(width, 1 / width)
        got = spectral_decay(embeddings)
        assert 0 <= got <= math.log(width) + 1e-12
        assert got == pytest.approx(entropy(shares, uniform), abs=1e-10)
        backward = spectral_decay(embeddings, "uniform_to_spectrum")
        if values.min() > 1e-12 * singular[0]:
            assert backward == pytest.approx(entropy(uniform, shares), abs=1e-8)
            full += 1
        else:
            assert backward == math.inf
    assert 50 < full < 190


def test_spectral_decay_tells_how_many_directions_are_used():
    for used in (1, 3, 8):
        embeddings = torch.eye(8)[:used].repeat(10, 1)
        assert spectral_decay(embeddings) == pytest.approx(math.log(8 / used), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert spectral_decay(torch.eye(8, dtype=torch.float64)[:3] @ rotation) == pytest.approx(math.log(8 / 3))


def test_order_of_rows_and_names_of_classes_change_nothing():
    embeddings, labels = normalize(torch.randn(60, 5), dim=1), torch.arange(60) % 7
    expected = geometry_metrics(embeddings, labels)
    order = torch.randperm(60)
    assert geometry_metrics(embeddings[order], 10_000 - 1000 * labels[order]) == pytest.approx(expected, abs=1e-12)


def test_takes_embeddings_that_carry_gradients():
    embeddings = normalize(torch.randn(8, 3, requires_grad=True), dim=1)
    assert len(geometry_metrics(embeddings, torch.arange(8) // 2)) == 4


def test_refuses():
    with pytest.raises(ValueError, match="intra-class distance needs a class with two items, got 3 classes of one"):
        class_distances(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="inter-class distance needs two classes, got one"):
        class_distances(torch.eye(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"direction must be .*, got 'up'"):
        spectral_decay(torch.eye(3), "up")
    for function in (intra_class_distance, inter_class_distance, class_distances, geometry_metrics):
        with pytest.raises(ValueError, match="one label per embedding, 3, got 2"):
            function(torch.eye(3), torch.arange(2))
        with pytest.raises(TypeError, match=r"labels must be an integer tensor, got torch.float32"):
            function(torch.eye(3), torch.zeros(3))
        with pytest.raises(ValueError, match="must be L2-normalised"):
            function(2 * torch.eye(3), torch.zeros(3).long())
    with pytest.raises(ValueError, match="must be finite"):
        spectral_decay(torch.full((2, 2), torch.nan))


def test_examples_in_the_documentation():
    results = doctest.testmod(geometry)
    assert results.attempted > 5
    assert results.failed == 0
