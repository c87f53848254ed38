"""Scores of stored embeddings, and of two models on the same images, as JSON and as Markdown.

report = evaluate_stores(EmbeddingStore.open("runs/photos/embeddings"), confidence=0.95)
write_report("runs/photos/evaluation", report)
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..data_scripts.data_errors import DataError, some
from ..data_scripts.overlap import same_stored_images
from ..eval.intervals import compare_paired
from ..eval.markdown import code_span
from ..eval.metric_definitions import definition_of
from ..eval.metrics import count_in_gallery, retrieval_scores
from ..eval.summary import embedding_metrics
from ..files.atomic import write_json, write_text
from .projection import learn_projection, projection_text
from .views import views_of


def labelled_sets(queries, gallery=None):
    """Embeddings and labels of stores, and what may not be found, as [`retrieval_scores`] takes them.

    Args:
        queries: [`EmbeddingStore`], all of its items with a class.
        gallery: Another of the same model, or None. Classes of the same name are the same class, and queries that are
            in it too, by id or content, are excluded there.

    Returns:
        Dict of `query_embeddings` `(Q, E)`, `query_labels` `(Q,)`, and with a gallery `gallery_embeddings`,
        `gallery_labels` and `excluded`.

    Raises:
        DataError: an item has no class, or the stores are of two models.
    """
    for store in (queries, gallery):
        unlabelled = [] if store is None else (~store.labelled).nonzero().flatten().tolist()
        if unlabelled:
            raise DataError(
                f"{store.folder}: scores need the class of every image, {len(unlabelled)} of {len(store)} have none "
                f"(images that lie in no class folder): {some([store.ids[row] for row in unlabelled])}"
            )
    if gallery is None:
        return {"query_embeddings": queries.embeddings, "query_labels": queries.labels}
    if queries.info.model["fingerprint"] != gallery.info.model["fingerprint"]:
        raise DataError(
            f"queries and gallery must be embeddings of one model, got {queries.info.model['name']} in "
            f"{queries.folder} and {gallery.info.model['name']} in {gallery.folder}"
        )
    numbers = {name: i for i, name in enumerate(sorted({*queries.class_names, *gallery.class_names}))}
    labels = [torch.tensor([numbers[name] for name in store.class_names]) for store in (queries, gallery)]
    return {
        "query_embeddings": queries.embeddings,
        "query_labels": labels[0],
        "gallery_embeddings": gallery.embeddings,
        "gallery_labels": labels[1],
        "excluded": same_stored_images(queries, gallery),
    }


def evaluate_stores(queries, gallery=None, *, projection=None, dim=None, rerank=None, expand=None, **options):
    """All measures of a store of embeddings, or of queries against a gallery.

    Args:
        queries, gallery: As for [`labelled_sets`]. Without a gallery each query's own row is excluded.
        projection, dim: As of [`RetrievalIndex.build`], learned from the gallery (or from the queries, where those are
            the gallery); all measures are then of what comes out.
        rerank, expand: As of [`VectorIndex.search`]; of the measures of retrieval.
        **options: As for [`embedding_metrics`].

    Returns:
        Dict of `model`, `data` (what was embedded, and how many images), `metrics`, and `search`: those of the four
        options above that were given.

    Raises:
        DataError: an item has no class, or the stores don't fit together.
    """
    sets = labelled_sets(queries, gallery)
    base = "query_embeddings" if gallery is None else "gallery_embeddings"
    learned, record = learn_projection(projection, dim, sets[base])
    for name in [name for name in sets if learned is not None and name.endswith("_embeddings")]:
        sets[name] = learned(sets[name].float())
    metrics = embedding_metrics(**sets, rerank=rerank, expand=expand, **options)
    described = {"model": queries.info.model, "data": _described(queries, gallery, sets), "metrics": metrics}
    return described | _searched({"projection": record, "rerank": rerank, "expand": expand})


def compare_stores(
    first,
    second,
    first_gallery=None,
    second_gallery=None,
    recall_at=(1,),
    resample="classes",
    confidence=0.95,
    seed=0,
    progress=False,
    rerank=None,
    expand=None,
):
    """Whether the first of two models retrieves better, on the same images; see [`compare_paired`].

    Args:
        first, second: [`EmbeddingStore`] of the same images with the same classes.
        first_gallery, second_gallery: The galleries that belong to them, or None twice.
        recall_at: The K of Recall@K.
        resample: What is drawn and whose signs are flipped: `classes` or single `queries`.
        confidence: Of the intervals.
        seed: Of the draws.
        progress: Show progress bars where it takes more than some seconds.
        rerank, expand: As of [`VectorIndex.search`], for both.

    Returns:
        Dict of `first` and `second` (models), `data`, `resample`, and `comparison`: measure -> fields of
        `PairedComparison`; and `search`: the last two options, where they were given.

    Raises:
        DataError: the stores are of different images, or an item has no class.
        ValueError: an option is none of the above.
    """
    if resample not in ("classes", "queries"):
        raise ValueError(f"resample must be 'classes' or 'queries', got {resample!r}")
    for one, other in ((first, second), (first_gallery, second_gallery)):
        if (one is None) != (other is None):
            raise DataError("a comparison needs the galleries of both models or of none, got one")
        if one is not None and (one.ids != other.ids or one.class_names != other.class_names):
            raise DataError(
                f"a comparison needs the same images with the same classes in the same order, got others in "
                f"{one.folder} and {other.folder}"
            )
    sets = [labelled_sets(first, first_gallery), labelled_sets(second, second_gallery)]
    if first_gallery is not None:  # one of the stores may know more about the same images than the other
        excluded = torch.cat([part["excluded"] for part in sets]).unique(dim=0)
        sets = [{**part, "excluded": excluded} for part in sets]
    order = {"rerank": rerank, "expand": expand}
    scores = [retrieval_scores(**arguments, **order, recall_at=recall_at, progress=progress) for arguments in sets]
    clusters = sets[0]["query_labels"] if resample == "classes" else None
    comparison = {
        name: asdict(compare_paired(values, scores[1][name], clusters, confidence, seed=seed))
        for name, values in scores[0].items()
    }
    return {
        "first": first.info.model,
        "second": second.info.model,
        "data": _described(first, first_gallery, sets[0]),
        "resample": resample,
        "comparison": comparison,
        **_searched(order),
    }


def _searched(options):
    """What a report says of the options that change the order of what is found, or the embeddings."""
    given = {name: value if isinstance(value, dict) else asdict(value) for name, value in options.items() if value}
    return {"search": given} if given else {}


def _described(queries, gallery, sets):
    stores = {"queries": queries} if gallery is None else {"queries": queries, "gallery": gallery}
    described = {
        name: {**store.info.data, "images": len(store), "skipped": len(store.info.skipped)}
        for name, store in stores.items()
    }
    described["queries"] |= count_in_gallery(sets.get("excluded"))
    return described


def write_report(folder, report):
    """Write `metrics.json` and `metrics.md` (or `comparison.json` and `.md`) into a folder; returns the Markdown."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name, text = (
        ("metrics", metrics_table(report)) if "metrics" in report else ("comparison", comparison_table(report))
    )
    write_json(folder / f"{name}.json", report)
    write_text(folder / f"{name}.md", text)
    return text


