"""The one table of what metrics are: complete, and what reports and pages show."""

import doctest
import re
from pathlib import Path

import pytest
import torch

from vptsp.eval import metric_definitions, summary
from vptsp.eval.metric_definitions import DEFINITIONS, definition_of
from vptsp.search import report


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def metrics():
    embeddings = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(3).repeat_interleave(4)
    pairs = torch.arange(12)[:, None].expand(12, 2)
    alone = summary.embedding_metrics(embeddings, labels, recall_at=(1, 10), map_at=(5,), confidence=0.9)
    return alone | summary.embedding_metrics(embeddings, labels, embeddings, labels, excluded=pairs, map_at=())


def test_examples():
    assert doctest.testmod(metric_definitions).failed == 0


def test_every_metric_has_a_definition_and_none_is_left_over(metrics):
    names = [name for name in metrics if not name.endswith(("_low", "_high"))]
    assert {re.sub(r"_\d+$", "_K", name) for name in names} == set(DEFINITIONS)
    assert all(definition_of(name) is not None for name in names)


def test_k_is_filled_in_where_there_is_one():
    assert definition_of("map_at_1000").title == "mAP@1000"
    assert definition_of("map_at_1000").meaning.endswith(
        "the first 1000, summed and divided by R or, if that is less, by 1000"
    )
    assert definition_of("spectral_decay").meaning.startswith("KL divergence")
    assert definition_of("pairwise_f1").in_percent and not definition_of("num_queries").in_percent
    for name in ("worst_class_recall", "map_at_K_3", "recall_at_", "nmi_3", ""):
        assert definition_of(name) is None


def test_reports_show_the_table(metrics):
    data = {"queries": {"description": "d", "images": 12, "skipped": 0}}
    text = report.metrics_table(
        {"model": {"name": "m", "kind": "k", "fingerprint": "f"}, "data": data, "metrics": metrics}
    )
    for name in metrics:
        if not name.endswith(("_low", "_high")):
            assert f"| {definition_of(name).meaning} |" in text, name


@pytest.mark.parametrize("page", ["docs/evaluation.md", "eval/retrieval_metric/README.md"])
def test_pages_have_the_table(page):
    rows = [f"| `{name}` | {definition.meaning} |" for name, definition in DEFINITIONS.items()]
    table = "\n".join(["| name | what it is |", "|---|---|", *rows])
    assert table in (ROOT / page).read_text(encoding="utf-8")
