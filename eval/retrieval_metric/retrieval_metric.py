"""The measures of `vptsp.eval` as a module of the library `evaluate`.

That library copies this file elsewhere before it imports it, and looks for what it imports line by line: so imports
are absolute, one a line. Everything else is in [`vptsp.embedding_metrics`].
"""

import datasets
import evaluate
import torch

from vptsp import embedding_metrics


_DESCRIPTION = """\
Image retrieval and metric learning from embeddings and labels: Recall@K, MAP@R (two definitions), R-precision, mAP@K;
on demand NMI and pairwise F1 of k-means, distances within and between classes, spectral decay, confidence intervals.
Exact, by cosine similarity; a query never retrieves itself; ties by expectation.
"""

_CITATION = """\
@inproceedings{musgrave2020metric,
  title = {A Metric Learning Reality Check},
  author = {Musgrave, Kevin and Belongie, Serge and Lim, Ser-Nam},
  booktitle = {European Conference on Computer Vision},
  year = {2020}
}
"""

_INPUTS = """\
Args:
    embeddings: N vectors of norm 1: the queries, each of which searches the others.
    labels: N integers, their classes.
    gallery_embeddings: G vectors of norm 1: the queries search these instead; None: there is no other set.
    gallery_labels: G integers.
    excluded: Pairs of a query and a gallery item that it may not find, since it is that item (`same_items`); None: the
        gallery holds none of the queries.
    recall_at: The K of Recall@K.
    map_at: The K of mAP@K.
    clustering: Whether to compute NMI and pairwise F1 of k-means.
    geometry: Whether to compute distances of classes and spectral decay.
    confidence: Such as 0.95, for bootstrap intervals of the retrieval metrics; None: none.
    resample: What the bootstrap draws, "classes" or "queries".
    seed: Of k-means and of the bootstrap.

Returns:
    Dict of floats, `recall_at_1`, `map_at_r`, ..., and the counts `num_queries` and `num_unanswerable`.
"""


class RetrievalMetric(evaluate.Metric):
    """Embeddings and labels in, retrieval metrics out."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"embeddings": datasets.Sequence(datasets.Value("float32")), "labels": datasets.Value("int64")}
            ),
        )

    def compute(self, *, embeddings=None, labels=None, **options):
        """The metrics of what is given here, or else of what `add` and `add_batch` were given before.

        The library writes all inputs to an Arrow file and reads them back as lists, which takes longer than the
        metrics. What comes in one piece goes straight to them instead, in the precision it has.

        Raises:
            TypeError, ValueError: as for `embedding_metrics`, or only one of embeddings and labels is given, or
                neither is and none were added.
        """
        if (embeddings is None) != (labels is None):
            missing = "embeddings" if embeddings is None else "labels"
            raise ValueError(f"embeddings and labels must be given together, got no {missing}")
        if embeddings is not None and self.writer is None and self.num_process == 1:
            return self._compute(embeddings, labels, **options)
        if embeddings is None:
            if self.writer is None:
                raise ValueError("nothing to compute from: no embeddings were given or added")
            return super().compute(**options)
        return super().compute(embeddings=embeddings, labels=labels, **options)

    def _compute(
        self,
        embeddings,
        labels,
        gallery_embeddings=None,
        gallery_labels=None,
        excluded=None,
        **options,
    ):
        sets = (_to_tensor(values) for values in (embeddings, labels, gallery_embeddings, gallery_labels))
        options = {"map_at": (), "clustering": False, "geometry": False, **options}
        return embedding_metrics(*sets, excluded=_to_tensor(excluded), **options)


def _to_tensor(values):
    if values is None:
        return None
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], torch.Tensor):
        return torch.stack(tuple(values))
    return torch.as_tensor(values)
