"""Images to embed out of buckets and tar files: folders, WebDataset shards and Parquet files at an address or a path.

    storage_source("s3://bucket/photos")
    storage_source("/data/shards")  # tar files

What is read is what a worker asks for: an image of a folder is a file, one of a tar file a range of its bytes, one of
a Parquet file a row of a row group. Nothing is unpacked, and nothing needs a disk that all machines share.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import logging
import posixpath
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data_scripts.archives import MAX_MEMBER_BYTES, kind_of_head, walk_tar
from ..data_scripts.data_errors import DataError, some
from ..data_scripts.image_files import LeftOut, is_image_name
from ..data_scripts.labels import check_class_name
from ..data_scripts.storage import Storage
from ..data_scripts.table_columns import alike_column, free_name
from ..files.json_files import without_duplicates
from .image_sources import ImageSource, classes_of_places, labels_of_names, say_one_class
from .table_sources import TABLE_COLUMN_OPTIONS, check_table_options, source_of_splits


logger = logging.getLogger(__name__)

TAR, PARQUET = ".tar", ".parquet"
_THREADS = 8
_CLASS, _FIELDS, _TEXT = ".cls", ".json", ".txt"  # what WebDataset calls what is known of a sample
_MAX_FIELDS_BYTES = 1 << 20
_MAX_GROUP_BYTES = 1 << 31


def storage_source(place, **options):
    """All images at an address, or in tar files.

    A folder has the ids and classes of [`folder_source`] on a copy of it.

    Of tar files (WebDataset shards, not compressed) every member that is an image is one. Its id is
    `<shard>/<member>`, or the member's name where the place is the tar file itself. Its class is what the member
    `<key>.cls` says or, where there are none of those, the first folder in the shard; texts and numbers of
    `<key>.json` and the text of `<key>.txt` go along as columns.

    Parquet files hold their images (`image`, as `datasets` writes it, or a column of bytes), and their columns are
    those of a table.

    Args:
        place: Address or path of a folder or a file; what a folder holds decides: images, tar files or Parquet.
        **options: `image_column`, `label_column` and `split_column`, of Parquet only.

    Raises:
        DataError: nothing is there or can't be read, a tar file is damaged or compressed, or an option doesn't apply.
    """
    storage = Storage.open(place)
    files = storage.files()
    kinds = {kind: [file for file in files if is_kind(storage, file)] for kind, is_kind in _KINDS.items()}
    kind = next((kind for kind, found in kinds.items() if found), None)
    if kind is None:
        raise DataError(
            f"{storage.address} must be a folder of images, tar files or Parquet files, or one such file (tables and "
            f"lists of other kinds are read from a disk), got {some(file.path or storage.address for file in files)}"
        )
    if options and kind != "parquet":
        raise DataError(f"{', '.join(options)}: {storage.address} is no table; all of its images are taken")
    left_out = LeftOut()
    left_out.add(posixpath.basename(file.path) for file in files if file not in kinds[kind])
    if images := [file for file in files if kind != "images" and is_image_name(posixpath.basename(file.path))]:
        logger.warning("%s: %d images beside %s files, left out", storage.address, len(images), kind)
    if kind != "tar" or files[0].path:
        left_out.say(storage.address)
    return _SOURCES[kind](storage, kinds[kind], **options)


def _ends(*endings):
    return lambda storage, file: (file.path or storage.root).lower().endswith(endings)


# The first kind of which there is a file decides
_KINDS = {
    "images": lambda storage, file: is_image_name(posixpath.basename(file.path)),
    "tar": _ends(TAR, ".tgz", ".tar.gz"),
    "parquet": _ends(PARQUET),
}


# ---- A folder


class _StorageFiles(NamedTuple):
    """`ImageSource.stored` of files at an address; picklable, as workers need it."""

    storage: Storage
    paths: list[str]

    def __call__(self, row):
        return self.storage.read(self.paths[row])

    def chosen(self, rows):
        return self._replace(paths=[self.paths[row] for row in rows])


def _folder(storage, files):
    paths = [file.path for file in files]
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    labels, class_names = classes_of_places(paths, folders, storage.address)
    stored = _StorageFiles(storage, paths)
    source = ImageSource(paths, labels, class_names, stored, f"images in {storage.address}")
    say_one_class(source, storage.address)
    return source


# ---- Tar files


class _TarMembers(NamedTuple):
    """`ImageSource.stored` of members of tar files: which file, where its bytes begin, and how many there are."""

    storage: Storage
    places: list[tuple[str, int, int]]

    def __call__(self, row):
        return self.storage.read(*self.places[row])

    def chosen(self, rows):
        return self._replace(places=[self.places[row] for row in rows])


class _Sample(NamedTuple):
    """An image of a tar file: its id, its name there, where it lies, and what its key's other members say."""

    name: str
    member: str
    place: tuple[str, int, int]
    known: dict


