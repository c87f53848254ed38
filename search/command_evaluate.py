"""`vptsp evaluate`: scores of a model or of stored embeddings."""

from __future__ import annotations

from pathlib import Path

from ..data_scripts.data_errors import DataError
from ..eval.evaluated_images import draw_before_after
from .backbone_alone import backbone_alone
from .embed import cached_store
from .evaluated_stores import evaluated_stores
from .inputs import choose_sets, is_main_rank, load_embedder, load_sources, model_or_store, store_options, stores_of
from .report import evaluate_stores, write_report


def run(options):
    """Evaluate, write the report and print its table."""
    name = model_or_store(options)
    if options.gallery_store is not None and options.store is None:
        raise DataError("--gallery_store goes with --store; a data set brings its own gallery")
    if options.before_after and options.store is not None:
        raise DataError("--before_after goes with --model: a store doesn't have the backbone that it needs")
    queries, gallery = stores_of(name, options, options.gallery_store)
    frozen = backbone_stores(name, options) if options.before_after else None
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
            progress=True,
        )
        print(write_report(options.output, report), end="")
        if frozen is not None:
            path = Path(options.output) / "before_after.png"
            draw_before_after(path, evaluated_stores(*frozen), evaluated_stores(queries, gallery), seed=options.seed)
            print(f"drawn: {path}")


def backbone_stores(name, options):
    """Embeddings of queries and gallery (or None) by the backbone alone that a retriever was tuned on."""
    embedder = backbone_alone(load_embedder(name, options))
    sets = choose_sets(load_sources(options), options.split)
    cache, how = options.embeddings_cache, store_options(options)
    return [None if source is None else cached_store(embedder, source, cache, **how) for source in sets]
