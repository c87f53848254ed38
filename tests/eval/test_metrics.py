"""Retrieval metrics against slow oracles that count, and try every order of tied items."""

import doctest
import math
from itertools import combinations, groupby

import label_metrics
import pytest
import torch
from label_metrics import map_at_k, map_at_r, map_at_r_published, r_precision, recall_at_k
from torch.nn.functional import normalize

from vptsp.eval import metrics
from vptsp.eval.metrics import count_relevant, retrieval_metrics, retrieval_scores
from vptsp.eval.neighbours import nearest_neighbours


RECALL_AT = (1, 2, 4, 8)
MAP_AT = (1, 3, 5, 1000)


def ranked_groups(query, items, hits):
    """Hits by descending similarity, equal ones in one list: `[[True], [False, True], ...]`."""
    similarity = [math.fsum(a * b for a, b in zip(query, item, strict=True)) for item in items]
    ranked = sorted(zip(similarity, hits, strict=True), key=lambda pair: -pair[0])
    return [[hit for _, hit in group] for _, group in groupby(ranked, key=lambda pair: pair[0])]


def mean_over_orders(groups, score_of_rank):
    """Mean over all orders of each group of the sum of `score_of_rank(rank, hits among the first rank)` over hits."""
    total, rank, found = 0.0, 0, 0
    for group in groups:
        placements = list(combinations(range(len(group)), sum(group)))
        for placement in placements:
            for number, place in enumerate(placement, start=1):
                total += score_of_rank(rank + place + 1, found + number) / len(placements)
        rank, found = rank + len(group), found + sum(group)
    return total


def slow_scores(
    query_embeddings, query_labels, gallery_embeddings=None, gallery_labels=None, recall_at=RECALL_AT, map_at=()
):
    """Scores of every query in Python floats; None where it can't be answered."""
    own = gallery_embeddings is None
    items = (query_embeddings if own else gallery_embeddings).double().tolist()
    labels = (query_labels if own else gallery_labels).tolist()
    scores = []
    for number, (query, label) in enumerate(
        zip(query_embeddings.double().tolist(), query_labels.tolist(), strict=True)
    ):
        others = [i for i in range(len(items)) if not (own and i == number)]
        groups = ranked_groups(query, [items[i] for i in others], [labels[i] == label for i in others])
        relevant = sum(sum(group) for group in groups)
        if relevant == 0:
            scores.append(None)
            continue

        # "the first hit stands at rank <= k" is what recall asks, so only a hit that is the first one scores
        score = {
            f"recall_at_{k}": mean_over_orders(groups, lambda rank, found, k=k: found == 1 and rank <= k)
            for k in recall_at
        }
        score["r_precision"] = mean_over_orders(groups, lambda rank, _, r=relevant: (rank <= r) / r)
        score["map_at_r"] = mean_over_orders(groups, lambda rank, found, r=relevant: (rank <= r) * found / rank / r)
        for k in map_at:
            total = mean_over_orders(groups, lambda rank, found, k=k: (rank <= k) * found / rank)
            score[f"map_at_{k}"] = total / min(relevant, k)
        if own:
            size = relevant + 1
            score["map_at_r_published"] = mean_over_orders(
                groups, lambda rank, found, n=size: (rank <= n) * found / rank / n
            )
        scores.append(score)
    return scores


def mean_scores(scores):
    answered = [score for score in scores if score is not None]
    means = {name: math.fsum(score[name] for score in answered) / len(answered) for name in answered[0]}
    return {**means, "num_queries": len(answered), "num_unanswerable": len(scores) - len(answered)}


