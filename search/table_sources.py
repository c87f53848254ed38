"""Images to embed out of tables and splits of data sets, with their classes and further columns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data_scripts.data_errors import DataError
from ..data_scripts.image_names import image_names
from ..data_scripts.labels import check_labels
from ..data_scripts.table_columns import free_name, plain_value
from .image_sources import ChosenRows, GivenImages, ImageSource, joined_source


TABLE_COLUMN_OPTIONS = frozenset({"image_column", "label_column", "split_column", "image_root"})


class _TableRows(NamedTuple):
    """`ImageSource.stored` of rows of `datasets`."""

    table: object
    description: str

    def __call__(self, row):
        from ..data_scripts.torch_dataset import stored_image

        return stored_image(self.table[row]["image"], f"{self.description}, row {row}", "image")[0]

    def chosen(self, rows):
        if self.table.cache_files and isinstance(self(rows[0]), bytes):
            return ChosenRows(self, rows)  # what is on a disk stays there
        return GivenImages([self(row) for row in rows])


def split_source(split, description, data_dir=None):
    """A split of [`load_splits`], or any data set of `datasets` with columns `image` and `label`.

    Ids are paths relative to `data_dir` (to the folder common to all files, where they lie elsewhere); for images that
    are stored in the table, their names, or `row 0`, `row 1`, ... where not all have different names.

    Args:
        split: Map-style data set of `datasets`.
        description: One line on what this is.
        data_dir: Folder of the data set.

    Raises:
        DataError: a column is missing or of another type, a row has no image or no label, or there are no rows.
    """
    import datasets

    from ..data_scripts.torch_dataset import ImageColumns

    columns = ImageColumns.find(split.features, "image", "label")
    split = split.with_format(None)
    table = split.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
    names = columns.class_names
    labels = check_labels(
        table.with_format("arrow")[:].column("label"), None if names is None else len(names), description
    )
    class_names = names or [str(number) for number in range(int(labels.max(initial=-1)) + 1)]
    ids, root, _ = image_names(table, data_dir)
    stored = _TableRows(table.select_columns(["image"]), description)
    others = _further(split, description)
    return ImageSource(ids, labels, class_names, stored, description, None if root is None else str(root), others)


def table_source(place, cache_dir=None, **options):
    """All images of a table, whatever their split; further columns go along.

    Args:
        place: A file (CSV, TSV, JSONL, Parquet, Arrow), a pandas DataFrame, a folder with `metadata.csv`, or what
            `save_to_disk` of `datasets` wrote. See `TableImages`.
        cache_dir: Where Parquet files are unpacked to; by default where `datasets` keeps its tables.
        **options: `image_column`, `label_column`, `split_column`, `image_root`.

    Raises:
        DataError: as `load_splits`; but classes need not be there.
    """
    from ..data_scripts.tables import TableImagesConfig, read_tables

    check_table_options(options)
    where, splits = read_tables(place, TableImagesConfig(**options), cache_dir, labelled=False)
    return source_of_splits(splits, where, None if hasattr(place, "columns") else place)


def check_table_options(options):
    """A DataError if an option of a table would split it."""
    if others := sorted(set(options) - TABLE_COLUMN_OPTIONS):
        raise DataError(f"{', '.join(others)}: all images of a table are taken; only data sets are split")


def source_of_splits(splits, where, place=None, stored_of=None):
    """All splits of a table as one source.

    Args:
        splits: Dict of name -> data set of `datasets`, as of `read_tables`.
        where: What the table is.
        place: The folder that ids are paths from, or a table in it; None: that which all files share.
        stored_of: Function of a split's rows and its description, gives `ImageSource.stored`; None: what they hold.
    """
    import datasets

    parts = {}
    for name, split in splits.items():
        description = f"{name} of {where}"
        labels, class_names = _labels_of(split, description)
        table = split.cast_column("image", datasets.Image(decode=False))
        found = image_names(table, place)
        root = None if found.root is None else str(found.root)
        stored = (stored_of or _TableRows)(table.select_columns(["image"]), description)
        parts[name] = ImageSource(found.names, labels, class_names, stored, description, root, _further(split, where))
    return joined_source(parts, f"images of {where}")


def _labels_of(split, description):
    """Labels of a table, masked where there are none, and the names of its classes in their order."""
    if "label" not in split.column_names:
        return np.ma.masked_all(len(split), dtype=np.int64), []
    feature = split.features["label"]
    values = split.with_format("arrow", columns=["label"])[:].column("label").to_pylist()
    if getattr(feature, "names", None):
        known = range(len(feature.names))
        bad = next((row for row, value in enumerate(values) if value is not None and value not in known), None)
        if bad is not None:
            raise DataError(
                f"{description}: row {bad} has the label {values[bad]}; expected 0..{len(feature.names) - 1}"
            )
        numbers, class_names = values, list(feature.names)
    else:
        classes = sorted({value for value in values if value not in (None, "")})
        number = {value: position for position, value in enumerate(classes)}
        numbers, class_names = [number.get(value) for value in values], list(map(str, classes))
    mask = [number is None for number in numbers]
    return np.ma.array([number or 0 for number in numbers], mask=mask, dtype=np.int64), class_names


def _further(split, description):
    """The columns of text and numbers beside image and label, as `ImageSource.columns` has them."""
    from ..data_scripts.given_splits import further_columns

    names = further_columns(split.features, ("image", "label"), description)
    arrow = split.with_format("arrow", columns=names)[:] if names else None
    return {free_name(name): [plain_value(value) for value in arrow.column(name).to_pylist()] for name in names}


__all__ = ["TABLE_COLUMN_OPTIONS", "check_table_options", "source_of_splits", "split_source", "table_source"]