def _tars(storage, files):
    left_out = LeftOut()
    with ThreadPoolExecutor(_THREADS) as threads:
        shards = list(threads.map(lambda file: _samples(storage, file, left_out), files))
    left_out.say(storage.address)
    samples = [sample for shard in shards for sample in shard]
    ids = [sample.name for sample in samples]
    labels, class_names = _classes(storage, samples)
    stored = _TarMembers(storage, [sample.place for sample in samples])
    columns = {}
    for field in dict.fromkeys(field for sample in samples for field in sample.known if field != _CLASS):
        values = alike_column([sample.known.get(field) for sample in samples], field, storage.address, ids.__getitem__)
        if values is not None:
            columns[free_name(field)] = values
    return ImageSource(ids, labels, class_names, stored, f"images in {storage.address}", columns=columns)


def _samples(storage, file, left_out):
    """The images of a tar file, in its order."""
    where = storage.place(file.path)
    kind = kind_of_head(storage.read(file.path, 0, min(file.size, 512)), where)
    if kind != "tar":
        raise DataError(f"{where} must be an uncompressed tar file, whose members can be read one by one, got {kind}")
    images, known, others = [], {}, []
    with storage.stream(file.path) as raw:
        for member in walk_tar(raw, kind, file.size, where, lambda name: PurePosixPath(name).suffix in _READERS):
            key, suffix = _key(member.name), PurePosixPath(member.name).suffix
            if member.content is not None:
                fields = known.setdefault(key, {})
                _READERS[suffix](fields, member.content, f"{where}: {member.name}")
            elif not is_image_name(posixpath.basename(member.name)):
                others.append(posixpath.basename(member.name))
            elif member.offset is None or member.size > MAX_MEMBER_BYTES:
                raise DataError(f"{where}: the member {member.name!r} is not stored in one piece")
            else:
                images.append((key, member.name, (file.path, member.offset, member.size)))
    left_out.add(others)
    if without := sorted(known.keys() - {key for key, *_ in images}):
        logger.warning("%s: %d samples have no image, left out: %s", where, len(without), some(without))
    prefix = f"{file.path[: -len(TAR)]}/" if file.path else ""
    return [_Sample(prefix + name, name, place, known.get(key, {})) for key, name, place in images]


def _key(name):
    """What the members of a sample share: all up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _read_class(fields, content, where):
    name = _text_of(content, where).strip()
    check_class_name(name, where, may_lack=True)
    fields[_CLASS] = name or None


def _read_fields(fields, content, where):
    try:
        found = json.loads(_text_of(content, where), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} must hold a JSON object, got a {type(found).__name__}")
    _add(fields, found, where)


def _read_caption(fields, content, where):
    _add(fields, {"text": _text_of(content, where)}, where)


def _add(fields, found, where):
    if twice := fields.keys() & found.keys():
        raise DataError(f"{where}: {some(sorted(twice))} of this sample is there twice")
    fields.update(found)


def _text_of(content, where):
    if len(content) > _MAX_FIELDS_BYTES:
        raise DataError(f"{where} has {len(content):,} bytes, more than {_MAX_FIELDS_BYTES:,}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not valid UTF-8") from error


_READERS = {_CLASS: _read_class, _FIELDS: _read_fields, _TEXT: _read_caption}


def _classes(storage, samples):
    """By the samples' members `.cls`; where there are none, by the folders in the tar files."""
    if not any(_CLASS in sample.known for sample in samples):
        members = [sample.member for sample in samples]
        folders = {member.partition("/")[0] for member in members if "/" in member}
        return classes_of_places(members, folders, storage.address, [sample.name for sample in samples])
    classes = [sample.known.get(_CLASS) for sample in samples]
    names = set(classes) - {None}
    class_names = sorted(names, key=int) if all(map(str.isdecimal, names)) else sorted(names)
    return labels_of_names(classes, class_names), class_names


# ---- Parquet files


