"""Embed, evaluate, index and search images with a retriever, a bare backbone, or embeddings that are stored already.

    vptsp embed --model runs/photos --images photos --output runs/photos/embeddings
    vptsp evaluate --model runs/photos --output scores
    vptsp compare runs/photos google/vit-base-patch16-224-in21k --images photos --output comparison
    vptsp index --store runs/photos/embeddings --index runs/photos/index
    vptsp search --index runs/photos/index --image query.jpg

Exit status: 0 all is well, 1 a query of `search` can't be read, 2 an option, a file or a folder is not what it should
be, or in use by another process.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from ..data_scripts.command_options import CommandParser, add_data_options
from ..data_scripts.data_arguments import BUILDER_OPTIONS
from ..data_scripts.data_errors import DataError
from ..data_scripts.image_formats import MAX_IMAGE_PIXELS
from ..data_scripts.paths import place
from ..files.locks import InUseError
from .worker_counts import FEW_IMAGES


__all__ = ["COMMANDS", "main"]

DATA_OPTIONS = ("dataset_name", "data_dir", "data_cache_dir", *BUILDER_OPTIONS)
COMMANDS = {
    "embed": "write the embeddings of images to a folder of Parquet files; goes on where it was stopped",
    "index": "build an index of embeddings, or bring it in step with its images",
    "search": "find the items of an index that are most similar to images or to items",
    "evaluate": "score a model or stored embeddings, and write metrics.json and metrics.md",
    "compare": "score two models on the same images, with a paired test",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; see the module.

    Args:
        words: The command line after the name; None takes that of the process.

    Returns:
        Exit status.
    """
    options = _parser().parse_args(words)
    options.data = {name: getattr(options, name) for name in DATA_OPTIONS if hasattr(options, name)}
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)
    command = importlib.import_module(f".command_{options.command}", __package__)
    try:
        return command.run(options) or 0
    except (DataError, ValueError, OSError, ImportError, InUseError) as error:  # ImportError: an extra is missing
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="vptsp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}

    embed = parts["embed"]
    embed.add_argument("--model", required=True, help="retriever or backbone: folder or Hub name")
    embed.add_argument("--output", type=place, required=True, metavar="STORE", help="folder to write to")
    embed.add_argument("--split", help="split of the data set (default: all images)")

    evaluate = parts["evaluate"]
    evaluate.add_argument("--model", help="retriever or backbone: folder or Hub name")
    evaluate.add_argument("--store", type=place, help="stored embeddings instead of a model and data")
    evaluate.add_argument(
        "--gallery_store", type=place, metavar="STORE", help="gallery, where it isn't the queries themselves"
    )

    evaluate.add_argument(
        "--before_after", action="store_true", help="draw before_after.png: the retriever against its backbone alone"
    )

    compare = parts["compare"]
    for name in ("first", "second"):
        compare.add_argument(name, help="retriever or backbone (folder or Hub name), or a store of embeddings")

    _add_index_options(parts["index"])
    _add_search_options(parts["search"])
    for name in ("search", "evaluate", "compare"):
        _add_order_options(parts[name])
    for name in ("index", "evaluate"):
        _add_projection_options(parts[name])
    for name in ("evaluate", "compare"):
        parts[name].add_argument(
            "--output", type=place, required=True, metavar="FOLDER", help="where JSON and Markdown go"
        )
        parts[name].add_argument("--split", help="split; default: test, or query against gallery where there are")
        parts[name].add_argument("--recall_at", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
        parts[name].add_argument("--resample", default="classes", choices=("classes", "queries"))
        parts[name].add_argument(
            "--seed", type=int, default=42, help="of the resampling and of k-means (default 42, as in training)"
        )
    evaluate.add_argument("--map_at", type=int, nargs="*", default=[1000], metavar="K", help="of mAP@K (default 1000)")
    evaluate.add_argument("--confidence", type=float, help="such as 0.95: adds bootstrap intervals")
    compare.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default 0.95)")
    for name in ("clustering", "geometry"):
        evaluate.add_argument(f"--no_{name}", action="store_true", help=f"leave out the measures of {name}")
    for name in ("embed", "evaluate", "compare", "index"):
        _add_data_options(parts[name])
    for name in ("embed", "index"):
        _add_engine_options(parts[name])
    for name in COMMANDS:
        _add_model_options(parts[name])
    for name in ("embed", "evaluate", "index", "search"):
        parts[name].add_argument("--revision", help="commit, tag or branch of the model on the Hub")
    compare.set_defaults(revision=None)
    return parser


def _add_index_options(index):
    index.add_argument(
        "--index", type=place, required=True, help="folder, FILE.db or http://HOST:PORT (Milvus; #COLLECTION)"
    )
    index.add_argument("--store", type=place, help="stored embeddings instead of a model and data")
    index.add_argument("--model", help="retriever or backbone: folder or Hub name")
    index.add_argument("--split", help="split of the data set (default: all images)")
    index.add_argument("--factory", help="faiss's name of a new index; default auto: chooses by size, says why")
    index.add_argument("--target_recall", type=float, help="of a new approximate index (default 0.95)")
    index.add_argument("--memory_gb", type=float, help="what auto may take (default 16)")
    index.add_argument("--quantise", choices=("int8", "binary"), help="keep a new index's vectors in fewer bytes")
    index.add_argument("--add", action="store_true", help="only add what is new: replace and remove nothing")
    index.add_argument("--replace", action="store_true", help="build anew, of these images alone")
    index.add_argument("--remove", nargs="*", metavar="ID", help="remove these items, or those of --where, instead")
    _add_where(index, "what --remove removes, such as class_name=mug")


