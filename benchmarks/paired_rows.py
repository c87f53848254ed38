"""Rows of a comparison on the same queries: intervals of their scores, and of their differences from one row.

Every run's saved retriever embeds the run's own test images, in float32, once: `RUN/embeddings` keeps them. A query's
score is its mean over the row's seeds, and `vptsp.eval.intervals` does the rest.
"""

from dataclasses import asdict

from resumable_runs import EMBEDDINGS

from vptsp.eval.intervals import bootstrap_interval, compare_paired


MEASURES = {"recall_at_1": "R@1", "map_at_r": "MAP@R"}
FROZEN = "frozen backbone"


def embed_run(folder, frozen=None):
    """Keep the embeddings of a run's test images, by its retriever, unless they are there.

    Args:
        folder: Of the run.
        frozen: Folder for those by its backbone alone instead.

    Raises:
        ValueError: the run did not record its test images, or they are not there any more.
    """
    from vptsp.search.backbone_alone import backbone_alone
    from vptsp.search.embed import embed_to_store
    from vptsp.search.embedder import Embedder
    from vptsp.search.inputs import choose_sets
    from vptsp.search.run_splits import recorded_sources

    target = folder / EMBEDDINGS if frozen is None else frozen
    if is_embedded(target):
        return
    sources = recorded_sources(str(folder), {})
    if sources is None:
        raise ValueError(f"{folder} has no splits.json, by which a run says what its test images are")
    embedder = Embedder.from_pretrained(folder)
    if frozen is not None:
        embedder = backbone_alone(embedder)
    target.mkdir(parents=True, exist_ok=True)
    for name, source in zip(("queries", "gallery"), choose_sets(sources), strict=True):
        if source is not None:
            embed_to_store(embedder, source, target / name, num_workers=0, progress=False)
    (target / "done").touch()


def is_embedded(folder):
    """Whether `embed_run` has finished with a folder."""
    return (folder / "done").is_file()


def query_scores(folder):
    """Scores of each query, by kept embeddings.

    Args:
        folder: That `embed_run` has written.

    Returns:
        Dict of `scores` (measure -> `(Q,)`, NaN where a query can't be answered), `labels` `(Q,)`, and `ids` of the
        queries and, where there is one, of the gallery.
    """
    from vptsp.eval.metrics import retrieval_scores
    from vptsp.search.report import labelled_sets
    from vptsp.search.store import EmbeddingStore

    stores = [EmbeddingStore.open(folder / name) for name in ("queries", "gallery") if (folder / name).is_dir()]
    sets = labelled_sets(*stores)
    scores = retrieval_scores(**sets, recall_at=(1,))
    return {
        "scores": {name: scores[name].double() for name in MEASURES},
        "labels": sets["query_labels"],
        "ids": [store.ids for store in stores],
    }


def compare_rows(runs, reference, resample="classes", confidence=0.95):
    """Intervals of every row, and its differences from the reference row on the same queries.

    Args:
        runs: Row name -> {seed: what `query_scores` gave}; the frozen backbone has seed None alone.
        reference: Name of a row.
        resample: What is drawn and whose signs are flipped: `classes` or `queries`.
        confidence: Of the intervals.

    Returns:
        Row name -> {measure: {"interval": fields of `Interval`, "difference": fields of `PairedComparison` (the row
        minus the reference), None for the reference itself and where no seed is common, "seeds": the common ones}}.

    Raises:
        ValueError: two runs have other test images.
    """
    first = next(iter(next(iter(runs.values())).values()))
    for name, seeds in runs.items():
        for seed, found in seeds.items():
            if found["ids"] != first["ids"] or not found["labels"].equal(first["labels"]):
                raise ValueError(f"{name}, seed {seed}, was scored on other images than the runs before it")
    clusters = first["labels"] if resample == "classes" else None
    against = runs.get(reference, {})
    table = {}
    for name, seeds in runs.items():
        common = sorted(seed for seed in seeds if seed in against)
        alone = list(seeds) == [None]  # one model, which stands against every seed of the reference
        pairs = sorted(against) if alone else common
        for measure in MEASURES:
            interval = bootstrap_interval(_mean(seeds, seeds, measure), clusters, confidence)
            difference = None
            if name != reference and pairs:
                own = _mean(seeds, seeds if alone else pairs, measure)
                difference = asdict(compare_paired(own, _mean(against, pairs, measure), clusters, confidence))
            entry = {"interval": asdict(interval), "difference": difference, "seeds": pairs}
            table.setdefault(name, {})[measure] = entry
    return table


def _mean(runs, seeds, measure):
    """Scores of the queries, `(Q,)`, as the mean over seeds."""
    return sum(runs[seed]["scores"][measure] for seed in seeds) / len(seeds)


def markdown(table, reference, resample, confidence=0.95):
    """The table of `compare_rows`, as text."""
    titles = [f"{title}{part}" for title in MEASURES.values() for part in ("", " interval", " difference", " p")]
    lines = [" | ".join(["row", *titles]), " | ".join(["---"] * (1 + len(titles)))]
    for name, measures in table.items():
        cells = [name]
        for entry in measures.values():
            interval, difference = entry["interval"], entry["difference"]
            cells += [f"{100 * interval['mean']:.1f}", _span(interval, ".1f")]
            if difference is None:
                cells += ["", ""]
            else:
                cells.append(f"{100 * difference['difference']:+.1f} ({_span(difference, '+.1f')})")
                cells.append(f"{difference['p_value']:.4f}")
        lines.append(" | ".join(cells))
    text = "".join(f"| {line} |\n" for line in lines)
    if reference not in table:
        return text + f"\nNo differences: the row {reference} has no finished run.\n"
    compared = sum(any(entry["difference"] for entry in measures.values()) for measures in table.values())
    level = (1 - confidence) / max(1, compared)
    return text + (
        f"\nOf the saved retrievers in float32, in percent; {confidence:.0%} intervals by bootstrap over {resample}. "
        f"Differences are the row minus `{reference}`, on the same queries and seeds, with the sign-flip test's p: of "
        f"{compared} comparisons, one below {level:.4f} counts (Bonferroni). A query's score is its mean over seeds; "
        "how much another seed changes is in the table above.\n"
    )


def _span(values, digits):
    return f"{100 * values['low']:{digits}} to {100 * values['high']:{digits}}"
