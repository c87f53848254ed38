"""`vptsp evaluate`: scores of a model or of stored embeddings."""

from __future__ import annotations

from ..data_scripts.data_errors import DataError
from .inputs import is_main_rank, model_or_store, stores_of
from .report import evaluate_stores, write_report


def run(options):
    """Evaluate, write the report and print its table."""
    name = model_or_store(options)
    if options.gallery_store is not None and options.store is None:
        raise DataError("--gallery_store goes with --store; a data set brings its own gallery")
    queries, gallery = stores_of(name, options, options.gallery_store)
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
