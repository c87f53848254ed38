"""The worst failures and confused classes against counting in plain Python."""

import doctest
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from vptsp.eval import confusion, failures
from vptsp.eval.confusion import confused_pairs, confusion_shares, save_confusion
from vptsp.eval.failures import choose_failures, find_failures, save_failure_grid
from vptsp.eval.metrics import count_relevant
from vptsp.eval.neighbours import BlockedSimilarity, nearest_neighbours
from vptsp.eval.pictures import CORRECT_SIGN, WRONG_SIGN


def flat(colour=(20, 40, 200)):
    return Image.new("RGB", (8, 8), colour)


def slow_failures(queries, labels, gallery=None, gallery_labels=None):
    """(rank, wrong similarity, query, right item, its similarity) by sorting each query's items."""
    items = queries if gallery is None else gallery
    item_labels = labels if gallery is None else gallery_labels
    found = []
    for query in range(len(queries)):
        others = [i for i in range(len(items)) if gallery is not None or i != query]
        similarity = {i: float(queries[query].double() @ items[i].double()) for i in others}
        right = [i for i in others if item_labels[i] == labels[query]]
        wrong = [i for i in others if item_labels[i] != labels[query]]
        if not right or not wrong:
            continue
        best = max(right, key=lambda i: (similarity[i], -i))
        rank = 1 + sum(similarity[i] > similarity[best] for i in wrong)
        if rank > 1:
            found.append((rank, max(similarity[i] for i in wrong), query, best, similarity[best]))
    return sorted(found, key=lambda row: (-row[0], -row[1]))


@pytest.mark.parametrize("own_gallery", [False, True])
def test_failures_equal_a_plain_search(own_gallery):
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        embeddings = normalize(torch.randn(40, 5, generator=generator, dtype=torch.float64), dim=1)
        labels = torch.randint(0, 9, (40,), generator=generator)
        sets = [embeddings[:15], labels[:15], embeddings[15:], labels[15:]] if own_gallery else [embeddings, labels]
        expected = slow_failures(*sets)
        got = find_failures(*sets)
        assert got.rank.tolist() == [row[0] for row in expected]
        # two queries may be each other's wrong neighbour, equally near but for rounding
        by_query = {row[2]: row for row in expected}
        assert got.correct.tolist() == [by_query[query][3] for query in got.query.tolist()]
        assert got.rank.tolist() == [by_query[query][0] for query in got.query.tolist()]
        assert got.wrong_similarity.tolist() == pytest.approx([row[1] for row in expected], abs=1e-12)
        similarity = [by_query[query][4] for query in got.query.tolist()]
        assert got.correct_similarity.tolist() == pytest.approx(similarity, abs=1e-12)
    assert max(got.rank) > 5


def test_a_tie_with_a_correct_item_is_no_failure():
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    got = find_failures(embeddings, torch.tensor([0, 1, 1, 0]))
    # 0 and 3 find each other as near as 2; 1 finds all equally near; 2 finds two wrong ones before 1
    assert (got.query.tolist(), got.rank.tolist(), got.correct.tolist()) == ([2], [3], [1])
    assert len(find_failures(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1])).query) == 0
    assert len(find_failures(torch.eye(3), torch.arange(3)).query) == 0  # nothing can be answered


def test_blocks_don_t_change_the_failures(monkeypatch):
    embeddings, labels = normalize(torch.randn(30, 4), dim=1), torch.arange(30) % 6
    whole = find_failures(embeddings, labels)
    monkeypatch.setattr(BlockedSimilarity, "block_size", lambda self, k: 7)
    assert find_failures(embeddings, labels).query.equal(whole.query)


def test_chosen_failures_are_spread_over_classes():
    labels = torch.tensor([0, 0, 0, 1, 2])
    rows = torch.tensor([1, 0, 2, 4, 3])  # the worst first
    worst = failures.Failures(rows, *[torch.zeros(5)] * 4)
    assert choose_failures(worst, labels, 3) == [0, 3, 4]
    assert choose_failures(worst, labels, 9) == [0, 3, 4, 1, 2]


