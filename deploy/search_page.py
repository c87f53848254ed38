"""The search page: browse an index, drop an image, see the most similar ones, filter them, click one to search on.

    vptsp app --index runs/photos/index
    vptsp app --index runs/photos/index --compare_backbone        # a switch that shows what tuning brought
    vptsp app --index runs/photos/index --write_space my_space    # a folder to push as a Hugging Face Space

It needs Gradio (extra `app`) and, once running, no network. Nothing is ever read but the images of the index's items,
inside its `image_root`, and what was uploaded.
"""

import argparse
import importlib.util
import sys

from vptsp.data_scripts.command_options import CommandParser
from vptsp.data_scripts.data_errors import DataError
from vptsp.data_scripts.paths import place
from vptsp.search.model_names import model_name_of

from .page_content import MAX_MEGAPIXELS, SearchPage
from .page_layout import MAX_UPLOAD_MB, launch
from .ports import check_port
from .space import write_space


def open_page(
    index,
    model=None,
    image_root=None,
    max_megapixels=MAX_MEGAPIXELS,
    backbone=None,
    compare_backbone=False,
    embeddings_cache=None,
):
    """The [`SearchPage`] of an index, with the model that the index or `model` names, on the backbone that that names.

    Args:
        index: Its place.
        model, image_root, max_megapixels, backbone, compare_backbone, embeddings_cache: As of the command.

    Raises:
        DataError: an index, model or folder is not there, or nobody says which it is.
        IndexMismatchError: the model is not the one that made the embeddings.
    """
    from vptsp.search.inputs import embedder_of
    from vptsp.search.open_index import open_index

    opened = open_index(index)
    name = model_name_of(opened, index, model)
    page = SearchPage(opened, image_root, max_megapixels)
    opened.use_embedder(embedder_of(opened, name, backbone))
    if compare_backbone:
        from .backbone_view import backbone_index

        page.backbone, skipped = backbone_index(page, embeddings_cache)
        if skipped:
            print(f"backbone alone: without {len(skipped):,} images that can't be read, such as {skipped[0]}")
    return page


def main(words=None):
    """Entry point; exit status 2 and one line on stderr where something is not what it should be."""
    parser = CommandParser(prog="vptsp app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=place, required=True, help="what `vptsp index` wrote")
    parser.add_argument("--model", help="folder or Hub name of the model, where it isn't where the index says")
    parser.add_argument("--backbone", help="folder or Hub name of its backbone, where it isn't where the model says")
    parser.add_argument("--image_root", type=place, help="folder of the images, where it isn't where the index says")
    parser.add_argument(
        "--compare_backbone",
        action="store_true",
        help="embed the images with the backbone alone too, and show both; kept for the next start",
    )
    parser.add_argument("--embeddings_cache", type=place, metavar="FOLDER", help="where these embeddings are kept")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default this machine)"
    )
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="make a temporary public address, through Gradio's servers"
    )
    parser.add_argument(
        "--max_upload_mb",
        type=float,
        default=MAX_UPLOAD_MB,
        help="size of an upload at most, in megabytes (default 20)",
    )
    parser.add_argument(
        "--max_megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        help="width times height of a query at most, in millions (default 50)",
    )
    parser.add_argument(
        "--write_space", type=place, metavar="FOLDER", help="write a Hugging Face Space instead of serving"
    )
    args = parser.parse_args(words)
    try:
        if importlib.util.find_spec("gradio") is None:
            raise ImportError("vptsp app needs gradio: pip install 'vptsp[app]'")
        if args.compare_backbone and args.write_space is not None:
            raise DataError("--compare_backbone is for the page served here: a Space has the tuned model alone")
        served = ("host", "port", "share", "max_upload_mb", "max_megapixels")
        given = [f"--{name}" for name in served if getattr(args, name) != parser.get_default(name)]
        if given and args.write_space is not None:
            raise DataError(f"{', '.join(given)}: for the page served here: a Space has settings of its own")
        if args.embeddings_cache is not None and not args.compare_backbone:
            raise DataError("--embeddings_cache goes with --compare_backbone")
        if args.port is not None and args.write_space is None:
            check_port(args.host, args.port, least=1)
        page = open_page(
            args.index,
            args.model,
            args.image_root,
            args.max_megapixels,
            args.backbone,
            args.compare_backbone,
            args.embeddings_cache,
        )
        if args.write_space is None:
            launch(page, args.host, args.port, args.share, args.max_upload_mb)
        else:
            write_space(args.write_space, page.index, args.image_root)
            print(f"{args.write_space}: {len(page.index):,} images; see docs/app.md for how to push it")
    except (DataError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
