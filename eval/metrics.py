"""Retrieval metrics of metric learning: Recall@K, MAP@R in both definitions, R-precision, mAP@K.

Shapes: Q queries, G gallery items, E embedding width. R is the number of *other* items of a query's class in the
gallery. Queries with R = 0 can't be answered: they are left out of every mean, and counted. Of a query whose
neighbours, nearest first and without itself, are hits where they have its label, the scores are

    recall_at_K           1 if one of the first K is a hit, else 0
    map_at_r              1/R     * sum_{i=1..R}    [neighbour i is a hit] * (hits among the first i) / i
    map_at_r_published    1/(R+1) * sum_{i=1..R+1}  [neighbour i is a hit] * (hits among the first i) / i
    r_precision           (hits among the first R) / R
    map_at_K              1/min(R, K) * sum_{i=1..K}  [neighbour i is a hit] * (hits among the first i) / i

- `recall_at_K` is the hit rate of information retrieval (Jegou et al., "Product Quantization for Nearest Neighbor
  Search", PAMI 2011, and Oh Song et al., CVPR 2016).
- `map_at_r` (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020, section 3.2) is 1 exactly if the R nearest
  are the R others of the class, and never above `r_precision`.
- `map_at_r_published` is what the published numbers of this method are: R there is the size of the class with the
  query counted in, while the query is not among its neighbours. At most R / (R + 1), since only R hits exist: compare
  it only with numbers of the same definition. It may be above or below `map_at_r`: a late hit at rank R + 1 counts.
- `map_at_K` is as in retrieval of landmarks (Weyand et al., "Google Landmarks Dataset v2", CVPR 2020, section 5.1), 1
  exactly if the first min(R, K) are hits. Some divide by R even where R > K, by the hits found, or (as the code of
  Roth et al., ICML 2020, does for mAP@1000) by the size of the class with the query counted in: compare only numbers
  of the same definition. A hit beyond rank R counts here and not in `map_at_r`: never below that where K >= R.

Where neighbours are tied, each score is its mean over all their orders (see `ties`).
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from .checks import as_tensor, check_labels, refuse_same_sets
from .neighbours import BlockedSimilarity, check_block_size
from .own_gallery import MAX_DEPTH, SIDE, NearestOthers
from .reranking import check_reordering, reordered_rows
from .ties import rank_sorted, rank_with_ties


def count_relevant(query_labels, gallery_labels=None, excluded=None):
    """R of each query: how many items of its class it could find.

    Args:
        query_labels: `(Q,)` integer.
        gallery_labels: `(G,)` integer; None: the queries are the gallery, and none counts itself.
        excluded: `(n, 2)` integer, different pairs of a query and a gallery item that doesn't count for it.

    Returns:
        `(Q,)` int64, >= 0.

    Raises:
        TypeError: labels aren't integer tensors.
        ValueError: labels aren't 1-D, or there are none.

    Example:
        >>> count_relevant(torch.tensor([4, 9, 4, 4]))
        tensor([2, 0, 2, 2])
        >>> count_relevant(torch.tensor([4, 9]), torch.tensor([9, 9, 1]))
        tensor([0, 2])
    """
    query_labels = check_labels(query_labels, "query_labels")
    if gallery_labels is None:
        _, position, counts = torch.unique(query_labels, return_inverse=True, return_counts=True)
        return counts[position] - 1
    gallery_labels = check_labels(gallery_labels, "gallery_labels").to(query_labels.device)
    classes, counts = torch.unique(gallery_labels, return_counts=True)
    position = torch.searchsorted(classes, query_labels).clamp(max=len(classes) - 1)
    relevant = torch.where(classes[position] == query_labels, counts[position], 0)
    if excluded is not None:
        rows, items = as_tensor(excluded).to(query_labels.device).unbind(1)
        lost = rows[query_labels[rows] == gallery_labels[items]]
        relevant -= lost.bincount(minlength=len(relevant))
    return relevant


@torch.no_grad()
def retrieval_scores(
    query_embeddings,
    query_labels,
    gallery_embeddings=None,
    gallery_labels=None,
    recall_at=(1, 2, 4, 8),
    block_size=None,
    device=None,
    map_at=(),
    excluded=None,
    rerank=None,
    expand=None,
    progress=False,
):
    """The scores of every single query, whose means are [`retrieval_metrics`]; same arguments, formulas in the module.

    Returns:
        Dict of `(Q,)` float64 tensors in [0, 1] on the queries' device, NaN for queries that can't be answered:
        `recall_at_K` for each K, `map_at_r`, `map_at_r_published` (without a gallery of its own), `r_precision`,
        and `map_at_K` for each K of map_at.

    Raises:
        TypeError, ValueError: as for [`retrieval_metrics`], but queries that can't be answered are no error.
    """
    query_embeddings = as_tensor(query_embeddings)
    blocks, query_labels, gallery_labels = check_sets(
        query_embeddings, query_labels, gallery_embeddings, gallery_labels, device, excluded
    )
    recall_at, map_at = _check_ranks(recall_at, "recall_at"), _check_ranks(map_at, "map_at")
    ranks = (1, *recall_at, *map_at)
    num_relevant = count_relevant(query_labels, None if blocks.excludes_self else gallery_labels, blocks.excluded)
    check_block_size(block_size)
    check_reordering(rerank, expand)
    names = [*(f"recall_at_{k}" for k in recall_at), "map_at_r", "map_at_r_published", "r_precision"]
    names += [f"map_at_{k}" for k in map_at]
    if not blocks.excludes_self:
        names.remove("map_at_r_published")
    scores = {name: torch.full((blocks.num_queries,), torch.nan, dtype=torch.float64) for name in names}

    def write(rows, ranking):
        found = _scores(ranking, num_relevant[rows.to(blocks.device)], recall_at, map_at, blocks.num_retrievable)
        for name, values in scores.items():
            values[rows] = found[name].cpu()

    asked = (num_relevant > 0).cpu()
    as_they_are = rerank is None and expand is None
    if as_they_are and blocks.excludes_self and blocks.num_queries > (block_size or SIDE):
        for rows, ranking in _rank_by_squares(blocks, query_labels, num_relevant, ranks, block_size, progress):
            write(rows, ranking)
            asked[rows] = False

    # By class size, so that a few large classes don't make every block look as deep as theirs
    by_relevant = num_relevant.cpu().sort(stable=True)
    order = by_relevant.indices[asked[by_relevant.indices]]
    deepest = min(max(int(by_relevant.values[-1]) + 1, *ranks), blocks.num_retrievable)
    with tqdm(total=len(order), desc="Queries", disable=not progress, leave=False, delay=5) as bar:
        for rows in order.split(block_size or blocks.block_size(deepest)) if len(order) else ():
            here = rows.to(blocks.device)
            depth = min(max(int(num_relevant[here].max()) + 1, *ranks), blocks.num_retrievable)
            similarity = reordered_rows(blocks, rows, rerank, expand)
            write(rows, rank_with_ties(similarity, query_labels[here], gallery_labels, depth))
            bar.update(len(rows))
    return {name: values.to(query_embeddings.device) for name, values in scores.items()}


def retrieval_metrics(
    query_embeddings,
    query_labels,
    gallery_embeddings=None,
    gallery_labels=None,
    recall_at=(1, 2, 4, 8),
    block_size=None,
    device=None,
    map_at=(),
    excluded=None,
    rerank=None,
    expand=None,
    progress=False,
):
    """Recall@K, MAP@R and R-precision of embeddings, exactly, by cosine similarity.

    Without a gallery the queries are the gallery, and each query's own row is excluded by index. With one, the two are
    taken to have no item in common, as nothing in two arrays could tell: a query that is in the gallery too finds
    itself, and counts as right, unless `excluded` says which item it is. The very same rows twice are refused. Items
    of equal similarity have no order: each metric is its mean over all their orders, so the order of the rows changes
    nothing, and equal embeddings score what chance does. Queries whose class has no (other) item in the gallery are
    left out.

    Memory beside the embeddings is bounded by the block, whatever the sizes of the classes.

    Args:
        query_embeddings: `(Q, E)` float of any precision, L2-normalised; compared in float32, or float64 if given so.
        query_labels: `(Q,)` integer.
        gallery_embeddings: `(G, E)` likewise, or None.
        gallery_labels: `(G,)` integer, or None.
        recall_at: The K of Recall@K, each >= 1. A K beyond the gallery's size means all of it (Recall@K is then 1).
        block_size: Queries at a time; None: 2,048 where they are the gallery, else as many as fit into 256 MiB.
        device: Where to compute; None: where the queries are.
        map_at: The K of mAP@K, each >= 1 (1000 is customary), from the same similarities; none by default.
        excluded: `(n, 2)` integer, pairs of a query and a gallery item that it may not find, of
            `same_items(query_ids, gallery_ids)`; None: there are none.
        rerank: [`Reranking`] of what each query finds; None: the order is that of the similarities. Among items that
            are tied at the end of its shortlist, those of the lower rows belong to it.
        expand: [`QueryExpansion`] of each query, before that; None: queries as they are.
        progress: Show a progress bar where it takes more than some seconds.

    Returns:
        Dict with `recall_at_K` for each K, `map_at_r`, `map_at_r_published`, `r_precision` and `map_at_K` for each K
        of map_at, all floats in [0, 1], and the counts `num_queries` (answered), `num_unanswerable` and, if anything
        was excluded, `num_in_gallery` (queries that are in the gallery too). With a gallery of its own there is no
        `map_at_r_published`: it comes of counting the query with its class, which is in another set there.

    Raises:
        TypeError: embeddings aren't floating-point tensors, or labels aren't integer tensors.
        ValueError: shapes disagree, a set is empty, embeddings are not finite or not L2-normalised, only one of
            gallery_embeddings and gallery_labels is given, both sets are the same rows and `excluded` is None,
            recall_at, map_at or block_size is out of range, or no query can be answered.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
        >>> metrics = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1, 2]), recall_at=(1, 2))
        >>> metrics["recall_at_1"], metrics["recall_at_2"], metrics["num_queries"], metrics["num_unanswerable"]
        (0.5, 1.0, 4, 1)
        >>> metrics["map_at_r"], metrics["map_at_r_published"]
        (0.5, 0.375)
    """
    sets = (query_embeddings, query_labels, gallery_embeddings, gallery_labels)
    scores = retrieval_scores(*sets, recall_at, block_size, device, map_at, excluded, rerank, expand, progress)
    return mean_scores(scores) | count_in_gallery(excluded)


def mean_scores(scores):
    """The means of [`retrieval_scores`] over the queries that can be answered, as [`retrieval_metrics`] returns them.

    For who needs both the means and the scores (of every query, for confidence intervals), in one pass.

    Args:
        scores: Dict of `(Q,)` floats, NaN for queries that can't be answered.

    Returns:
        Dict of the means, and the counts `num_queries` (answered) and `num_unanswerable`.

    Raises:
        ValueError: no query can be answered.

    Example:
        >>> mean_scores({"map_at_r": torch.tensor([1.0, torch.nan, 0.5])})
        {'map_at_r': 0.75, 'num_queries': 2, 'num_unanswerable': 1}
    """
    answered = ~next(iter(scores.values())).isnan()
    num_queries = int(answered.sum())
    if not num_queries:
        raise ValueError(
            f"none of the {len(answered)} queries can be answered: expected some class with "
            + ("two items" if "map_at_r_published" in scores else "an item in the gallery as well")
            + ", got none"
        )
    metrics = {name: values[answered].mean().item() for name, values in scores.items()}
    return {**metrics, "num_queries": num_queries, "num_unanswerable": len(answered) - num_queries}


def count_in_gallery(excluded):
    """`{"num_in_gallery": n}`, how many queries have an item that they may not find; empty if none has."""
    num_queries = 0 if excluded is None else len(as_tensor(excluded)[:, 0].unique())
    return {"num_in_gallery": num_queries} if num_queries else {}


def _rank_by_squares(blocks, labels, num_relevant, ranks, side, progress):
    """Rows and rankings of queries that are their own gallery, with R > 0; those that need whole rows are left out."""
    shallow = (num_relevant < MAX_DEPTH) & (num_relevant > 0)
    if max(ranks) > MAX_DEPTH or not 2 * int(shallow.sum()) > int((num_relevant > 0).sum()):
        return
    depth = min(max(int(num_relevant[shallow].max()) + 1, *ranks), blocks.num_retrievable)
    nearest = NearestOthers(blocks.queries, depth, side, progress)
    for rows in shallow.nonzero().squeeze(1).split(SIDE):
        similarity, items, certain = nearest.rows(rows)
        rows, items = rows[certain], items[certain]
        ranking = rank_sorted(similarity[certain], labels[items] == labels[rows, None])
        if len(rows):
            yield rows.cpu(), ranking.first(depth)


def _scores(ranking, num_relevant, recall_at, map_at, can_find):
    """Scores of some queries, all with R > 0, of their first ranks: dict of `(b,)` float64."""
    deepest = min(int(num_relevant.max()) + 1, can_find)
    scores = {f"recall_at_{k}": ranking.chance_of_hit(min(k, can_find)) for k in recall_at}
    all_terms = ranking.expected_precision_terms()
    terms = all_terms[:, :deepest]
    scores["map_at_r"] = _sum_of_first(terms, num_relevant) / num_relevant
    scores["map_at_r_published"] = _sum_of_first(terms, (num_relevant + 1).clamp(max=can_find)) / (num_relevant + 1)
    scores["r_precision"] = _sum_of_first(ranking.expected_hits()[:, :deepest], num_relevant) / num_relevant
    for k in map_at:
        scores[f"map_at_{k}"] = all_terms[:, :k].sum(1) / num_relevant.clamp(max=k)
    return scores


def _sum_of_first(terms, count):
    """Sum of each row's first `count` entries, 1 <= count <= columns."""
    return terms.cumsum(1).gather(1, count[:, None] - 1).squeeze(1)


