"""Check a data set: print its counts and a histogram of its class sizes, and draw one image of each class.

    vptsp check cub --data_dir ~/data/CUB_200_2011.tgz
    vptsp check folder --data_dir flowers --class_split alternate --decode

The options are those of `train.py` that say which data. Nothing is prepared or copied, so this is the quick way to see
whether a download is complete, before a run. Exit status: 0 all is well, 1 images can't be read, 2 the data set is
not what it should be or an option is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command_options import CommandParser, add_data_options
from .data_arguments import BUILDER_OPTIONS, DataArguments, check_data_arguments
from .data_errors import DataError
from .dataset_registry import DATASETS
from .dataset_report import class_size_histogram, contact_sheet, count_table, find_unreadable, view_splits
from .paths import usable_path


__all__ = ["main"]

MAX_NAMED = 50
"""Images that can't be read are named up to this number."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; see the module.

    Args:
        words: The command line after the name; None takes that of the process.

    Returns:
        Exit status.
    """
    options = _parser().parse_args(words)
    try:
        given = {name: value for name, value in vars(options).items() if name in _DATA_OPTIONS}
        args = DataArguments(dataset_name=options.name, **given)
        check_data_arguments(args)
        picture = usable_path(options.picture or f"{options.name}.png")
        _check_picture(picture)
        return _report(args, picture, options.decode, options.max_classes)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


_DATA_OPTIONS = ("data_dir", "data_cache_dir", *BUILDER_OPTIONS, "max_image_pixels")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="vptsp check",
        description=__doc__.partition("\n\n")[0],
        epilog="Data sets: " + "; ".join(f"{name}: {entry.description}" for name, entry in DATASETS.items()) + ".",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("name", metavar="NAME", help=f"data set: {', '.join(DATASETS)}")
    add_data_options(parser, _DATA_OPTIONS)
    parser.add_argument("--picture", default=None, help="where the picture goes; by default NAME.png")
    parser.add_argument("--max_classes", type=int, default=64, help="classes in the picture; 0: draw none")
    parser.add_argument(
        "--decode", action="store_true", default=False, help="decode every image, name the broken ones"
    )
    return parser


def _check_picture(picture: Path) -> None:
    if picture.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise DataError(f"picture must end in .png, .jpg or .webp, got {str(picture)!r}")
    if not picture.parent.is_dir():
        raise DataError(f"picture: there is no folder {picture.parent}")


def _report(args: DataArguments, picture: Path, decode: bool, max_classes: int) -> int:
    views = view_splits(args.dataset_name, args.data_dir, args.data_cache_dir, args.builder_options())
    source = args.data_dir or args.dataset_repo
    print(f"{args.dataset_name}{f' in {source}' if source else ''}: {DATASETS[args.dataset_name].description}\n")
    if args.labels == "none" and "labels" not in args.builder_options():
        print("Counted with their labels; training with labels none puts those of train away\n")
    print(count_table(views))
    for split, view in views.items():
        if view.class_sizes:
            print(f"\nImages per class, number of classes ({split})\n{class_size_histogram(view.class_sizes)}")
    print(flush=True)
    unreadable = find_unreadable(views, args.max_image_pixels) if decode else []
    if max_classes > 0:
        sheet, missing = contact_sheet(views, max_classes, args.max_image_pixels)
        try:
            sheet.save(picture)
        except OSError as error:
            raise DataError(f"can't write the picture {picture}: {error.strerror or error}") from error
        print(f"Picture of {min(max_classes, sum(len(v.class_sizes) for v in views.values()))} classes: {picture}")
        unreadable = unreadable or missing
    if decode and not unreadable:
        print(f"All {sum(len(view.labels) for view in views.values()):,} images can be read.")
    if unreadable:
        more = f"\n  and {len(unreadable) - MAX_NAMED:,} more" if len(unreadable) > MAX_NAMED else ""
        named = "".join(f"\n  {error}" for error in unreadable[:MAX_NAMED])
        print(f"error: {len(unreadable):,} of the images can't be read:{named}{more}", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
