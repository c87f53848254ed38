"""How sure a measure is: bootstrap confidence intervals, and the paired comparison of two models.

Both take the scores of single queries, [`retrieval_scores`], and treat the queries as a sample: they tell how much the
mean would differ had other queries (or other classes) of the same kind been drawn, with gallery and model as they are.
They say nothing about another training run; that takes several seeds.

Queries of one class stand or fall together. With `clusters` (the labels of the queries), whole classes are drawn
instead of queries: the interval is then about other classes too, which is what retrieval of unseen classes asks, and
mostly wider. Shapes: Q queries, of which those with a score of NaN can't be answered and are left out; G clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


_BLOCK_DRAWS = 2**21  # random numbers at a time, a few tens of MiB with what is made of them


@dataclass(frozen=True)
class Interval:
    """A mean score and its confidence interval.

    Attributes:
        mean: Over the queries that can be answered.
        low: Lower end of the interval.
        high: Upper end.
        confidence: Nominal coverage, such as 0.95.
        num_queries: Queries in the mean.
        num_clusters: Units that were drawn: the queries, or their clusters.
    """

    mean: float
    low: float
    high: float
    confidence: float
    num_queries: int
    num_clusters: int


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same queries.

    Attributes:
        difference: Mean score of the first minus that of the second.
        low: Lower end of its confidence interval.
        high: Upper end.
        p_value: Of the hypothesis that the two are interchangeable, two-sided.
        first_mean: Mean score of the first model.
        second_mean: Mean score of the second model.
        confidence: Nominal coverage of the interval.
        num_queries: Queries compared.
        num_clusters: Units that were drawn and whose signs were flipped: the queries, or their clusters.
    """

    difference: float
    low: float
    high: float
    p_value: float
    first_mean: float
    second_mean: float
    confidence: float
    num_queries: int
    num_clusters: int


def bootstrap_interval(scores, clusters=None, confidence=0.95, num_resamples=2000, seed=0):
    """Percentile bootstrap interval of a mean score.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13: draw as many queries as there are, with
    replacement, and take their mean; the interval reaches from the (1 - confidence) / 2 quantile of such means to the
    one at (1 + confidence) / 2. With clusters, as many clusters as there are are drawn, each with all its queries,
    and the mean is over the queries drawn: a ratio, as clusters differ in size.

    Its coverage is nominal for many units only; below some thirty of them (classes, too) it is too narrow. Where all
    scores are equal, the interval is that point.

    Args:
        scores: `(Q,)` floats: tensor, array or list, NaN where a query can't be answered.
        clusters: `(Q,)` integers, the unit that each query belongs to (its label); None: each query is its own.
        confidence: In (0, 1).
        num_resamples: >= 1; 2000 place the ends of a 95 % interval to about a tenth of the score's standard error.
        seed: Of the draws. Scores with the same queries answered see the same draws.

    Returns:
        [`Interval`].

    Raises:
        ValueError: scores or clusters aren't 1-D or differ in length, scores are infinite, there are fewer than two
            units to draw from, or confidence or num_resamples is out of range.

    Example:
        >>> interval = bootstrap_interval(torch.tensor([1.0, 0.0] * 50))
        >>> interval.mean, 0.38 < interval.low < 0.43, 0.57 < interval.high < 0.62
        (0.5, True, True)
    """
    _check_numbers(confidence, num_resamples=num_resamples)
    scores, clusters = _drop_unanswerable(clusters, scores=_to_scores(scores, "scores"))
    sums, sizes = _units(scores["scores"], clusters)
    low, high = _percentile_ends(sums, sizes, confidence, num_resamples, seed)
    mean = float(scores["scores"].mean())
    return Interval(mean, low, high, confidence, num_queries=len(scores["scores"]), num_clusters=len(sums))


