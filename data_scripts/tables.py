"""Tables of images: CSV, TSV, JSONL, Parquet, Arrow, a pandas DataFrame, imagefolders with metadata, saved data sets.

A table has a column of images (paths relative to its file, or contents), one of classes, perhaps one that says which
row is in which split, and others, which go along as columns of the data set. What is wrong is said with its line.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .builder import quiet_progress
from .class_folders import class_of_path, split_folders
from .data_errors import DataError, some
from .dataset_options import TableOptions
from .given_splits import ColumnsConfig, LazySplits, choose_layout, image_column_of, named_columns, split_given
from .hub import load_saved
from .image_files import LeftOut, list_images, say_shared_files
from .labels import check_class_name, check_label
from .paths import other_form, usable_path
from .table_columns import (
    IMAGE_NAMES,
    LABEL_NAMES,
    SPLIT_NAMES,
    alike_column,
    choose_column,
    plain_value,
    say_mixed,
    typed_column,
)
from .table_files import metadata_files, missing_text, read_text_table, shortened, table_kind
from .unlabelled_tables import split_unlabelled


__all__ = ["TableImages", "TableImagesConfig", "read_tables", "table_splits"]


logger = logging.getLogger(__name__)


@dataclass
class TableImagesConfig(TableOptions, ColumnsConfig):
    """What `TableImages` is configured by."""


class TableImages:
    """Images and classes of a table; see `TableOptions` for the options.

    `data_dir` is a file (CSV, TSV, JSONL, Parquet, Arrow), a pandas DataFrame, a folder with `metadata.csv` (or
    .jsonl, .parquet; also one in each of the folders train, test, ...), a folder of Parquet files, or what
    `save_to_disk` of `datasets` wrote. Class order is that of a `ClassLabel`, else of numbers, else the sorted one.
    """

    BUILDER_CONFIG_CLASS = TableImagesConfig
    DESCRIPTION = "Images and classes of a table."

    @classmethod
    def load_splits(
        cls, data_dir: Any = None, cache_dir: str | None = None, streaming: bool = False, **options: Any
    ) -> datasets.DatasetDict | datasets.IterableDatasetDict:
        """All splits, with the columns `image` (not decoded), `label` and the others; see `registry.load_splits`.

        Raises:
            DataError: there is no table, a column is not there or can't be told, an image is missing or named twice, a
                label is empty, or the splits don't fit; the message names the line.
        """
        is_frame = hasattr(data_dir, "columns")
        config = TableImagesConfig(data_dir=None if is_frame else data_dir, **options)
        labelled = config.labels == "given" or config.test_labels
        where, splits = read_tables(data_dir, config, cache_dir, labelled)
        if streaming:
            splits = LazySplits(splits, lambda name, split: split.to_iterable_dataset())
        if config.test_labels and choose_layout(splits, config, where) != "classes":
            raise DataError(f"test_labels splits classes off, but {where} already says which rows test: leave it out")
        result = split_given(splits, config, where) if labelled else split_unlabelled(splits, config, where)
        sides = {name: _paths(split) for name, split in result.items() if name != "gallery" or not config.seen}
        say_shared_files(where, sides.pop("train"), itertools.chain(*sides.values()))
        return result


def read_tables(
    place: Any, config: TableImagesConfig, cache_dir: str | None = None, labelled: bool = True
) -> tuple[str, Mapping[str, datasets.Dataset]]:
    """Read what a place holds.

    Args:
        place: As `data_dir` of `TableImages`.
        config: Options.
        cache_dir: Where Parquet files are unpacked to; by default where `datasets` keeps its tables.
        labelled: Refuse tables without a column of classes, and rows without a class.

    Returns:
        What it is, and per split (`train` for all rows where nothing says another) a data set with the columns
        `image`, `label` (if there is one) and the others.

    Raises:
        DataError: see `TableImages.load_splits`.
    """
    if hasattr(place, "columns"):
        table = _of_frame(place, config)
        return table.name, table.splits(config, labelled)
    kind, path = table_kind(place), usable_path(place).absolute()
    if kind in ("saved", "parquet"):
        found = _load_folder(kind, path, cache_dir)
        return str(path), LazySplits(
            found,
            lambda name, split: _joined(_Table(f"{path}, split {name}", path, split).splits(config, labelled), name),
        )
    if kind == "file":
        table = _of_file(path, config, cache_dir)
        return str(path), table.splits(config, labelled)
    files = metadata_files(path)
    tables = {name: _of_file(file, config, cache_dir, in_folders=True) for name, file in files.items()}
    if "" in tables:
        splits = tables[""].splits(config, labelled)
    else:
        splits = {name.lower(): _joined(table.splits(config, labelled), name) for name, table in tables.items()}
    _say_unlisted(path, splits, files.values())
    return str(path), splits


def table_splits(rows: datasets.Dataset, config: TableImagesConfig, where: str) -> dict[str, datasets.Dataset]:
    """[`read_tables`] of rows that are there already; they hold their images, and need no classes."""
    return _Table(where, Path(), rows).splits(config, labelled=False)


def _say_unlisted(folder: Path, splits: Mapping[str, datasets.Dataset], metadata: Iterable[Path]) -> None:
    """Say which images of a folder its metadata don't name, and what other files it has."""
    left_out = LeftOut()
    images = list_images(folder, left_out)
    left_out.endings -= Counter(file.suffix.lower() for file in metadata)
    left_out.say(folder)
    named = {image["path"] for split in splits.values() for image in _values(split, "image")}
    rest = [file.path for file in images if str(folder / file.path) not in named]
    if rest:
        logger.warning("%s: %d images are not named in the metadata, left out: %s", folder, len(rest), some(rest))