def metrics_table(report):
    """Markdown of what [`evaluate_stores`] returned; shares in percent."""
    model, metrics = report["model"], report["metrics"]
    lines = [f"# {code_span(model['name'])}", "", f"{model['kind']}, fingerprint {model['fingerprint'][:12]}", ""]
    lines += _data_lines(report) + _search_lines(report)
    with_intervals = any(name.endswith("_low") for name in metrics)
    columns = ["measure", "value", *(["interval"] if with_intervals else []), "what it is"]
    lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        cells = [name, _shown(name, value)]
        if with_intervals:
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            cells.append("" if low is None else f"{_shown(name, low)} to {_shown(name, high)}")
        definition = definition_of(name)
        lines.append(f"| {' | '.join([*cells, definition.meaning if definition else ''])} |")
    return "\n".join(lines) + "\n"


def comparison_table(report):
    """Markdown of what [`compare_stores`] returned; shares in percent."""
    lines = [
        f"# {code_span(report['first']['name'])} against {code_span(report['second']['name'])}",
        "",
        *_data_lines(report),
        "",
        f"Paired bootstrap and sign-flip test over {report['resample']}.",
        "",
        "| measure | first | second | difference | interval | p |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in report["comparison"].items():
        first, second = _shown(name, values["first_mean"]), _shown(name, values["second_mean"])
        difference, low, high = (f"{100 * values[key]:+.2f}" for key in ("difference", "low", "high"))
        lines.append(f"| {name} | {first} | {second} | {difference} | {low} to {high} | {values['p_value']:.4f} |")
    return "\n".join(lines) + "\n"


def _data_lines(report):
    return [
        f"- {name}: {code_span(data['description'])}, {data['images']:,} images"
        + (f", {data['skipped']:,} skipped" if data["skipped"] else "")
        + (f", {data['num_in_gallery']:,} of them in the gallery too: excluded" if "num_in_gallery" in data else "")
        for name, data in report["data"].items()
    ]


def _search_lines(report):
    """What of a search is not as usual."""
    lines = [] if views_of(report["model"]) == "one" else [f"- views averaged: {views_of(report['model'])}"]
    for name, values in report.get("search", {}).items():
        text = ", ".join(f"{key}={value}" for key, value in values.items())
        lines.append(f"- {projection_text(values) if name == 'projection' else f'{name}: {text}'}")
    return lines


def _shown(name, value):
    definition = definition_of(name)
    if definition is not None and definition.in_percent:
        return f"{100 * value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


__all__ = ["compare_stores", "comparison_table", "evaluate_stores", "labelled_sets", "metrics_table", "write_report"]
