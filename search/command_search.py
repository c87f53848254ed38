"""`vptsp search`: the items of an index that are most similar to images, or to items."""

from __future__ import annotations

import json

from ..data_scripts.data_errors import DataError
from .inputs import load_embedder
from .open_index import is_milvus, open_index


def run(options):
    """Search, and print the results."""
    if not options.image and not options.id:
        raise DataError("give --image or --id, got neither")
    if is_milvus(options.index) and (options.mmap or options.gpu or options.no_verify):
        raise DataError("--mmap, --gpu and --no_verify are for faiss: Milvus decides that itself")
    where = parse_where(options.where)
    how = {} if is_milvus(options.index) else {"mmap": options.mmap, "verify": not options.no_verify}
    index = open_index(options.index, **how)
    if options.gpu:
        index.use_gpus()
    results = {}
    if options.id:
        results |= dict(
            zip(options.id, index.search_ids(options.id, options.k, where, options.containing), strict=True)
        )
    if options.image:
        name = options.model or (index.model or {}).get("name")
        if name is None:
            raise DataError(f"{options.index} doesn't say which model made its embeddings: give --model")
        index.use_embedder(load_embedder(name, options))
        results |= dict(
            zip(options.image, index.search_images(options.image, options.k, where, options.containing), strict=True)
        )
    print(_as_json(results) if options.json else _as_text(results))


def parse_where(words):
    """`["class_name=a", "class_name=b"]` -> `{"class_name": ["a", "b"]}`; None for no words.

    Raises:
        DataError: a word has no `=`.
    """
    where = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise DataError(f"where must be COLUMN=VALUE, got {word!r}")
        where.setdefault(name, []).append(value)
    return where or None


def _as_json(results):
    items = {
        query: [{"id": h.id, "similarity": h.similarity, **h.metadata} for h in hits]
        for query, hits in results.items()
    }
    return json.dumps(items, indent=2, ensure_ascii=False)


def _as_text(results):
    lines = []
    for query, hits in results.items():
        lines.append(query)
        lines += [f"  {hit.similarity:7.4f}  {hit.id}  {' '.join(hit.metadata.values())}".rstrip() for hit in hits]
        lines += [] if hits else ["  nothing found"]
    return "\n".join(lines)
