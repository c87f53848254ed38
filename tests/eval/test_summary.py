"""All measures in one call, and the same through the library `evaluate`, offline."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from vptsp import (
    bootstrap_interval,
    clustering_metrics,
    embedding_metrics,
    geometry_metrics,
    metric_folder,
    retrieval_metrics,
    retrieval_scores,
)
from vptsp.eval import summary
from vptsp.eval.neighbours import BlockedSimilarity


def labelled(count=40, num_classes=6):
    labels = torch.arange(count) % num_classes
    labels[0] = 77
    return normalize(torch.randn(num_classes + 80, 8)[labels] + torch.randn(count, 8), dim=1), labels


@pytest.mark.parametrize("own_gallery", [False, True])
@pytest.mark.parametrize("resample", ["classes", "queries"])
def test_is_what_its_parts_are(own_gallery, resample):
    embeddings, labels = labelled()
    sets = [embeddings[:15], labels[:15], embeddings[15:], labels[15:]] if own_gallery else [embeddings, labels]
    got = embedding_metrics(*sets, recall_at=(1, 5), map_at=(3,), confidence=0.9, resample=resample, seed=2)
    expected = retrieval_metrics(*sets, recall_at=(1, 5), map_at=(3,))
    for name, values in retrieval_scores(*sets, recall_at=(1, 5), map_at=(3,)).items():
        clusters = sets[1] if resample == "classes" else None
        interval = bootstrap_interval(values, clusters, confidence=0.9, seed=2)
        expected[f"{name}_low"], expected[f"{name}_high"] = interval.low, interval.high
        assert interval.low <= expected[name] <= interval.high
    # a gallery's items are clustered along
    expected |= {**clustering_metrics(embeddings, labels, seed=2), **geometry_metrics(embeddings, labels)}
    assert got == expected
    assert embedding_metrics(*sets, map_at=(), clustering=False, geometry=False) == retrieval_metrics(*sets)


def test_computes_similarities_once(monkeypatch):
    rows, computed = BlockedSimilarity.rows, []
    monkeypatch.setattr(
        BlockedSimilarity, "rows", lambda self, indices: computed.append(indices) or rows(self, indices)
    )
    embedding_metrics(*labelled(), confidence=0.9, map_at=(5, 1000))
    assert sorted(torch.cat(computed).tolist()) == list(range(1, 40))  # item 0 is alone in its class


def test_refuses():
    with pytest.raises(ValueError, match="resample must be 'classes' or 'queries', got 'items'"):
        embedding_metrics(*labelled(), resample="items")
    with pytest.raises(ValueError, match="inter-class distance needs two classes"):
        embedding_metrics(torch.eye(3), torch.zeros(3).long())


def test_examples_in_the_documentation():
    results = doctest.testmod(summary)
    assert results.attempted > 3
    assert results.failed == 0


SCRIPT = """
import sys

import evaluate
import torch

from vptsp import embedding_metrics, metric_folder

torch.set_num_threads(1)
metric = evaluate.load(metric_folder())
assert "Recall@K" in metric.description and "gallery_embeddings" in metric.inputs_description
generator = torch.Generator().manual_seed(0)
embeddings = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
labels = torch.arange(60) % 7
plain = dict(map_at=(), clustering=False, geometry=False)
expected = embedding_metrics(embeddings, labels, **plain)

assert metric.compute(embeddings=embeddings, labels=labels) == expected
assert metric.compute(embeddings=embeddings.numpy(), labels=labels.numpy()) == expected
assert metric.compute(embeddings=embeddings.tolist(), labels=labels.tolist()) == expected
assert metric.compute(embeddings=list(embeddings), labels=list(labels)) == expected

options = dict(recall_at=(1, 3), map_at=(10,), clustering=True, geometry=True, confidence=0.9, seed=4)
assert metric.compute(embeddings=embeddings, labels=labels, **options) == embedding_metrics(
    embeddings, labels, **options
)
gallery = dict(gallery_embeddings=embeddings[20:], gallery_labels=labels[20:])
assert metric.compute(embeddings=embeddings[:20], labels=labels[:20], **gallery) == embedding_metrics(
    embeddings[:20], labels[:20], **gallery, **plain
)

for start in range(0, 60, 25):  # through Arrow
    metric.add_batch(embeddings=embeddings[start : start + 25], labels=labels[start : start + 25])
assert metric.compute() == expected
for row, label in zip(embeddings, labels):
    metric.add(embeddings=row, labels=label)
assert metric.compute(recall_at=(3,)) == embedding_metrics(embeddings, labels, recall_at=(3,), **plain)
metric.add_batch(embeddings=embeddings[:40], labels=labels[:40])
assert metric.compute(embeddings=embeddings[40:], labels=labels[40:]) == expected  # the rest joins what was added
assert metric.compute(embeddings=embeddings, labels=labels) == expected  # and nothing is left over

for inputs, message in (
    (dict(embeddings=2 * embeddings, labels=labels), "must be L2-normalised"),
    (dict(embeddings=embeddings, labels=labels[:3]), "one label per embedding"),
    (dict(embeddings=embeddings), "given together, got no labels"),
    (dict(labels=labels), "given together, got no embeddings"),
    ({}, "no embeddings were given or added"),
):
    try:
        metric.compute(**inputs)
    except (TypeError, ValueError) as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("as expected")
"""


def test_as_a_module_of_evaluate_offline(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    # an address that nothing answers: whatever goes out fails
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip().endswith("as expected")


def test_the_module_s_card_names_every_option():
    card = (Path(metric_folder()) / "README.md").read_text(encoding="utf-8")
    source = (Path(metric_folder()) / "retrieval_metric.py").read_text(encoding="utf-8")
    for option in ("gallery_embeddings", "recall_at", "map_at", "clustering", "geometry", "confidence", "resample"):
        assert f"`{option}`" in card
        assert f"    {option}: " in source