def _parquet(storage, files, **options):
    from ..data_scripts.tables import TableImagesConfig, table_splits

    check_table_options(options)
    if unknown := set(options) & {"image_root"} | set(options) - TABLE_COLUMN_OPTIONS:
        raise DataError(f"{', '.join(sorted(unknown))}: {storage.address} holds its images")
    config = TableImagesConfig(**options)
    tables, groups, first = [], [], 0
    for file in files:
        with storage.input_file(file.path) as stream, _opened(storage, file, stream) as parquet:
            image = _image_column(storage, file, parquet, config)
            tables.append(_without_images(parquet, image, first))
            for group in range(parquet.num_row_groups):
                groups.append((file.path, group, first))
                first += parquet.metadata.row_group(group).num_rows
    try:
        rows = pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"{storage.address}: the Parquet files have different columns: {error}") from error
    if not len(rows):
        raise DataError(f"{storage.address} has no rows")

    def stored(table, description):
        numbers = [int(row["bytes"]) for row in table.with_format("arrow")[:].column("image").to_pylist()]
        return _ParquetRows(storage, groups, image, numbers)

    import datasets

    splits = table_splits(datasets.Dataset(datasets.table.InMemoryTable(rows)), config, storage.address)
    return source_of_splits(splits, storage.address, stored_of=stored)


def _opened(storage, file, stream):
    try:
        return pq.ParquetFile(stream)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{storage.place(file.path)} can't be read: {error}") from error


def _image_column(storage, file, parquet, config):
    import datasets

    from ..data_scripts.given_splits import image_column_of

    where, schema = storage.place(file.path), parquet.schema_arrow
    image = image_column_of(datasets.Features.from_arrow_schema(schema), config, where)
    kind = schema.field(image).type
    stored = pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    if not stored and not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        raise DataError(f"{where}: the column {image!r} must hold the images' contents at such a place, got {kind}")
    return image


def _without_images(parquet, image, first):
    """The rows of a file with their numbers in place of the images' contents, which stay where they are."""
    schema = parquet.schema_arrow
    kind = schema.field(image).type
    numbers = pa.array([str(first + row).encode() for row in range(parquet.metadata.num_rows)], pa.binary())
    others = [name for name in schema.names if name != image]
    if pa.types.is_struct(kind):
        rows = parquet.read([f"{image}.path", *others])
        paths = rows.column(image).combine_chunks().field("path").cast(pa.string())
        numbers = pa.StructArray.from_arrays([numbers, paths], ["bytes", "path"])
        kind = numbers.type
    else:
        rows = parquet.read(others)
    columns = [numbers.cast(kind) if name == image else rows.column(name) for name in schema.names]
    fields = [field.with_type(kind) if field.name == image else field for field in schema]
    return pa.table(columns, pa.schema(fields, schema.metadata))


class _ParquetRows:
    """`ImageSource.stored` of rows of Parquet files; picklable. It keeps the row groups that it has read last.

    Args:
        storage: Where the files are.
        groups: Of every row group: the file, its number there, and the number of its first row among all.
        column: Of the images.
        rows: Numbers of the rows.
    """

    def __init__(self, storage, groups, column, rows):
        self.storage, self.groups, self.column, self.rows = storage, groups, column, rows
        self._starts = np.array([start for *_, start in groups])
        self._kept = {}
        self._reading = threading.Lock()

    def __reduce__(self):
        return type(self), (self.storage, self.groups, self.column, self.rows)

    def __call__(self, row):
        number = self.rows[row]
        group = bisect_right(self._starts, number) - 1
        with self._reading:
            if group not in self._kept:
                self._kept = dict([*self._kept.items()][-1:])  # the one before, as threads run a little ahead
                self._kept[group] = self._read(group)
            image = self._kept[group][number - self.groups[group][-1]].as_py()
        content = image["bytes"] if isinstance(image, dict) else image
        if not content:
            raise DataError(f"{self.storage.address}: there is no image in row {number}")
        return content

    def chosen(self, rows):
        numbers = [self.rows[row] for row in rows]
        last = bisect_right(self._starts, max(numbers))
        first = bisect_right(self._starts, min(numbers)) - 1
        return _ParquetRows(self.storage, self.groups[first:last], self.column, numbers)

    def _read(self, group):
        name, number, _ = self.groups[group]
        where = f"{self.storage.place(name)}, row group {number}"
        try:
            with (
                self.storage.input_file(name) as stream,
                pq.ParquetFile(stream, page_checksum_verification=True) as file,
            ):
                if (size := file.metadata.row_group(number).total_byte_size) > _MAX_GROUP_BYTES:
                    raise DataError(
                        f"{where} has {size:,} bytes, more than the {_MAX_GROUP_BYTES:,} that are read at a time: "
                        "write the file with smaller row groups, such as 1,000 rows"
                    )
                names = [column for column in _leaves(file) if column in (self.column, f"{self.column}.bytes")]
                return file.read_row_group(number, names).column(0).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{where} can't be read: {error}") from error


def _leaves(file):
    return [file.schema.column(i).path for i in range(len(file.schema.names))]


_SOURCES = {"images": _folder, "tar": _tars, "parquet": _parquet}

__all__ = ["TAR", "storage_source"]
