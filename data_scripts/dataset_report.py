"""What `vptsp check` says about a data set: counts, class sizes, and a picture."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from .contact_sheet import Cell, Section, draw_contact_sheet, spread
from .data_errors import ImageError
from .dataset_registry import builder_class
from .image_files import SLOW_SECONDS
from .image_formats import MAX_IMAGE_PIXELS
from .images import open_image


if TYPE_CHECKING:
    from PIL import Image


__all__ = ["SplitView", "class_size_histogram", "contact_sheet", "count_table", "find_unreadable", "view_splits"]

MAX_BINS = 12
BAR_WIDTH = 40


class SplitView(NamedTuple):
    """One split, to look into without preparing it.

    Attributes:
        labels: Per row.
        class_names: Position = label.
        read: Gives `(row, {"path", "bytes"})` of some rows, in any order.
    """

    labels: Sequence[int]
    class_names: Sequence[str]
    read: Any

    @property
    def class_sizes(self) -> list[int]:
        """Images of each class that has one, in the order of labels."""
        counts = Counter(self.labels)
        return [counts[label] for label in sorted(counts)]


def view_splits(name: str, data_dir: str | None, cache_dir: str | None, options: Mapping[str, Any]) -> dict:
    """List and check a data set, without writing its tables (those of a Hub data set are, as it is downloaded).

    Returns:
        `SplitView` per split.

    Raises:
        DataError: as `load_splits`.
    """
    builder = builder_class(name)
    if not hasattr(builder, "list_splits"):
        splits = builder.load_splits(data_dir, cache_dir, **options)
        return {
            key: SplitView(split["label"][:], split.features["label"].names, _reader_of_table(split))
            for key, split in splits.items()
        }
    listing = builder.list_splits(data_dir, cache_dir, **options)
    views = {}
    for group, class_names in listing.class_names.items():
        if not listing.group_splits(group):
            continue
        group_builder = builder(group, data_dir, cache_dir, listing, **options)
        for split, rows in listing.group_splits(group).items():
            views[split] = SplitView(rows.labels, class_names, _reader_of_builder(group_builder, split))
    return views


def _reader_of_table(split):
    return lambda rows: ((row, split[row]["image"]) for row in rows)


def _reader_of_builder(builder, split: str):
    return lambda rows: builder.read_images(split, rows)


def count_table(views: Mapping[str, SplitView]) -> str:
    """Images, classes and images per class of each split, as text."""
    lines = [("split", "images", "classes", "per class: least", "median", "mean", "most")]
    for split, view in views.items():
        sizes = view.class_sizes or [0]
        lines.append(
            (
                split,
                f"{len(view.labels):,}",
                f"{len(view.class_sizes):,}",
                f"{min(sizes):,}",
                f"{statistics.median(sizes):,g}",
                f"{statistics.mean(sizes):,.1f}",
                f"{max(sizes):,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *row[1:]]) for line, row in zip(lines, padded, strict=True))


def class_size_histogram(sizes: Sequence[int]) -> str:
    """How many classes have how many images, as text: one line per range of sizes.

    Ranges have equal widths; where the largest class is more than 50 times the smallest, each is twice as wide as the
    one before.
    """
    bins = _bins(min(sizes), max(sizes))
    counts = [sum(low <= size <= high for size in sizes) for low, high in bins]
    names = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in bins]
    width, most = max(map(len, names)), max(counts)
    number_width = len(f"{most:,}")
    lines = []
    for name, count in zip(names, counts, strict=True):
        bar = "#" * (max(round(BAR_WIDTH * count / most), 1) if count else 0)
        lines.append(f"{name:>{width}}  {count:>{number_width},}  {bar}".rstrip())
    return "\n".join(lines)


def _bins(low: int, high: int) -> list[tuple[int, int]]:
    if high > 50 * low:
        edges = [low]
        while edges[-1] <= high:
            edges.append(edges[-1] * 2)
    else:
        step = -(-(high - low + 1) // MAX_BINS)
        edges = list(range(low, high + step + 1, step))
    return [(start, end - 1) for start, end in pairwise(edges) if start <= high]


def contact_sheet(
    views: Mapping[str, SplitView], max_classes: int = 64, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple["Image.Image", list[str]]:
    """Draw the first image of some classes of each split, spread over the class order.

    Args:
        views: The splits; those without images are left out.
        max_classes: Classes in all; shared out evenly among the splits.
        max_image_pixels: An image of more can't be read.

    Returns:
        The picture, and what could not be read.
    """
    views = {split: view for split, view in views.items() if len(view.labels)}
    shares = _shares([len(set(view.labels)) for view in views.values()], max_classes)
    sections, unreadable = [], []
    for (split, view), share in zip(views.items(), shares, strict=True):
        first: dict[int, int] = {}
        for row, label in enumerate(view.labels):
            first.setdefault(label, row)
        labels, sizes = sorted(first), Counter(view.labels)
        shown = [labels[i] for i in spread(len(labels), share)]
        images, errors = _open_rows(view, [first[label] for label in shown], max_image_pixels)
        unreadable += errors
        cells = [
            Cell(images[first[label]], view.class_names[label], _number(sizes[label], "image")) for label in shown
        ]
        some_of = f", {len(shown)} of them here" if len(shown) < len(labels) else ""
        remark = f"{_number(len(view.labels), 'image')} of {_number(len(labels), 'class')}{some_of}"
        sections.append(Section(split, remark, cells))
    return draw_contact_sheet(sections), unreadable


def _shares(counts: Sequence[int], total: int) -> list[int]:
    """Share out places: as evenly as the counts allow, at least one each."""
    shares, left = [0] * len(counts), max(total, len(counts))
    order = sorted(range(len(counts)), key=counts.__getitem__)
    for done, position in enumerate(order):
        shares[position] = min(counts[position], left // (len(order) - done))
        left -= shares[position]
    return shares


def _number(count: int, noun: str) -> str:
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {plural}"


def _open_rows(
    view: SplitView, rows: list[int], max_image_pixels: int
) -> tuple[dict[int, "Image.Image | None"], list[str]]:
    images, errors = dict.fromkeys(rows), []
    for row, image, error in _decode(view, rows, max_image_pixels):
        images[row] = image
        if error is not None:
            errors.append(error)
    return images, errors


def _decode(
    view: SplitView, rows: Sequence[int], limit: int
) -> Iterator[tuple[int, "Image.Image | None", str | None]]:
    for row, stored in view.read(list(rows)):
        try:
            if stored["bytes"] is None:
                yield row, open_image(stored["path"], max_image_pixels=limit), None
            else:
                yield row, open_image(stored["bytes"], stored["path"] or f"row {row}", limit), None
        except ImageError as error:
            yield row, None, str(error)


def find_unreadable(views: Mapping[str, SplitView], max_image_pixels: int = MAX_IMAGE_PIXELS) -> list[str]:
    """Decode every image; what is wrong with those that can't be read."""
    found = []
    total = sum(len(view.labels) for view in views.values())
    with tqdm(total=total, desc="Decoding", unit="image", delay=SLOW_SECONDS, leave=False) as bar:
        for view in views.values():
            for _, _, error in _decode(view, range(len(view.labels)), max_image_pixels):
                bar.update()
                if error is not None:
                    found.append(error)
    return found