def compare_paired(
    first_scores, second_scores, clusters=None, confidence=0.95, num_resamples=2000, num_permutations=10000, seed=0
):
    """Whether the first of two models scores higher than the second, on the same queries.

    The interval is the percentile bootstrap of the mean difference, as of [`bootstrap_interval`]. The p-value is that
    of the sign-flip permutation test (Fisher's randomisation test for pairs; Good, "Permutation, Parametric and
    Bootstrap Tests of Hypotheses", 2005, section 3.2): if the models are interchangeable, the difference of each query
    is as likely to have the other sign, so

        p = share of the sign patterns for which |sum of sign * difference| is at least the observed |sum|

    over all 2^G patterns where there are no more than num_permutations of them, else over num_permutations random ones
    with the observed one counted in, (b + 1) / (n + 1), so that it is never 0 and never too small on average (Phipson
    and Smyth, 2010). With clusters, all differences of a cluster change sign together. Two-sided; where several
    measures or models are compared, correct for that.

    Args:
        first_scores: `(Q,)` floats: tensor, array or list, NaN where a query can't be answered.
        second_scores: `(Q,)` likewise, of the same queries in the same order.
        clusters: `(Q,)` integers, the unit that each query belongs to (its label); None: each query is its own.
        confidence: In (0, 1).
        num_resamples: >= 1, for the interval.
        num_permutations: >= 1, for the p-value, whose smallest value is about 1 / num_permutations.
        seed: Of the draws.

    Returns:
        [`PairedComparison`].

    Raises:
        ValueError: as for [`bootstrap_interval`], or the two differ in length or in which queries can be answered.

    Example:
        >>> comparison = compare_paired([1.0, 1.0, 0.5, 1.0, 1.0], [0.5, 0.0, 0.5, 0.0, 0.5])
        >>> comparison.difference, comparison.p_value  # 4 differences with one sign: 2 of 16 patterns
        (0.6, 0.125)
    """
    _check_numbers(confidence, num_resamples=num_resamples, num_permutations=num_permutations)
    first, second = _to_scores(first_scores, "first_scores"), _to_scores(second_scores, "second_scores")
    if len(first) != len(second):
        raise ValueError(f"both models must have scores of the same queries, got {len(first)} and {len(second)}")
    unlike = np.flatnonzero(np.isnan(first) != np.isnan(second))
    if len(unlike):
        raise ValueError(
            f"both models must answer the same queries, but {len(unlike)} of {len(first)} have a score of one only, "
            f"the first at {unlike[:5].tolist()}"
        )
    scores, clusters = _drop_unanswerable(clusters, first=first, second=second)
    differences = scores["first"] - scores["second"]
    sums, sizes = _units(differences, clusters)
    low, high = _percentile_ends(sums, sizes, confidence, num_resamples, seed)
    return PairedComparison(
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=_sign_flip_p_value(sums, num_permutations, seed),
        first_mean=float(scores["first"].mean()),
        second_mean=float(scores["second"].mean()),
        confidence=confidence,
        num_queries=len(differences),
        num_clusters=len(sums),
    )


def _units(values, clusters):
    """Sum and number of the values of each unit, `(G,)` float64 each."""
    if clusters is None:
        sums, sizes = values, np.ones_like(values)
    else:
        _, position = np.unique(clusters, return_inverse=True)
        sums, sizes = np.bincount(position, weights=values), np.bincount(position).astype(float)
    if len(sums) < 2:
        unit = "answered queries" if clusters is None else "clusters with answered queries"
        raise ValueError(f"an interval needs at least two {unit}, got {len(sums)}")
    return sums, sizes


def _percentile_ends(sums, sizes, confidence, num_resamples, seed):
    generator = np.random.default_rng(seed)
    num_units = len(sums)
    equal_sizes = bool((sizes == sizes[0]).all())
    means = np.empty(num_resamples)
    per_block = max(1, _BLOCK_DRAWS // num_units)
    for start in range(0, num_resamples, per_block):
        block = means[start : start + per_block]
        drawn = generator.integers(0, num_units, size=(len(block), num_units), dtype=np.int32)
        drawn_sizes = sizes[0] * num_units if equal_sizes else sizes[drawn].sum(1)
        block[:] = sums[drawn].sum(1) / drawn_sizes
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _sign_flip_p_value(sums, num_permutations, seed):
    # Units that don't differ add nothing under either sign; leaving them out changes no share.
    sums = sums[sums != 0]
    num_units = len(sums)
    observed = abs(sums.sum())
    at_least = observed - 1e-12 * np.abs(sums).sum()  # patterns of equal sums must not be told apart by rounding
    if num_units < 63 and 2**num_units <= num_permutations:
        patterns = np.arange(2**num_units)
        signs = 1.0 - 2.0 * (patterns[:, None] >> np.arange(num_units) & 1)
        return float((np.abs(signs @ sums) >= at_least).mean())

    # apart from the bootstrap's draws, though both come of one seed
    generator = np.random.default_rng([seed, 1])
    total, reached = sums.sum(), 0
    per_block = max(1, _BLOCK_DRAWS // num_units)
    for start in range(0, num_permutations, per_block):
        count = min(per_block, num_permutations - start)
        num_bytes = -(-num_units // 8)
        bits = np.frombuffer(generator.bytes(count * num_bytes), np.uint8).reshape(count, num_bytes)
        flipped = np.unpackbits(bits, axis=1, count=num_units).astype(np.float64)
        reached += int((np.abs(total - 2 * (flipped @ sums)) >= at_least).sum())
    return (reached + 1) / (num_permutations + 1)


def _to_scores(scores, name):
    scores = torch.as_tensor(scores, dtype=torch.float64).detach().cpu().numpy()
    if scores.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {scores.shape}")
    if np.isinf(scores).any():
        raise ValueError(f"{name} must be finite or NaN, got {int(np.isinf(scores).sum())} infinite ones")
    return scores


def _drop_unanswerable(clusters, **scores):
    """The scores of the queries that can be answered, and their clusters."""
    answered = ~np.isnan(next(iter(scores.values())))
    if clusters is not None:
        clusters = torch.as_tensor(clusters).cpu().numpy()
        if clusters.shape != answered.shape:
            raise ValueError(
                f"clusters must have one entry per query, shape {answered.shape}, got shape {clusters.shape}"
            )
        clusters = clusters[answered]
    return {name: values[answered] for name, values in scores.items()}, clusters


def _check_numbers(confidence, **counts):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


__all__ = ["Interval", "PairedComparison", "bootstrap_interval", "compare_paired"]