def check_sets(query_embeddings, query_labels, gallery_embeddings, gallery_labels, device, excluded=None):
    """The similarity of two sets that fit together, and both sets' labels on its device."""
    if (gallery_embeddings is None) != (gallery_labels is None):
        missing = "gallery_embeddings" if gallery_embeddings is None else "gallery_labels"
        raise ValueError(f"gallery_embeddings and gallery_labels must be given together, got no {missing}")
    blocks = BlockedSimilarity(query_embeddings, gallery_embeddings, device=device, excluded=excluded)
    query_labels = check_labels(query_labels, "query_labels", length=blocks.num_queries).to(blocks.device)
    if gallery_labels is None:
        return blocks, query_labels, query_labels
    gallery_labels = check_labels(gallery_labels, "gallery_labels", length=blocks.num_gallery).to(blocks.device)
    if excluded is None:
        refuse_same_sets(query_embeddings, query_labels, gallery_embeddings, gallery_labels)
    return blocks, query_labels, gallery_labels


def _check_ranks(ranks, name):
    ranks = tuple(ranks)
    if any(int(k) != k or k < 1 for k in ranks):
        raise ValueError(f"{name} must hold whole numbers >= 1, got {ranks}")
    return tuple(int(k) for k in ranks)


def select_pairs(pairs, query_rows, gallery_rows):
    """The pairs among some rows, numbered as they stand there.

    Args:
        pairs: `(n, 2)` int64.
        query_rows, gallery_rows: int64, each row once.
    """
    columns = []
    for column, rows in enumerate((query_rows, gallery_rows)):
        highest = max([-1, *pairs[:, column].tolist(), *rows.tolist()])
        places = torch.full((highest + 1,), -1)
        places[rows] = torch.arange(len(rows))
        columns.append(places[pairs[:, column]])
    pairs = torch.stack(columns, dim=1)
    return pairs[(pairs >= 0).all(1)]


__all__ = [
    "check_sets",
    "count_in_gallery",
    "count_relevant",
    "mean_scores",
    "retrieval_metrics",
    "retrieval_scores",
    "select_pairs",
]