def _add_projection_options(parser):
    parser.add_argument(
        "--projection", choices=("pca", "whiten", "truncate"), help="shorten or whiten embeddings, learned from these"
    )
    parser.add_argument("--dim", type=int, help="width that --projection leaves")


def _add_order_options(parser):
    for name, text, values in (
        ("rerank", "re-rank the nearest by k-reciprocal neighbours", "depth=100 k1=20 k2=6 weight=0.3"),
        ("expand", "expand queries by their nearest neighbours", "neighbours=10 alpha=3"),
    ):
        parser.add_argument(f"--{name}", nargs="*", metavar="NAME=VALUE", help=f"{text}; defaults {values}")


def _add_where(parser, text):
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILTER",
        help=f"{text}; 'price<20' with = != < <= > >= on any column, in any case; all must hold",
    )


def _add_search_options(search):
    search.add_argument("--index", type=place, required=True, help="what `index` wrote")
    search.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="PLACE",
        help="queries: files, folders, .txt lists with a path per line",
    )
    search.add_argument("--id", nargs="+", default=[], metavar="ID", help="items of the index as queries")
    search.add_argument("--k", type=int, default=10, help="results per query (default 10)")
    _add_where(search, "only such items, as class_name=mug (or a second class_name=cup)")
    search.add_argument("--min_similarity", type=float, metavar="S", help="only items of at least this, -1 to 1")
    search.add_argument("--group_by", metavar="COLUMN", help="only the best item of each value, as of each class_name")
    search.add_argument("--containing", metavar="TEXT", help="only items with this text in their id or class")
    search.add_argument("--model", help="folder or Hub name, where it isn't where the index says")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.add_argument("--mmap", action="store_true", help="leave the vectors on disk")
    search.add_argument(
        "--no_verify", action="store_true", help="don't compare the index's files with their checksums"
    )
    search.add_argument("--gpu", action="store_true", help="search on the GPUs, with faiss-gpu")


def _add_data_options(parser):
    group = parser.add_argument_group("images", "--images, or --dataset_name (default folder) and what it needs")
    group.add_argument(
        "--images",
        type=place,
        metavar="PLACE",
        help="folder of images, table, .tar files, address (s3://...) or .txt file with a path per line",
    )
    add_data_options(group, DATA_OPTIONS)
    group.add_argument("--skip_corrupt", action="store_true", help="leave out images that can't be read")
    group.add_argument(
        "--embeddings_cache", type=place, metavar="FOLDER", help="where embeddings are kept, by model and content"
    )
    group.add_argument(
        "--num_workers",
        type=int,
        help="processes that decode images while the model runs (default: one less than the CPUs, at most 8; none for "
        f"less than {FEW_IMAGES} images)",
    )
    group.add_argument("--shard_size", type=int, default=1024, help="embeddings per file of a store (default 1024)")
    group.add_argument("--embedding_dtype", default="float32", help="float32 or float16, of a store")
    group.add_argument(
        "--lock_timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for another process that writes the same store or index (default 60)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_engine_options(parser):
    group = parser.add_argument_group(
        "more than one machine", "docs/large_scale.md; or the command under torchrun, on a disk that all share"
    )
    group.add_argument(
        "--engine", choices=("ray",), help="embed on a Ray cluster (extra ray): RAY_ADDRESS, or one on this machine"
    )
    group.add_argument(
        "--engine_workers", type=int, metavar="N", help="workers of --engine (default: as many as there is room for)"
    )
    group.add_argument("--engine_cpus", type=int, metavar="N", help="CPUs of each worker (default 1)")
    group.add_argument(
        "--engine_gpus", type=float, metavar="N", help="GPUs of each worker, 0.5 for half of one (default 0: the CPU)"
    )


def _add_model_options(parser):
    group = parser.add_argument_group("how the model runs")
    group.add_argument("--backbone", help="a retriever's backbone: folder or Hub name, where it isn't where it says")
    group.add_argument(
        "--image_size",
        type=int,
        help="side in pixels of what a bare backbone sees (default: its own; in a comparison, the retriever's)",
    )
    group.add_argument("--resize_size", type=int, help="short side in pixels before the crop, of a bare backbone")
    group.add_argument("--batch_size", type=int, default=64)
    group.add_argument(
        "--views",
        help="average the embeddings of views of an image: one, flip, five_crops, ten_crops (default: the index's, or "
        "one)",
    )
    group.add_argument("--device", help="such as cuda:1; default: the accelerator, or the CPU")
    group.add_argument(
        "--dtype",
        default="float32",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="to compute in (default %(default)s); auto: bfloat16 where the device is fast at it",
    )
    group.add_argument("--verbose", action="store_true", help="say how products were timed, and what was chosen")
    group.add_argument(
        "--max_image_pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        help="an image of more can't be read (default %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