def test_failure_grid_names_ranks(tmp_path):
    arguments = {
        "query": [(flat(), "Лён"), (flat(), "Leek")],
        "wrong": [[(flat(), "Ωmega", 0.9), (flat(), "Plum", 0.8)], [(flat(), "Pear", 0.7)]],
        "correct": [(flat(), "Лён", 0.25), (flat(), "Leek", 0.125)],
        "ranks": [1234, 2],
    }
    svg = save_failure_grid(tmp_path / "failures.svg", **arguments, title="Worst").read_text("utf-8")
    for text in ("Лён", "Ωmega", "first correct", f"{CORRECT_SIGN} 0.250, rank 1,234", "rank 2", "Worst"):
        assert text in svg
    assert svg.count(f"{WRONG_SIGN} ") == 3
    with pytest.raises(ValueError, match=r"one entry per failure, at least one, got .*'ranks': 1"):
        save_failure_grid(tmp_path / "no.png", **{**arguments, "ranks": [2]})
    with pytest.raises(ValueError, match="at least one"):
        save_failure_grid(tmp_path / "no.png", [], [], [], [])
    assert not (tmp_path / "no.png").exists()


def test_confused_pairs_equal_counting():
    embeddings, labels = normalize(torch.randn(120, 3), dim=1), torch.arange(120) % 7
    labels[0] = 50
    similarity, index = nearest_neighbours(embeddings, 1)
    found = labels[index[:, 0]]
    pairs = confused_pairs(labels, found, count_relevant(labels), similarity[:, 0])
    totals = Counter(label for label in labels.tolist() if label != 50)
    expected = Counter((a, b) for a, b in zip(labels.tolist(), found.tolist(), strict=True) if a not in (b, 50))
    assert {(pair.label, pair.found): pair.count for pair in pairs} == expected
    assert all(pair.total == totals[pair.label] for pair in pairs)
    shares = [pair.count / pair.total for pair in pairs]
    assert shares == sorted(shares, reverse=True)
    for pair in pairs:
        same = [q for q in range(120) if (labels[q], found[q]) == (pair.label, pair.found)]
        assert similarity[pair.example, 0] == max(similarity[same, 0])
        assert pair.example in same

    classes, table = confusion_shares(pairs, labels, found, num_classes=4)
    assert classes[:2] == [pairs[0].label, pairs[0].found] and len(classes) == 4
    for row, label in enumerate(classes):
        of_label = [other for own, other in zip(labels.tolist(), found.tolist(), strict=True) if own == label]
        for column, other in enumerate(classes):
            assert table[row, column] == pytest.approx(of_label.count(other) / len(of_label))
    assert table.sum(1) == pytest.approx(1)


def test_confusion_refuses_and_may_find_nothing(tmp_path):
    labels = torch.tensor([0, 0, 1])
    assert confused_pairs(labels, labels) == []
    with pytest.raises(ValueError, match=r"found_labels must have one entry per query, 3, got shape \(2,\)"):
        confused_pairs(labels, labels[:2])
    with pytest.raises(ValueError, match="similarity must have one entry per query"):
        confused_pairs(labels, labels, similarity=[0.5])
    with pytest.raises(ValueError, match="at least one, got 0 pairs"):
        save_confusion(tmp_path / "no.png", [], [], [], [], [], np.zeros((0, 1)))
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("num_pairs", [1, 3, 6])
def test_confusion_picture_names_classes_and_shares(tmp_path, num_pairs):
    names = {
        0: "Granny $mith",
        1: "an apple with a name that is far too long for its place",
        **dict.fromkeys(range(2, 9), "x"),
    }
    found = torch.tensor([1, 1, 0, 1] + list(range(2, 9)) * 2)
    labels = torch.tensor([0, 0, 0, 1] + [0] * 7 + [1] * 7)
    pairs = confused_pairs(labels, found)[:num_pairs]
    images = [flat()] * num_pairs
    classes, shares = confusion_shares(pairs, labels, found)
    path = save_confusion(tmp_path / "confusion.svg", pairs, images, images, names, classes, shares, title="Confused")
    svg = path.read_text("utf-8")
    assert f"{WRONG_SIGN} {pairs[0].count} of {pairs[0].total} ({pairs[0].count / pairs[0].total:.0%})" in svg
    for text in ("Granny $mith", "taken for", "any other", "Confused"):
        assert text in svg
    assert names[1] in " ".join(re.findall("<!-- (.*?) -->", svg)) and "…" not in svg
    width, height = Image.open(save_confusion(tmp_path / "c.png", pairs, images, images, names, classes, shares)).size
    assert 1300 < width < 2000 and 450 < height < 1200


@pytest.mark.parametrize("module", [failures, confusion])
def test_examples_in_the_documentation(module):
    results = doctest.testmod(module)
    assert results.attempted > 1
    assert results.failed == 0