def _root(given: str) -> Path:
    try:
        return usable_path(given).absolute()
    except DataError as error:
        raise DataError(f"image_root must be a path: {error}") from error


def _joined(splits: dict[str, datasets.Dataset], name: str) -> datasets.Dataset:
    """Rows of a table that is the split `name` itself."""
    if len(splits) > 1:
        raise DataError(f"expected one split per table, got {some(list(splits))}")
    ((role, rows),) = splits.items()
    if role not in ("train", name.lower()):  # `train` also where no column says it
        raise DataError(f"the table of the split {name!r} has a column that says it is {role!r}")
    return rows


def _load_folder(kind: str, path: Path, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    try:
        if kind == "saved":
            return load_saved(str(path))
        with quiet_progress(True):
            return dict(datasets.load_dataset(str(path), cache_dir=cache_dir))
    except Exception as error:  # a damaged file, an unknown version: many types
        raise DataError(f"can't load the data set {path} ({type(error).__name__}: {error})") from error


@dataclass
class _Table:
    """Rows as they were read.

    Attributes:
        name: For errors.
        root: Folder that paths are relative to.
        rows: All columns.
        place: Says where a row is; None for its number.
        in_folders: Whether the folders that images lie in say class and split where no column does.
    """

    name: str
    root: Path
    rows: datasets.Dataset
    place: Callable[[int], str] | None = None
    in_folders: bool = False

    def where(self, row: int) -> str:
        return f"{self.name}, row {row}" if self.place is None else self.place(row)

    def splits(self, config: TableImagesConfig, labelled: bool) -> dict[str, datasets.Dataset]:
        columns = self.rows.column_names
        image = image_column_of(self.rows.features, config, self.name)
        label = choose_column("label_column", config.label_column, columns, LABEL_NAMES, self.name)
        split = self._split_column(config)
        rows = self.rows
        paths = self._texts(image) if _is_text(rows.features[image]) else None
        folders = self._of_folders(paths) if self.in_folders and paths is not None else {}
        roles = self._roles(split) if split is not None else folders.get("split")
        if split is not None:
            rows = rows.remove_columns(split)
        if label is not None:
            self._check_labels(rows, label, labelled)
        elif "label" in folders:
            rows = rows.add_column("label", folders["label"])
            label = "label"
        rows = self._with_images(rows, image, paths, config)
        rows = named_columns(rows, config, self.name, image, label, labelled)
        if roles is None:
            return {"train": rows}
        places: dict[str, list[int]] = {}
        for row, role in enumerate(roles):
            places.setdefault(role, []).append(row)
        return {role: rows.select(chosen) for role, chosen in places.items()}

    def _texts(self, column: str) -> list:
        feature = self.rows.features[column]
        values = _values(self.rows, column)
        return feature.int2str(values) if isinstance(feature, datasets.ClassLabel) else values

    def _split_column(self, config: TableImagesConfig) -> str | None:
        """The column that says the split; one that is only called so, and holds nothing but other words, is none."""
        column = choose_column("split_column", config.split_column, self.rows.column_names, SPLIT_NAMES, self.name)
        if column is None or config.split_column is not None:
            return column
        values = self._texts(column)
        others = [row for row, value in enumerate(values) if not split_folders([str(value).strip()])]
        if len(others) == len(values):
            return None
        if others:
            raise DataError(
                f"{self.where(others[0])}: the column {column!r} holds {values[others[0]]!r} beside names of splits; "
                "expected train, test or another split everywhere, or split_column naming the column that says it"
            )
        return column

    def _roles(self, column: str) -> list[str]:
        roles = [None if value is None else str(value).strip() for value in self._texts(column)]
        if "" in roles or None in roles:
            row = next(i for i, role in enumerate(roles) if not role)
            raise DataError(
                f"{self.where(row)}: the column {column!r} is empty; expected train, test or another split"
            )
        return [role.lower() for role in roles]

    def _of_folders(self, paths: Sequence[str | None]) -> dict[str, list[str]]:
        """Class and split of each image by its place, where all have one."""
        paths = [posixpath.normpath((path or "").replace("\\", "/")) for path in paths]
        splits = split_folders({path.split("/")[0] for path in paths if "/" in path})
        classes = [class_of_path(path, splits) for path in paths]
        found = {} if None in classes else {"label": classes}
        return found | ({"split": [path.split("/")[0].lower() for path in paths]} if splits else {})

    def _check_labels(self, rows: datasets.Dataset, label: str, labelled: bool) -> None:
        feature = rows.features[label]
        if _is_text(feature):
            for row, value in enumerate(_values(rows, label)):
                if labelled and (value is None or not value.strip()):
                    raise DataError(f"{self.where(row)}: the label ({label!r}) is empty; expected the name of a class")
                check_class_name(value, f"{self.where(row)}: the column {label!r}", may_lack=not labelled)
        elif isinstance(feature, datasets.Value) and "int" in feature.dtype:  # those with names: where all labels are
            for row, value in enumerate(_values(rows, label)):
                if value is not None:
                    check_label(value, None, f"{self.where(row)}: the column {label!r}")

    def _with_images(self, rows, image: str, paths: list | None, config: TableImagesConfig) -> datasets.Dataset:
        """The rows with files or contents in the column `image`, as `datasets.Image` has them."""
        feature = rows.features[image]
        if config.image_root is not None and paths is None:
            raise DataError(
                f"{self.name}: image_root {config.image_root!r} is for paths, but the column {image!r} holds images"
            )
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
            rows = rows.cast_column(image, datasets.Image(decode=False))
            self._check_stored(rows, image)
            return rows
        if paths is not None:
            root = self.root if config.image_root is None else _root(config.image_root)
            stored: Any = [{"path": path, "bytes": None} for path in self._files(paths, root)]
        elif isinstance(feature, datasets.Value) and "binary" in feature.dtype:
            stored = self._contents(rows, image)
        else:
            raise DataError(f"{self.name}: the column {image!r} must hold paths or contents of images, got {feature}")
        fingerprint = None  # of the values; those of a file on disk, which may be gigabytes, are known by their file
        if paths is None and rows.cache_files:
            fingerprint = hashlib.sha256(f"{self.name} {len(rows)} {rows.cache_files}".encode()).hexdigest()[:16]
        order = rows.column_names
        before = f"{image} before"  # removed last: a table without a column would have no rows
        rows = rows.rename_column(image, before).add_column(
            image, stored, new_fingerprint=fingerprint, feature=datasets.Image(decode=False)
        )
        return rows.select_columns(order)

    def _check_stored(self, rows: datasets.Dataset, image: str) -> None:
        """Look whether every row has contents, or a file that is there."""
        missing = []
        column = rows.with_format("arrow", columns=[image])[:].column(image)
        has_bytes = [known for chunk in column.chunks for known in chunk.field("bytes").is_valid().to_pylist()]
        for row, path in enumerate(path for chunk in column.chunks for path in chunk.field("path").to_pylist()):
            if has_bytes[row]:
                continue
            if not path:
                raise DataError(f"{self.where(row)}: there is no image in the column {image!r}")
            if not os.path.isfile(path):  # noqa: PTH113 (that of Path raises where a name is too long)
                missing.append((path, self.where(row)))
        if missing:
            raise DataError(missing_text(*zip(*missing, strict=True), len(rows), self.name))

    def _contents(self, rows: datasets.Dataset, image: str) -> pa.ChunkedArray:
        """Contents with the name of their row; nothing is copied."""
        chunks, start = [], 0
        for chunk in rows.with_format("arrow", columns=[image])[:].column(image).chunks:
            lengths = pc.fill_null(pc.binary_length(chunk), 0).to_pylist()
            if 0 in lengths:
                raise DataError(f"{self.where(start + lengths.index(0))}: the image ({image!r}) is empty")
            names = [f"{Path(self.name).name} row {start + row}" for row in range(len(chunk))]
            names = names if self.place is None else [self.where(start + row) for row in range(len(chunk))]
            chunk = chunk.cast(pa.binary()) if not pa.types.is_binary(chunk.type) else chunk
            chunks.append(pa.StructArray.from_arrays([chunk, pa.array(names)], ["bytes", "path"]))
            start += len(chunk)
        return pa.chunked_array(chunks)

    def _files(self, paths: Sequence[str | None], root: Path) -> list[str]:
        """The absolute path of every row's file."""
        found, seen, missing = [], {}, []
        for row, path in enumerate(paths):
            if path is None or not path.strip():
                raise DataError(f"{self.where(row)}: the image has no path")
            if len(path.splitlines()) > 1:
                raise DataError(
                    f"{self.where(row)}: the path {shortened(path)} has a line break (a quotation mark too many?)"
                )
            if "://" in path:
                raise DataError(
                    f"{self.where(row)}: {path!r} is an address; expected a file (download the images first)"
                )
            # functions of os.path, as those of Path raise where there is no such user, or a name is too long
            name = os.path.normpath(root / os.path.expanduser(path))  # noqa: PTH111
            if not os.path.isfile(name) and "\\" in path:  # noqa: PTH113
                name = os.path.normpath(root / path.replace("\\", "/"))
            if not os.path.isfile(name):  # noqa: PTH113
                missing.append(row)
            if name in seen:
                raise DataError(f"{self.where(row)}: the image {path!r} was named before, at {self.where(seen[name])}")
            seen[name] = row
            found.append(name)
        if missing:
            names, places = [paths[row] for row in missing], [self.where(row) for row in missing]
            hint = other_form(os.path.normpath(root / names[0]))
            text = missing_text(names, places, len(paths), self.name)
            raise DataError(f"{text}; paths are relative to {root}{hint}")
        return found


def _paths(split: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
    """Paths of the images that are files; nothing is read where the first one is none."""
    if isinstance(split, datasets.Dataset):
        column = split.with_format("arrow", columns=["image"])[:].column("image")
        for chunk in column.chunks:
            stored = chunk.field("bytes").is_valid().to_pylist()
            paths = chunk.field("path").to_pylist()
            yield from (path for path, inside in zip(paths, stored, strict=True) if path and not inside)
        return
    images = (row["image"] for row in split.select_columns(["image"]))
    yield from (image["path"] for image in itertools.takewhile(lambda image: image["bytes"] is None, images))


def _values(rows: datasets.Dataset, column: str) -> list:
    return rows.with_format("arrow", columns=[column])[:].column(column).to_pylist()


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and "string" in feature.dtype


# ---- reading


def _of_file(path: Path, config: TableImagesConfig, cache_dir: str | None, in_folders: bool = False) -> _Table:
    if path.suffix.lower() in (".parquet", ".arrow"):
        return _Table(str(path), path.parent, _read_arrow(path, cache_dir), in_folders=in_folders)
    text = read_text_table(path)
    rows = _as_rows(text.columns, config, text.name, text.place, typed=path.suffix.lower() in (".csv", ".tsv"))
    return _Table(text.name, text.root, rows, text.place, in_folders)


def _read_arrow(path: Path, cache_dir: str | None) -> datasets.Dataset:
    try:
        if path.suffix.lower() == ".parquet":
            with quiet_progress(True):
                rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache_dir)
        else:
            with contextlib.closing(pa.memory_map(str(path))) as stream:
                is_file = stream.read(6) == b"ARROW1"
            if is_file:
                rows = datasets.Dataset(
                    datasets.table.InMemoryTable(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
                )
            else:
                rows = datasets.Dataset.from_file(str(path))
    except Exception as error:  # damaged files: many types
        raise DataError(f"{path} can't be read ({type(error).__name__}: {error.__cause__ or error})") from error
    if not len(rows):
        raise DataError(f"{path} has no rows")
    return rows


def _of_frame(frame: Any, config: TableImagesConfig) -> _Table:
    if not len(frame):
        raise DataError("the DataFrame has no rows")
    names = list(map(str, frame.columns))
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise DataError(f"the DataFrame: each column must have a name of its own, got {some(twice)} several times")
    columns = {str(name): frame[name].tolist() for name in frame.columns}
    root, name = Path.cwd(), "DataFrame"
    rows = _as_rows(columns, config, name, lambda row: f"{name}, row {row}")
    return _Table(name, root, rows)


def _as_rows(columns: dict[str, list], config, name: str, place: Callable[[int], str], typed: bool = False):
    """Lists of values as a data set: images, classes and splits as text (or contents), others as they are."""
    names = list(columns)
    chosen = [
        choose_column("image_column", config.image_column, names, IMAGE_NAMES, name),
        choose_column("label_column", config.label_column, names, LABEL_NAMES, name),
        choose_column("split_column", config.split_column, names, SPLIT_NAMES, name),
    ]
    kept: dict[str, list] = {}
    _check_unicode(names, lambda row: f"{name}: the name of a column")
    for column, values in columns.items():
        if column == chosen[0] and any(isinstance(value, (bytes, Path)) for value in values):
            kept[column] = [str(value) if isinstance(value, Path) else value for value in values]
        elif column in chosen:
            kept[column] = [_text(value, column, place(row)) for row, value in enumerate(values)]
        elif typed:
            kept[column] = typed_column(values)
        else:
            kept[column] = alike_column(values, column, name, place)
        if column not in chosen:
            say_mixed(values, kept[column] or (), column, place, typed)
        _check_unicode(kept[column] or (), lambda row, column=column: f"{place(row)}: the column {column!r}")
    return datasets.Dataset.from_dict({name: values for name, values in kept.items() if values is not None})


def _check_unicode(values: Iterable[Any], place: Callable[[int], str]) -> None:
    """Refuse half of a surrogate pair, which JSON may hold and no table can."""
    for row, value in enumerate(values):
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise DataError(f"{place(row)} holds {shortened(value)}, which is not valid Unicode") from None


def _text(value: Any, column: str, place: str) -> str | None:
    """An image's path, a class or a split; whole numbers are written out."""
    try:
        value = plain_value(value)
    except TypeError as error:
        raise DataError(f"{place}: the column {column!r} must hold text, got {type(value).__name__}") from error
    if isinstance(value, float):
        raise DataError(f"{place}: the column {column!r} must hold text, got the number {value!r}")
    return None if value is None else str(value).strip()
