"""Confidence intervals and paired comparison: against loops, for coverage, and for their size under no difference."""

import doctest
import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from vptsp import retrieval_scores
from vptsp.eval import intervals
from vptsp.eval.intervals import bootstrap_interval, compare_paired


def slow_resampled_means(scores, clusters, num_resamples, seed):
    """Bootstrap means one at a time, from the same draws."""
    answered = [(score, cluster) for score, cluster in zip(scores, clusters, strict=True) if not math.isnan(score)]
    members = {}
    for score, cluster in sorted(answered, key=lambda pair: pair[1]):
        members.setdefault(cluster, []).append(score)
    units = list(members.values())
    draws = np.random.default_rng(seed).integers(0, len(units), size=(num_resamples, len(units)), dtype=np.int32)
    means = []
    for draw in draws:
        values = [value for unit in draw for value in units[unit]]
        means.append(math.fsum(values) / len(values))
    return means


def slow_quantile(values, share):
    """Linear interpolation between the two nearest of the sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@pytest.mark.parametrize("block_draws", [1, 500, 2**21])
def test_intervals_equal_a_slow_loop(block_draws, monkeypatch):
    monkeypatch.setattr(intervals, "_BLOCK_DRAWS", block_draws)
    generator = np.random.default_rng(1)
    for case in range(60):
        count = int(generator.integers(4, 30))
        scores = generator.random(count) if case % 2 else generator.integers(0, 2, count).astype(float)
        scores[2:][generator.random(count - 2) < 0.2] = np.nan
        clusters = np.arange(count)
        if case % 3:
            clusters[2:] = generator.integers(-2, 4, count - 2)
        confidence = (0.5, 0.9, 0.95)[case % 3]
        means = slow_resampled_means(scores, clusters, 80, seed=case)
        given = None if case % 3 == 0 else torch.from_numpy(clusters)
        got = bootstrap_interval(torch.from_numpy(scores), given, confidence, num_resamples=80, seed=case)
        assert got.mean == pytest.approx(np.nanmean(scores))
        assert got.low == pytest.approx(slow_quantile(means, (1 - confidence) / 2), abs=1e-12)
        assert got.high == pytest.approx(slow_quantile(means, (1 + confidence) / 2), abs=1e-12)
        answered = ~np.isnan(scores)
        assert (got.num_queries, got.num_clusters) == (answered.sum(), len(set(clusters[answered])))


def covered(intervals_and_truth):
    hits = [interval.low <= truth <= interval.high for interval, truth in intervals_and_truth]
    return sum(hits) / len(hits)


def test_coverage_of_independent_queries():
    generator = np.random.default_rng(2)
    for confidence in (0.8, 0.95):
        runs = (
            (bootstrap_interval(generator.random(120) < 0.7, None, confidence, 400, seed), 0.7) for seed in range(500)
        )
        assert covered(runs) == pytest.approx(confidence, abs=0.045)


def test_coverage_of_queries_that_hang_together_needs_clusters():
    generator = np.random.default_rng(3)
    with_clusters, without = [], []
    for seed in range(300):
        sizes = generator.integers(3, 12, 60)
        clusters = np.arange(60).repeat(sizes)
        scores = (0.5 + 0.2 * generator.standard_normal(60))[clusters] + 0.05 * generator.standard_normal(
            len(clusters)
        )
        with_clusters.append((bootstrap_interval(scores, clusters, 0.9, 400, seed), 0.5))
        without.append((bootstrap_interval(scores, None, 0.9, 400, seed), 0.5))
    assert covered(with_clusters) == pytest.approx(0.9, abs=0.06)
    assert covered(without) < 0.65


def test_width_is_that_of_the_normal_approximation_for_many_queries():
    scores = np.random.default_rng(4).random(4000)
    got = bootstrap_interval(scores, num_resamples=4000)
    expected = NormalDist().inv_cdf(0.975) * scores.std() / math.sqrt(4000)
    assert got.high - got.mean == pytest.approx(expected, rel=0.06)
    assert got.mean - got.low == pytest.approx(expected, rel=0.06)


def slow_p_value(sums):
    observed = abs(math.fsum(sums))
    patterns = list(product((1, -1), repeat=len(sums)))
    reached = [abs(math.fsum(s * d for s, d in zip(p, sums, strict=True))) >= observed - 1e-9 for p in patterns]
    return sum(reached) / len(patterns)


def test_p_value_equals_all_sign_patterns():
    generator = np.random.default_rng(5)
    sampled = []
    for case in range(80):
        count = int(generator.integers(2, 11))
        first, second = generator.integers(0, 4, (2, count)) / 3 if case % 2 else generator.random((2, count))
        clusters = generator.integers(0, 6, count)
        clusters[:2] = 8, 9
        units = first - second
        if case % 4 > 1:
            units = np.array([units[clusters == c].sum() for c in np.unique(clusters)])
        given = clusters if case % 4 > 1 else None
        expected = slow_p_value(units.tolist())
        assert compare_paired(first, second, given, num_resamples=5).p_value == pytest.approx(expected, abs=1e-12)
        if np.count_nonzero(units) >= 8:
            got = compare_paired(first, second, given, num_resamples=5, num_permutations=250, seed=case).p_value
            assert got == pytest.approx(expected, abs=0.12)
            sampled.append(got)
    assert len(sampled) > 5  # not enumerated


def test_queries_without_a_difference_change_no_p_value():
    got = compare_paired([1.0] * 4 + [0.5] * 90, [0.0] * 4 + [0.5] * 90, num_resamples=5)
    assert got.p_value == 2 / 2**4  # all patterns of the four, not a sample of those of 94


@pytest.mark.parametrize("num_permutations", [7, 400])
def test_no_false_alarms_beyond_the_level(num_permutations):
    generator = np.random.default_rng(6)
    clusters = np.arange(12).repeat(4)
    alarms = {"queries": 0, "clusters": 0}
    for seed in range(400):
        shift = 0.3 * generator.standard_normal(12)[clusters]  # the classes differ, in both models' favour alike
        noise = generator.standard_normal((2, 48))
        scores = {"queries": noise, "clusters": noise + np.stack([shift, -shift])}
        for name, pair in scores.items():
            given = clusters if name == "clusters" else None
            p = compare_paired(*pair, given, num_resamples=1, num_permutations=num_permutations, seed=seed).p_value
            alarms[name] += p <= 0.125
    for count in alarms.values():
        assert count / 400 < 0.125 + 0.04
        assert count / 400 > 0.06


def test_a_real_difference_is_found_and_bounded():
    generator = np.random.default_rng(7)
    second = generator.random(400)
    first = second + 0.1 + 0.2 * generator.standard_normal(400)
    got = compare_paired(first, second)
    assert got.p_value == pytest.approx(1 / 10001, abs=1e-12)  # none of the patterns drawn comes near
    assert 0 < got.low < got.difference < got.high < 0.2
    assert got.difference == pytest.approx(got.first_mean - got.second_mean)
    back = compare_paired(second, first)
    assert (back.difference, back.low, back.high) == pytest.approx((-got.difference, -got.high, -got.low))
    assert back.p_value == got.p_value
    # the pairing is what finds it so surely: each model's own interval is wider
    assert got.high - got.low < bootstrap_interval(second).high - bootstrap_interval(second).low
    assert (got.num_queries, got.num_clusters) == (400, 400)


def test_equal_scores():
    got = bootstrap_interval([0.25] * 5)
    assert (got.mean, got.low, got.high) == (0.25, 0.25, 0.25)
    scores = np.random.default_rng(8).random(50)
    got = compare_paired(scores, scores)
    assert (got.difference, got.low, got.high, got.p_value) == (0, 0, 0, 1)


def test_follows_from_the_seed_and_takes_tensors_arrays_and_lists():
    scores = torch.rand(40, dtype=torch.float64)
    scores[3] = torch.nan
    expected = bootstrap_interval(scores, torch.arange(40) // 4, seed=3)
    assert bootstrap_interval(scores.tolist(), (torch.arange(40) // 4).tolist(), seed=3) == expected
    assert bootstrap_interval(scores.numpy(), (torch.arange(40) // 4).numpy(), seed=3) == expected
    assert bootstrap_interval(scores.requires_grad_(), torch.arange(40) // 4, seed=4) != expected


def test_of_retrieval_scores_with_a_lone_query():
    labels = torch.cat([torch.arange(12).repeat_interleave(5), torch.tensor([99])])
    centres = normalize(torch.randn(100, 16), dim=1)
    near, far = (normalize(centres[labels] + s * torch.randn(61, 16), dim=1) for s in (0.15, 0.6))
    scores = [retrieval_scores(embeddings, labels, recall_at=(1,))["map_at_r"] for embeddings in (near, far)]
    got = bootstrap_interval(scores[0], labels)
    assert (got.num_queries, got.num_clusters) == (60, 12)
    compared = compare_paired(*scores, clusters=labels)
    assert (compared.num_queries, compared.num_clusters) == (60, 12)
    assert compared.low > 0
    assert compared.p_value == pytest.approx(2 / 2**12, abs=1 / 2**12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [[0.5, 0.5]]}, r"scores must be 1-D, got shape \(1, 2\)"),
        ({"scores": [0.5, math.inf]}, "finite or NaN, got 1 infinite"),
        ({"scores": [0.5, math.nan]}, "at least two answered queries, got 1"),
        ({"scores": []}, "at least two answered queries, got 0"),
        ({"clusters": [4, 4]}, "at least two clusters with answered queries, got 1"),
        ({"clusters": [4]}, r"one entry per query, shape \(2,\), got shape \(1,\)"),
        ({"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
        ({"confidence": 0.0}, "got 0.0"),
        ({"num_resamples": 0}, "num_resamples must be >= 1, got 0"),
    ],
)
def test_intervals_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"scores": [0.0, 1.0], **changes})


def test_comparison_refuses():
    with pytest.raises(ValueError, match="scores of the same queries, got 3 and 2"):
        compare_paired([0.0, 1, 1], [0.0, 1])
    with pytest.raises(ValueError, match=r"1 of 3 have a score of one only, the first at \[1\]"):
        compare_paired([0.0, math.nan, 1], [0.0, 1, 1])
    with pytest.raises(ValueError, match="num_permutations must be >= 1, got 0"):
        compare_paired([0.0, 1], [0.0, 1], num_permutations=0)


def test_examples_in_the_documentation():
    results = doctest.testmod(intervals)
    assert results.attempted > 3
    assert results.failed == 0
