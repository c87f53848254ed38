"""What re-ranking, query expansion, views, projections and quantised indexes bring, and what they cost.

    python benchmarks/search_quality.py --model runs/shop
    python benchmarks/search_quality.py --model runs/shop --frozen --views one flip --output quality.json

The photos are those that a run kept apart (of classes that training has not seen), or with `--images` others. Each is
asked as a query among the others, through an index as `vptsp index` builds it. R@1 and MAP@R are in percent; a query's
time is the processor's, the median over `--queries` of them asked one by one in one thread; bytes are what a photo
more adds to the index's file of vectors. Embeddings are made once and kept in the cache; `embed_milliseconds` is what
one photo takes, once decoded.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import faiss
import torch

from vptsp import Embedder, QueryExpansion, Reranking, RetrievalIndex, cached_store, folder_source
from vptsp.files.atomic import write_json
from vptsp.search.backbone_alone import backbone_alone
from vptsp.search.run_splits import recorded_sources


ORDERS = {
    "--rerank": {"rerank": Reranking()},
    "--rerank depth=200": {"rerank": Reranking(depth=200)},
    "--rerank depth=200 k1=10 k2=3": {"rerank": Reranking(depth=200, k1=10, k2=3)},
    "--expand": {"expand": QueryExpansion()},
    "--expand neighbours=3": {"expand": QueryExpansion(neighbours=3)},
    "--expand --rerank": {"expand": QueryExpansion(), "rerank": Reranking()},
}
BUILDS = {
    **{f"--projection pca --dim {dim}": {"projection": "pca", "dim": dim} for dim in (32, 64, 128)},
    **{f"--projection whiten --dim {dim}": {"projection": "whiten", "dim": dim} for dim in (32, 64, 128)},
    **{f"--projection truncate --dim {dim}": {"projection": "truncate", "dim": dim} for dim in (32, 64, 128)},
    "--quantise int8": {"quantise": "int8"},
    "--quantise binary": {"quantise": "binary"},
    "--projection pca --dim 128 --quantise int8": {"projection": "pca", "dim": 128, "quantise": "int8"},
}


def scores(results, class_names):
    """Recall@1 and MAP@R of results in their order, of queries with at least one other item of their class."""
    counts = {name: class_names.count(name) - 1 for name in set(class_names)}
    recall, precision = [], []
    for hits, name in zip(results, class_names, strict=True):
        relevant = counts[name]
        if not relevant:
            continue
        right = [hit.metadata["class_name"] == name for hit in hits[:relevant]]
        found = [sum(right[: place + 1]) / (place + 1) for place, value in enumerate(right) if value]
        recall.append(right[0])
        precision.append(sum(found) / relevant)
    return 100 * statistics.mean(recall), 100 * statistics.mean(precision)


def milliseconds(index, ids, order):
    times = []
    for name in ids:
        begin = time.process_time()
        index.search_ids([name], 10, **order)
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def measured(store, build, order, num_queries):
    """A row of the table: one way to build the index, one way to search it."""
    class_names = store.class_names
    index = RetrievalIndex.build(store.ids, store.embeddings, {"class_name": class_names}, **build)
    deepest = max(class_names.count(name) for name in set(class_names))
    results = []
    for start in range(0, len(store), 64):
        results += index.search_ids(store.ids[start : start + 64], deepest, **order)
    recall, precision = scores(results, class_names)
    asked = store.ids[:: max(1, len(store) // num_queries)]
    row = {"recall_at_1": recall, "map_at_r": precision, "milliseconds": milliseconds(index, asked, order)}
    sizes, half = [], store.ids[::2]
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            index.save(folder)
            sizes.append((Path(folder) / index.info.index_name).stat().st_size)
        if len(sizes) == 1:
            index.remove(half)
    return row | {"bytes": (sizes[0] - sizes[1]) / len(half), "effort": index.info.effort}


def embedding_milliseconds(embedder):
    """Of one image, with all its views."""
    crops = () if embedder.preprocess.num_crops == 1 else (embedder.preprocess.num_crops,)
    size = embedder.preprocess.image_size
    pixels = torch.zeros(1, *crops, 3, size, size)
    times = []
    for _ in range(15):
        begin = time.process_time()
        embedder.embed_pixels(pixels)
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--images", help="folder of class folders, where the model is no run that kept some apart")
    parser.add_argument("--frozen", action="store_true", help="the run's backbone alone")
    parser.add_argument("--views", nargs="+", default=["one", "flip", "five_crops", "ten_crops"])
    parser.add_argument("--embeddings_cache")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    source = folder_source(options.images) if options.images else recorded_sources(options.model, {})["test"]
    rows = {}

    def report(name, store, build, order, **further):
        rows[name] = measured(store, build, order, options.queries) | further
        print(json.dumps({"what": name, **rows[name]}), flush=True)

    for views in options.views:
        embedder = Embedder.from_pretrained(options.model, views=views)
        embedder = backbone_alone(embedder) if options.frozen else embedder
        store = cached_store(embedder, source, options.embeddings_cache)
        embed = {"embed_milliseconds": embedding_milliseconds(embedder)}
        report("as it is" if views == "one" else f"--views {views}", store, {}, {}, **embed)
        if views != "one":
            continue
        for name, order in ORDERS.items():
            report(name, store, {}, order)
        for name, build in BUILDS.items():
            report(name, store, build, {})
    print("\n| | R@1 | MAP@R | ms a query | bytes a photo |\n|---|---|---|---|---|")
    for name, row in rows.items():
        cells = f"{row['recall_at_1']:.2f} | {row['map_at_r']:.2f} | {row['milliseconds']:.2f} | {row['bytes']:,.0f}"
        print(f"| `{name}` | {cells} |")
    if options.output:
        write_json(options.output, rows)


if __name__ == "__main__":
    main()
