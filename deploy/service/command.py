"""Serve an index over HTTP: search by image, id or vector, add, replace and remove items.

    vptsp serve --index catalogue
    curl -F image=@photo.jpg -F k=5 http://127.0.0.1:8000/search/image

`/docs` describes all requests, `/openapi.json` for programs. It needs the extra `serve`. While it runs, other
processes can search the index but not change it. A change that was answered is on the disk; see docs/serving.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from vptsp.data_scripts.command_options import CommandParser
from vptsp.data_scripts.data_errors import DataError
from vptsp.files.locks import InUseError
from vptsp.search.model_names import model_name_of

from ..ports import check_port
from .limits import Limits


KEY_VARIABLE = "VPTSP_API_KEY"


def _parser():
    parser = CommandParser(
        prog="vptsp serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True, help="what `vptsp index` wrote")
    parser.add_argument("--model", help="folder or Hub name of the model, where it isn't where the index says")
    parser.add_argument("--backbone", help="folder or Hub name of its backbone, where it isn't where the model says")
    parser.add_argument("--no_model", action="store_true", help="load none: search by id and by vector alone")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (this machine)")
    parser.add_argument("--port", type=int, default=8000, help="to listen at (8000); 0: any that is free")
    parser.add_argument(
        "--api_key_file", help=f"file with the key that requests must bring; or the environment's {KEY_VARIABLE}"
    )
    defaults = Limits()
    parser.add_argument("--max_upload_mb", type=float, default=defaults.max_body_bytes / 1e6, help="of a request (20)")
    parser.add_argument("--max_megapixels", type=float, default=defaults.max_pixels / 1e6, help="of an image (50)")
    parser.add_argument("--max_results", type=int, default=defaults.max_results, help="of a search (1000)")
    parser.add_argument(
        "--max_waiting", type=int, default=defaults.max_waiting, help="images; more are refused with 429 (256)"
    )
    parser.add_argument("--batch_size", type=int, default=defaults.max_batch, help="images embedded at a time (16)")
    parser.add_argument("--timeout", type=float, default=defaults.timeout, help="seconds of a request (30)")
    parser.add_argument("--compact_after", type=int, default=1000, help="changes after which all is saved (1000)")
    parser.add_argument("--decoders", type=int, default=os.cpu_count() or 1, help="threads that decode (one a core)")
    return parser


def main(words=None):
    """Entry point; exit status 2 and one line on stderr where something is not what it should be."""
    args = _parser().parse_args(words)
    try:
        _serve(args)
    except ModuleNotFoundError as error:
        print(f"error: vptsp serve needs {error.name}: pip install 'vptsp[serve]'", file=sys.stderr)
        raise SystemExit(2) from error
    except (DataError, InUseError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _serve(args):
    limits = Limits(
        max_body_bytes=int(args.max_upload_mb * 1e6),
        max_pixels=int(args.max_megapixels * 1e6),
        max_results=args.max_results,
        max_waiting=args.max_waiting,
        timeout=args.timeout,
        max_batch=args.batch_size,
    )
    for name in ("compact_after", "decoders"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(args, name)}")
    check_port(args.host, args.port)
    key = read_key(args.api_key_file)

    import uvicorn

    from vptsp.search.inputs import embedder_of

    from .application import create_app
    from .live_index import LiveIndex

    with LiveIndex.open(args.index, compact_after=args.compact_after) as live:
        embedder = None
        if not args.no_model:
            name = model_name_of(live.index, args.index, args.model, "--model or --no_model")
            embedder = embedder_of(live.index, name, args.backbone)
            live.index.use_embedder(embedder)
        if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
            print(
                f"warning: {args.host} can be reached by others, and there is no key ({KEY_VARIABLE})", file=sys.stderr
            )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once requests are answered
        app = create_app(live, embedder, limits, key, args.decoders)
        uvicorn.run(app, host=args.host, port=args.port, timeout_graceful_shutdown=int(limits.timeout) + 1)


def read_key(path):
    """The key of a file, or of the environment; None where neither has one.

    Raises:
        DataError: the file can't be read, or the key is empty or no ASCII text.
    """
    if path is None:
        key = os.environ.get(KEY_VARIABLE)
        where = KEY_VARIABLE
    else:
        where = f"--api_key_file {path}"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{where} can't be read: {error}") from error
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable():
        raise DataError(f"{where} must hold a key of printable ASCII characters")
    return key


__all__ = ["main", "read_key"]