def draw(generator, count, kind):
    """Embeddings with exact dot products, so that the oracle and float32 see the same ties."""
    if kind == "corners":  # 16 different vectors: ties and copies everywhere
        return (torch.randint(0, 2, (count, 4), generator=generator) * 2 - 1) / 2
    if kind == "axes":  # similarities -1, 0 and 1
        signs = torch.randint(0, 2, (count, 1), generator=generator) * 2 - 1
        return torch.eye(3)[torch.randint(0, 3, (count,), generator=generator)] * signs
    # few ties: multiples of 2^-11, whose products float32 adds up without rounding; some rows are there twice
    embeddings = (normalize(torch.randn(count, 6, generator=generator), dim=1) * 2048).round() / 2048
    copies = torch.randint(0, count, (count // 4,), generator=generator)
    embeddings[: len(copies)] = embeddings[copies]
    return embeddings


@pytest.mark.parametrize("kind", ["corners", "axes", "fine"])
@pytest.mark.parametrize("own_gallery", [False, True])
def test_equals_the_mean_over_all_orders_of_ties(kind, own_gallery):
    generator = torch.Generator().manual_seed(4)
    dtypes = [torch.float32, torch.float64, torch.float16] + ([] if kind == "fine" else [torch.bfloat16])
    answered = unanswerable = 0
    for case in range(60):
        count = int(torch.randint(2, 14, (), generator=generator))
        size = int(torch.randint(1, 14, (), generator=generator))
        num_classes = int(torch.randint(1, 7, (), generator=generator))
        queries = draw(generator, count, kind)
        labels = torch.randint(0, num_classes, (count,), generator=generator)
        sets = [queries, labels]
        if own_gallery:
            sets += [draw(generator, size, kind), torch.randint(0, num_classes + 1, (size,), generator=generator)]
        map_at = MAP_AT if case % 4 else ()
        scores = slow_scores(*sets, map_at=map_at)
        given = [values.to(dtypes[case % len(dtypes)]) if values.is_floating_point() else values for values in sets]
        fast = retrieval_scores(*given, block_size=None if case % 3 == 0 else 1 + case % 5, map_at=map_at)

        for number, score in enumerate(scores):
            if score is None:
                assert all(values[number].isnan() for values in fast.values())
            else:
                assert {name: values[number].item() for name, values in fast.items()} == pytest.approx(score, abs=1e-9)
        if any(score is not None for score in scores):
            assert retrieval_metrics(*given, map_at=map_at) == pytest.approx(mean_scores(scores), abs=1e-9)
        answered += sum(score is not None for score in scores)
        unanswerable += sum(score is None for score in scores)
    assert answered > 150
    assert unanswerable > 20


@pytest.mark.parametrize("own_gallery", [False, True])
def test_equals_the_oracle_on_larger_sets_with_classes_of_very_different_sizes(own_gallery):
    generator = torch.Generator().manual_seed(5)
    labels = torch.cat([torch.zeros(60, dtype=torch.long), torch.arange(1, 8), torch.arange(20, 40).repeat(2)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    embeddings = normalize(torch.randn(len(labels), 12, generator=generator, dtype=torch.float64), dim=1)
    sets = [embeddings[:50], labels[:50], embeddings[50:], labels[50:]] if own_gallery else [embeddings, labels]
    expected = mean_scores(slow_scores(*sets, recall_at=(1, 10, 30), map_at=MAP_AT))
    for block_size in (None, 1, 13):
        got = retrieval_metrics(*sets, recall_at=(1, 10, 30), block_size=block_size, map_at=MAP_AT)
        assert got == pytest.approx(expected, abs=1e-12)
    assert list(got)[:4] == ["recall_at_1", "recall_at_10", "recall_at_30", "map_at_r"]
    assert expected["num_unanswerable"] >= 7


def test_functions_of_labels_equal_the_whole_where_nothing_is_tied():
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        labels = torch.randint(0, 6, (30,), generator=generator)
        labels[0] = 99
        embeddings = normalize(torch.randn(30, 8, generator=generator, dtype=torch.float64), dim=1)
        expected = retrieval_metrics(embeddings, labels, map_at=MAP_AT)
        neighbour_labels = labels[nearest_neighbours(embeddings, 29)[1]]
        relevant = count_relevant(labels)
        for k in RECALL_AT:
            assert recall_at_k(neighbour_labels, labels, k, relevant) == pytest.approx(expected[f"recall_at_{k}"])
        for k in MAP_AT:
            assert map_at_k(neighbour_labels, labels, relevant, k) == pytest.approx(expected[f"map_at_{k}"])
        assert map_at_k(neighbour_labels, labels, relevant) >= expected["map_at_r"]
        assert map_at_r(neighbour_labels, labels, relevant) == pytest.approx(expected["map_at_r"])
        assert map_at_r_published(neighbour_labels, labels, relevant) == pytest.approx(expected["map_at_r_published"])
        assert r_precision(neighbour_labels, labels, relevant) == pytest.approx(expected["r_precision"])
        # without R, the lone query is a miss
        assert recall_at_k(neighbour_labels, labels, 29) < recall_at_k(neighbour_labels, labels, 29, relevant) == 1


def test_by_hand_the_two_definitions_of_map_at_r():
    # On a half circle: class 0 at 0, 10 and 50 degrees, class 1 at 20 and 33.
    degrees = torch.tensor([0.0, 10.0, 20.0, 33.0, 50.0], dtype=torch.float64).deg2rad()
    embeddings = torch.stack([degrees.cos(), degrees.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 0])
    # neighbours:   0: 10+ 20  33  50+    10: 0+ 20 33 50+ (0 and 20 are equally far)    20: 10 33+ 0 50
    #              33: 20+ 50  10  0      50: 33 20 10+ 0+
    scores = retrieval_scores(embeddings[[0, 2, 3, 4]], labels[[0, 2, 3, 4]], embeddings, labels)
    assert "map_at_r_published" not in scores
    scores = retrieval_scores(embeddings, labels)
    assert scores["map_at_r"][[0, 2, 3, 4]].tolist() == pytest.approx([1 / 2, 0, 1, 0])
    assert scores["map_at_r_published"][[0, 2, 3, 4]].tolist() == pytest.approx([1 / 3, 1 / 4, 1 / 2, (1 / 3) / 3])
    assert scores["r_precision"][[0, 2, 3, 4]].tolist() == pytest.approx([1 / 2, 0, 1, 0])
    assert scores["recall_at_1"][[0, 2, 3, 4]].tolist() == [1, 0, 1, 0]
    assert scores["recall_at_2"][[0, 2, 3, 4]].tolist() == [1, 1, 1, 0]


def test_by_hand_a_perfect_retriever_scores_r_over_r_plus_1_in_the_published_definition():
    embeddings = torch.eye(3).repeat_interleave(torch.tensor([2, 4, 1]), dim=0)
    got = retrieval_metrics(embeddings, torch.tensor([0, 0, 1, 1, 1, 1, 2]))
    assert got["map_at_r"] == got["r_precision"] == got["recall_at_1"] == 1
    assert got["map_at_r_published"] == pytest.approx((2 * 1 / 2 + 4 * 3 / 4) / 6)
    assert (got["num_queries"], got["num_unanswerable"]) == (6, 1)


def test_by_hand_negative_similarities_rank_like_others():
    embeddings = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.8, 0.6], [-1.0, 0.0]])
    got = retrieval_scores(embeddings, torch.tensor([0, 0, 1, 1]), recall_at=(1, 2))
    assert got["recall_at_1"].tolist() == [1, 0, 0, 1]  # the best of row 0 is at -0.6
    assert got["map_at_r_published"].tolist() == pytest.approx([1 / 2, 0, 1 / 4, 1 / 2])


def test_copies_of_one_image_in_two_classes_score_one_half():
    # Rows 0-2 are one image, filed under two classes. Dropping each row's first hit would leave some query itself in
    # its ranking, as a sure "hit" of its own class.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    scores = retrieval_scores(embeddings, labels, recall_at=(1,))
    # row 0 finds 1 (wrong) or 2 (right); 1 finds 0 and 2 before 3; 3 finds 0, 1, 2 in any order
    assert scores["recall_at_1"].tolist() == pytest.approx([1 / 2, 0, 1 / 2, 1 / 3])

    first = (embeddings @ embeddings.T).sort(dim=1, descending=True, stable=True).indices[:, 1]
    dropped_first_hit = (labels[first] == labels).double()
    assert first[2] == 1 and first[1] == 1  # row 1 "finds" itself
    assert dropped_first_hit.tolist() != scores["recall_at_1"].tolist()


@pytest.mark.parametrize("by_class", [True, False])
def test_equal_embeddings_score_chance(by_class):
    relevant, count = 9, 200
    labels = torch.arange(count // (relevant + 1)).repeat_interleave(relevant + 1)
    if not by_class:
        labels = labels[torch.randperm(count)]
    embeddings = normalize(torch.randn(1, 33), dim=1).expand(count, 33)
    got = retrieval_metrics(embeddings, labels, block_size=77)

    others = count - 1
    chance = relevant / others
    for k in RECALL_AT:
        expected = 1 - math.comb(others - relevant, k) / math.comb(others, k)
        assert got[f"recall_at_{k}"] == pytest.approx(expected, abs=1e-10)
    assert got["r_precision"] == pytest.approx(chance, abs=1e-12)
    terms = [chance * (1 + (i - 1) * (relevant - 1) / (others - 1)) / i for i in range(1, relevant + 2)]
    assert got["map_at_r"] == pytest.approx(sum(terms[:-1]) / relevant, abs=1e-12)
    assert got["map_at_r_published"] == pytest.approx(sum(terms) / (relevant + 1), abs=1e-12)
    for k in MAP_AT:
        got = retrieval_metrics(embeddings, labels, map_at=[k])[f"map_at_{k}"]
        ranks = range(1, min(k, others) + 1)
        terms = [chance * (1 + (i - 1) * (relevant - 1) / (others - 1)) / i for i in ranks]
        assert got == pytest.approx(sum(terms) / min(k, relevant), abs=1e-12)


def test_chance_of_equal_embeddings_is_what_random_orders_give():
    generator = torch.Generator().manual_seed(7)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    got = retrieval_metrics(torch.eye(2)[:1].expand(12, 2), labels, recall_at=(3,))
    relevant = count_relevant(labels)
    sums = torch.zeros(3, dtype=torch.float64)
    for _ in range(800):
        order = torch.stack([torch.randperm(11, generator=generator) for _ in range(12)])
        order += order >= torch.arange(12)[:, None]  # skip the query itself
        found = labels[order]
        sums += torch.tensor(
            [
                recall_at_k(found, labels, 3),
                map_at_r(found, labels, relevant),
                map_at_r_published(found, labels, relevant),
            ]
        )
    expected = [got["recall_at_3"], got["map_at_r"], got["map_at_r_published"]]
    assert (sums / 800).tolist() == pytest.approx(expected, abs=0.02)


def test_the_order_of_rows_changes_nothing():
    generator = torch.Generator().manual_seed(8)
    for kind in ("corners", "fine"):
        embeddings = draw(generator, 40, kind)
        labels = torch.arange(40) // 5
        expected = retrieval_scores(embeddings, labels)
        for _ in range(5):
            order = torch.randperm(40, generator=generator)
            got = retrieval_scores(embeddings[order], labels[order], block_size=9)
            for name, values in got.items():
                torch.testing.assert_close(values, expected[name][order], rtol=0, atol=1e-12)


def test_a_tie_cut_by_k_counts_the_items_beyond_it():
    # One better item (wrong), then 4 equal ones of which one is right: ranks 2-5 hold the hit with 1/4 each.
    gallery = torch.tensor([[0.6, 0.8], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    gallery_labels = torch.tensor([1, 1, 1, 0, 1])
    got = retrieval_metrics(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), gallery, gallery_labels, (1, 2, 3, 4, 5))
    recalls = [got[f"recall_at_{k}"] for k in (1, 2, 3, 4, 5)]
    assert recalls == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4, 1], abs=1e-12)


def test_recall_beyond_the_gallery_looks_at_all_of_it():
    got = retrieval_metrics(torch.eye(4), torch.tensor([0, 0, 1, 1]), recall_at=(3, 4, 1000))
    assert got["recall_at_3"] == got["recall_at_4"] == got["recall_at_1000"] == 1
    got = retrieval_metrics(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([1, 0]), recall_at=(1, 9))
    assert (got["recall_at_1"], got["recall_at_9"]) == (0, 1)


def test_one_class_alone_is_always_right():
    got = retrieval_metrics(normalize(torch.randn(5, 3), dim=1), torch.full((5,), 7), recall_at=(1,))
    assert got == pytest.approx(
        {
            "recall_at_1": 1,
            "map_at_r": 1,
            "map_at_r_published": 4 / 5,  # there is no fifth neighbour
            "r_precision": 1,
            "num_queries": 5,
            "num_unanswerable": 0,
        }
    )


def test_no_query_that_can_be_answered():
    with pytest.raises(ValueError, match="none of the 3 queries can be answered: expected some class with two items"):
        retrieval_metrics(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="none of the 1 queries"):
        retrieval_metrics(torch.eye(1), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"none of the 2 queries can be answered: .* in the gallery"):
        retrieval_metrics(torch.eye(2), torch.tensor([0, 5]), torch.eye(2), torch.tensor([1, 2]))
    assert retrieval_scores(torch.eye(3), torch.arange(3))["map_at_r"].isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query_labels": torch.zeros(3)}, TypeError, "query_labels must be an integer tensor, got torch.float32"),
        ({"query_labels": torch.ones(3, dtype=torch.bool)}, TypeError, "integer tensor, got torch.bool"),
        ({"query_labels": [0, 0, 1]}, TypeError, "integer tensor, got list"),
        ({"query_labels": torch.zeros(4, dtype=torch.long)}, ValueError, "one label per embedding, 3, got 4"),
        ({"query_labels": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"1-D tensor .*, got shape \(3, 1\)"),
        ({"gallery_embeddings": torch.eye(3)}, ValueError, "given together, got no gallery_labels"),
        ({"gallery_labels": torch.zeros(3).long()}, ValueError, "given together, got no gallery_embeddings"),
        (
            {"gallery_embeddings": torch.eye(3), "gallery_labels": torch.zeros(2).long()},
            ValueError,
            "gallery_labels must have one label per embedding, 3, got 2",
        ),
        (
            {"gallery_embeddings": torch.ones(0, 3), "gallery_labels": torch.zeros(0).long()},
            ValueError,
            r"gallery_embeddings must have shape .* got \(0, 3\)",
        ),
        ({"recall_at": (1, 0)}, ValueError, r"whole numbers >= 1, got \(1, 0\)"),
        ({"recall_at": (1.5,)}, ValueError, r"whole numbers >= 1, got \(1.5,\)"),
        ({"map_at": (1000, -1)}, ValueError, r"map_at must hold whole numbers >= 1, got \(1000, -1\)"),
        ({"block_size": -1}, ValueError, "block_size must be >= 1 or None, got -1"),
        ({"query_embeddings": torch.full((3, 3), torch.nan)}, ValueError, "finite: 3 of 3 rows"),
        ({"query_embeddings": 2 * torch.eye(3)}, ValueError, "must be L2-normalised: 3 of 3"),
        ({"query_embeddings": torch.ones(0, 3)}, ValueError, "query_embeddings must have shape"),
    ],
)
def test_retrieval_metrics_refuses(arguments, error, message):
    good = {"query_embeddings": torch.eye(3), "query_labels": torch.tensor([0, 0, 1])}
    retrieval_metrics(**good)
    with pytest.raises(error, match=message):
        retrieval_metrics(**{**good, **arguments})


def test_relevant_items_of_no_query_are_refused():
    with pytest.raises(ValueError, match="query_labels must be a 1-D tensor that is not empty"):
        count_relevant(torch.zeros(0, dtype=torch.long))


def test_counts_of_relevant_items():
    labels = torch.tensor([5, 1, 5, 3, 5], dtype=torch.int16)
    assert count_relevant(labels).tolist() == [2, 0, 2, 0, 2]
    assert count_relevant(labels, torch.tensor([1, 1, 5, 9])).tolist() == [1, 2, 1, 0, 1]
    assert count_relevant(torch.tensor([100]), torch.tensor([1, 2])).tolist() == [0]


@pytest.mark.parametrize(("module", "attempted"), [(metrics, 7), (label_metrics, 9)])
def test_examples_in_the_documentation(module, attempted):
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=attempted)
