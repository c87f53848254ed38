"""`vptsp search`: the items of an index that are most similar to images, or to items."""

from __future__ import annotations

import json
import sys

from ..data_scripts.data_errors import DataError
from ..data_scripts.image_files import list_images
from ..data_scripts.paths import usable_path
from .filters import parse_words
from .image_sources import list_source
from .inputs import load_embedder, model_of, orders_of, refuse_model_options
from .open_index import is_milvus, open_index
from .worker_counts import choose_workers


def run(options):
    """Search, and print the results.

    Returns:
        Exit status: 1 where a query can't be read, else 0.
    """
    _check(options)
    how = {} if is_milvus(options.index) else {"mmap": options.mmap, "verify": not options.no_verify}
    images = query_files(options.image)
    index = open_index(options.index, **how)
    if options.gpu:
        index.use_gpus()
    index.require_values(options.where)
    filters = {
        "where": options.where,
        "containing": options.containing,
        "min_similarity": options.min_similarity,
        "group_by": options.group_by,
        **orders_of(options),
    }
    results, failed = {}, {}
    if options.id:
        results |= dict(zip(options.id, index.search_ids(options.id, options.k, **filters), strict=True))
    if images:
        embedder = load_embedder(model_of(index, options), options)
        index.use_embedder(embedder)
        embeddings = embedder.embed_images(images, num_workers=choose_workers(len(images)), failed=failed)
        read = [name for row, name in enumerate(images) if row not in failed]
        if read:
            results |= dict(zip(read, index.search(embeddings, options.k, **filters), strict=True))
    if results or not failed:
        print(_as_json(results) if options.json else _as_text(results))
    for error in failed.values():
        print(f"error: {error}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(images)} images can't be read, the others are above", file=sys.stderr)
    return 1 if failed else 0


def _check(options):
    """Refuse what can't work before anything is opened."""
    if not options.image and not options.id:
        raise DataError("give --image or --id, got neither")
    if not options.image:
        refuse_model_options(options, "--image; items of the index are embedded already")
    if options.k < 1:
        raise DataError(f"--k must be >= 1, got {options.k}")
    if options.min_similarity is not None and not -1 <= options.min_similarity <= 1:
        raise DataError(f"--min_similarity must be in [-1, 1], got {options.min_similarity}")
    parse_words(options.where)
    orders_of(options)
    if is_milvus(options.index) and (options.mmap or options.gpu or options.no_verify):
        raise DataError("--mmap, --gpu and --no_verify are for faiss: Milvus decides that itself")


def query_files(places):
    """Images that are asked for: files as they are, those of folders, those that `.txt` lists name; each once.

    Raises:
        DataError: a folder holds no images, or a list names a file that is not there.
    """
    files = []
    for place in places:
        path = usable_path(place)
        if path.is_dir():
            found = [str(path / image.path) for image in list_images(path)]
            if not found:
                raise DataError(f"{place}: there are no images in this folder")
            files += found
        elif path.suffix == ".txt":
            source = list_source(path)
            files += [source.stored(row) for row in range(len(source))]
        else:
            files.append(str(path))
    return list(dict.fromkeys(files))


def _as_json(results):
    items = {
        query: [{"id": h.id, "similarity": h.similarity, "path": h.path, **h.metadata} for h in hits]
        for query, hits in results.items()
    }
    return json.dumps(items, indent=2, ensure_ascii=False)


def _as_text(results):
    lines = []
    for query, hits in results.items():
        lines.append(query)
        for hit in hits:
            values = " ".join("" if value is None else str(value) for value in hit.metadata.values())
            lines.append(f"  {hit.similarity:7.4f}  {hit.id}  {values}".rstrip())
        lines += [] if hits else ["  nothing found"]
    return "\n".join(lines)
