"""`vptsp evaluate`: scores of a model or of stored embeddings."""

from __future__ import annotations

from pathlib import Path

from ..data_scripts.data_errors import DataError
from ..eval.evaluated_images import draw_before_after
from .backbone_alone import backbone_alone
from .evaluated_stores import evaluated_stores
from .inputs import (
    embedded,
    is_main_rank,
    load_embedder,
    model_or_store,
    no_progress_bars,
    orders_of,
    sets_of,
    stores_of,
)
from .report import evaluate_stores, write_report


def run(options):
    """Evaluate, write the report and print its table."""
    name = model_or_store(options)
    if options.gallery_store is not None and options.store is None:
        raise DataError("--gallery_store goes with --store; a data set brings its own gallery")
    if options.before_after and options.store is not None:
        raise DataError("--before_after goes with --model: a store doesn't have the backbone that it needs")
    orders = orders_of(options)
    changed = [name for name in ("rerank", "expand", "projection") if getattr(options, name) is not None]
    if options.before_after and changed:
        raise DataError(f"--before_after is drawn of embeddings as they are: give it without --{changed[0]}")
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
            projection=options.projection,
            dim=options.dim,
            progress=True,
            **orders,
        )
        print(write_report(options.output, report), end="")
        if frozen is not None:
            path = Path(options.output) / "before_after.png"
            draw_before_after(path, evaluated_stores(*frozen), evaluated_stores(queries, gallery), seed=options.seed)
            print(f"drawn: {path}")


def backbone_stores(name, options):
    """Embeddings of queries and gallery (or None) by the backbone alone that a retriever was tuned on."""
    with no_progress_bars():
        embedder = backbone_alone(load_embedder(name, options))
    return embedded(embedder, sets_of(options), options)
