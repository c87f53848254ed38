"""`vptsp embed`: images to a store of embeddings."""

from __future__ import annotations

from .embed import embed_to_store
from .inputs import choose_sets, engine_of, is_main_rank, load_embedder, load_sources, store_options


def run(options):
    """Embed, and print what is in the store."""
    engine = engine_of(options.model, options)
    source, _ = choose_sets(load_sources(options), options.split, whole=True)
    embedder = load_embedder(options.model, options)
    store = embed_to_store(embedder, source, options.output, engine=engine, **store_options(options))
    if is_main_rank():
        print(
            f"{options.output}: {len(store):,} embeddings of width {store.info.embedding_dim} in "
            f"{store.info.num_shards} files, {store.info.data['description']}"
        )
        for name in store.info.skipped:
            print(f"skipped, can't be read: {name}")
