"""`python -m vptsp.eval evaluate`: scores of a model or of stored embeddings."""

from __future__ import annotations

from ..data_scripts.errors import DataError
from .inputs import is_main_rank, stores_of
from .report import evaluate_stores, write_report


def run(options):
    """Evaluate, write the report and print its table."""
    if (options.model is None) == (options.store is None):
        got = "neither" if options.model is None else "both"
        raise DataError(f"give either --model (and images) or --store, got {got}")
    queries, gallery = stores_of(options.model or options.store, options, options.gallery_store)
    if is_main_rank():
        report = evaluate_stores(
            queries,
            gallery,
            recall_at=options.recall_at,
            map_at=options.map_at,
            clustering=not options.no_clustering,
            geometry=not options.no_geometry,
            confidence=options.confidence,
            resample=options.resample,
            seed=options.seed,
        )
        print(write_report(options.output, report), end="")
