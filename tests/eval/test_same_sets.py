"""The very same items given as queries and as gallery would all find themselves: refused, however they are given."""

import evaluate
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import vptsp.eval.retrieval_metric.retrieval_metric as metric_module
from vptsp import embedding_metrics, nearest_neighbours, retrieval_metrics, retrieval_scores


EMBEDDINGS = normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), dim=1)
LABELS = torch.arange(12) % 4
MESSAGE = "are the same 12 rows, so that every query would find itself: leave the gallery out"
SAME = {
    "itself": lambda x: x,
    "a view": lambda x: x[:],
    "a copy": lambda x: x.clone(),
    "through numpy": lambda x: torch.from_numpy(x.numpy()),
    "wider": lambda x: x.double(),
}


@pytest.mark.parametrize("again", SAME.values(), ids=SAME)
def test_every_measure_refuses_them(again):
    sets = (EMBEDDINGS, LABELS, again(EMBEDDINGS), LABELS)
    for measure in (retrieval_metrics, retrieval_scores, embedding_metrics):
        with pytest.raises(ValueError, match=MESSAGE):
            measure(*sets)
    assert nearest_neighbours(EMBEDDINGS, 1, again(EMBEDDINGS))[1].flatten().tolist() == list(range(12))  # no score


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: np.asarray(x), lambda x: x.tolist()])
def test_so_does_the_module_for_evaluate(kind):
    metric = metric_module.RetrievalMetric()
    assert isinstance(metric, evaluate.Metric)
    sets = {"embeddings": kind(EMBEDDINGS), "labels": kind(LABELS)}
    gallery = {"gallery_embeddings": sets["embeddings"], "gallery_labels": sets["labels"]}
    with pytest.raises(ValueError, match=MESSAGE):
        metric.compute(**sets, **gallery)


def test_what_is_no_mistake_goes_on():
    alone = retrieval_metrics(EMBEDDINGS, LABELS)
    own = torch.arange(12)[:, None].expand(-1, 2)
    said = retrieval_metrics(EMBEDDINGS, LABELS, EMBEDDINGS, LABELS, excluded=own)
    assert said["recall_at_1"] == alone["recall_at_1"] and said["num_in_gallery"] == 12
    one = EMBEDDINGS[:1].expand(12, -1)  # a model that embeds every image alike is no mistake of the caller's
    assert retrieval_metrics(one, LABELS, one.clone(), LABELS)["recall_at_1"] == pytest.approx(3 / 12)
    other = EMBEDDINGS.flip(0)  # a set in another order may be another set
    assert retrieval_metrics(EMBEDDINGS, LABELS, other, LABELS.flip(0))["recall_at_1"] == 1


@pytest.mark.parametrize("of_queries", [False, True])
@pytest.mark.parametrize("of_gallery", [False, True])
def test_arrays_of_numpy_are_as_good_as_tensors(of_queries, of_gallery):
    queries, gallery = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1) for n in (6, 9))
    labels, others = torch.arange(6) % 3, torch.arange(9) % 3
    expected = retrieval_metrics(queries, labels, gallery, others)
    given = [part.numpy() if of_queries else part for part in (queries, labels)]
    given += [part.numpy() if of_gallery else part for part in (gallery, others)]
    assert retrieval_metrics(*given) == expected
    with pytest.raises(ValueError, match="the same 6 rows"):
        retrieval_metrics(queries.numpy(), labels, queries.numpy() if of_gallery else queries, labels)
