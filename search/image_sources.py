"""Where images to embed come from: what a source is, and those of a folder and of a list of files.

Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data_scripts.class_folders import class_of_path, say_loose, split_folders, splits_in_classes, visible_folders
from ..data_scripts.data_errors import DataError, some
from ..data_scripts.data_fingerprint import content_digest
from ..data_scripts.image_files import has_images, list_images
from ..data_scripts.image_names import common_root
from ..data_scripts.labels import check_labels
from ..data_scripts.paths import other_form, usable_path
from ..data_scripts.table_columns import check_column
from ..data_scripts.table_files import listed_paths


logger = logging.getLogger(__name__)

_HASHING_THREADS = 8


@dataclass
class ImageSource:
    """Images in a fixed order.

    Attributes:
        ids: n different texts: the path relative to `image_root` where there is one, else a name in the data set.
        labels: `(n,)` int64 in 0..C-1; a masked array of numpy, masked where no class is known.
        class_names: Position = label.
        stored: `stored(row)` gives what holds an image (path or contents).
        description: One line on what this is.
        image_root: Folder that the ids are relative to; None where the images are in no folder.
        columns: What else is known of the images, as a price or a title: per name n values in the order of the ids,
            each a text, an integer, a float or None where there is none. No name is one of
            `table_columns.RESERVED_COLUMNS`.

    Raises:
        DataError: there are no images, two have the same id, an id or class is not valid UTF-8, a label is none of
            0..C-1, or a column has another length, another kind of value or a reserved name.
    """

    ids: list[str]
    labels: np.ma.MaskedArray
    class_names: list[str]
    stored: Callable[[int], str | bytes]
    description: str
    image_root: str | None = None
    columns: dict[str, list[str | int | float | None]] = field(default_factory=dict)

    def __post_init__(self):
        if not self.ids:
            raise DataError(f"{self.description}: there are no images")
        twice = [name for name, count in Counter(self.ids).items() if count > 1]
        if twice:
            raise DataError(f"{self.description}: each image must be there once, got several of {some(twice)}")
        for name in [*self.ids, *self.class_names]:
            if not name.isascii() and name != name.encode(errors="replace").decode():
                raise DataError(f"{self.description}: {name!r} is not valid UTF-8, and can't be stored: rename it")
        check_labels(np.ma.filled(self.labels, 0), max(len(self.class_names), 1), self.description)
        self.labels = np.ma.asarray(self.labels, dtype=np.int64)
        for name, values in self.columns.items():
            check_column(name, values, len(self.ids), self.description)

    def __len__(self):
        return len(self.ids)

    def class_name(self, row):
        """Name of the class of a row, empty if it has none."""
        label = self.labels[row]
        return "" if label is np.ma.masked else self.class_names[label]

    def select(self, rows, description, **changes):
        """A source of some of the images, in this order.

        Args:
            rows: Their rows.
            description: One line on what they are.
            **changes: Other attributes that the new source has, `labels` with `class_names` say.
        """
        kept = {
            "ids": [self.ids[row] for row in rows],
            "labels": self.labels[rows],
            "stored": chosen_rows(self.stored, rows),
            "columns": {name: [values[row] for row in rows] for name, values in self.columns.items()},
        }
        return dataclasses.replace(self, description=description, **{**kept, **changes})

    def fingerprint(self, progress=lambda iterable, total: iterable, contents=None):
        """Digest of the data: columns, ids, classes and all bytes of all images, in order.

        It reads every file once (about a second per gigabyte, beside what the disk takes), so it knows a changed image
        whatever its date says, and knows an unchanged one on another machine.

        Args:
            progress: Wraps the iteration over the rows, for a progress bar.
            contents: `content_digest` of each image, in order, where somebody else has read them; None: read here.

        Returns:
            64 hexadecimal digits.

        Raises:
            DataError: a file can't be read; the message names it.
        """
        digest = hashlib.blake2b(digest_size=32)
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            if self.columns:
                digest.update(json.dumps(self.columns).encode())
            contents = threads.map(self._content_digest, range(len(self))) if contents is None else contents
            rows = zip(range(len(self)), contents, strict=True)
            for row, content in progress(rows, len(self)):
                digest.update(f"{self.ids[row]}\0{self.class_name(row)}\0{self.labels[row]}\0".encode())
                digest.update(content)
        return digest.hexdigest()

    def _content_digest(self, row):
        return content_digest(self.stored(row))


def folder_source(folder):
    """All images in a folder, however deep; the class of each is the first folder below it, as in training.

    Where the folder holds splits (`train` and `test`, say), the class is the first folder below the split's. Images
    that lie beside the class folders have no class, as in training, which leaves them out; here a warning names them.

    Raises:
        DataError: there is no such folder, it can't be read, or holds no images.
    """
    folder = usable_path(folder).absolute()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    source = _file_source([file.path for file in list_images(folder)], folder, folder, f"images in {folder}")
    say_one_class(source, folder)
    return source


def say_one_class(source, folder):
    """Say of a source of a folder that the class folders may be further down, which a training run refuses."""
    below = {parts[1] for parts in (name.split("/") for name in source.ids) if len(parts) > 2}
    if len(source.class_names) == 1 and len(below) > 1 and not source.labels.mask.any():
        (name,) = source.class_names
        logger.warning("%s: all images are of the class %r, its only folder; if the classes are %s, give %s", folder,
                       name, some(sorted(below)), f"{folder}/{name}")  # fmt: skip


def list_source(path):
    """The images that a text file names, one path per line, relative to the file's own folder.

    The class of each is the one that training would give it: on the way from the list's own folder down to the images,
    the first folder with images in several folders is that of the class folders (the description speaks of it).
    Without such a folder it is the deepest one that holds all images; where some lie in that folder itself, and it
    isn't the list's own, it is a class folder. Empty lines and lines that begin with `#` are passed over.

    Raises:
        DataError: the list or a file in it is not there, or the list names none or one twice.
    """
    path = usable_path(path).absolute()
    try:
        paths, _ = listed_paths(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of images {path} can't be read: {error}") from error
    files = [os.path.normpath(path.parent / line) for line in paths]
    missing = [file for file in files if not os.path.isfile(file)]  # noqa: PTH113 (that of Path raises where a name is too long)
    if missing:
        shown = some(file if len(file) < 200 else f"{file[:100]}...{file[-50:]}" for file in missing)
        raise DataError(f"{path} names {len(missing)} files that are not there: {shown}{other_form(missing[0])}")
    root = common_root(files, path.parent)
    class_root = common_root(files) or path.parent
    if class_root != path.parent and any(Path(file).parent == class_root for file in files):
        class_root = class_root.parent
    class_root = _first_with_classes(Path(os.path.normpath(path.parent)), class_root)
    where = "" if class_root == path.parent else f", classes are the folders in {class_root}"
    paths = [Path(file).relative_to(root).as_posix() for file in files]
    return _file_source(paths, root, class_root, f"images listed in {path}{where}")


def _first_with_classes(top, bottom):
    """The first folder from `top` down to `bottom` with images in several of its folders; else `bottom`."""
    steps = [bottom, *bottom.parents]
    steps = steps[: steps.index(top) + 1] if top in steps else []
    for folder in reversed(steps[1:]):
        with_images = (name for name, path in visible_folders(folder).items() if has_images(path))
        if len(list(itertools.islice(with_images, 2))) == 2:
            return folder
    return bottom


def _file_source(paths, root, class_root, description):
    places = [Path(root, path).relative_to(class_root).as_posix() for path in paths]
    labels, class_names = classes_of_places(places, visible_folders(class_root) if paths else [], class_root, paths)
    return ImageSource(paths, labels, class_names, StoredFiles(str(root), paths), description, str(root))


def classes_of_places(places, folders, where, paths=None):
    """Labels and class names of images by the folders that they lie in, and words on what may not be meant.

    Args:
        places: Their paths from the folder of the class folders, or of the splits.
        folders: The names of all folders there.
        where: What that folder is called.
        paths: What the images are called; None: as their places.

    Returns:
        `(n,)` masked array of int64, and the names, position = label.
    """
    splits = split_folders(folders)
    classes = [class_of_path(place, splits) for place in places]
    class_names = sorted(set(classes) - {None})
    inside = {name: [] for name in class_names}
    for place, name in zip(places, classes, strict=True):
        if name is not None:
            inside[name].append(place.split("/", 2 if splits else 1)[-1])
    if joined := splits_in_classes(inside):
        logger.warning("%s: %s", where, joined)
    if class_names:
        paths = places if paths is None else paths
        loose = [path for path, name in zip(paths, classes, strict=True) if name is None]
        say_loose(where, loose, "the class folders and have no class")
    return labels_of_names(classes, class_names), class_names


def labels_of_names(classes, class_names):
    """`(n,)` masked array of int64, the positions of classes (None: masked) among their names."""
    numbers = {name: number for number, name in enumerate(class_names)}
    mask = [name is None for name in classes]
    return np.ma.array([numbers.get(name, 0) for name in classes], mask=mask, dtype=np.int64)


class StoredFiles(NamedTuple):
    """`ImageSource.stored` of files; picklable, as workers need it."""

    root: str
    paths: list[str]

    def __call__(self, row):
        return f"{self.root}/{self.paths[row]}"

    def chosen(self, rows):
        return self._replace(paths=[self.paths[row] for row in rows])


class GivenImages(NamedTuple):
    """`ImageSource.stored` of what is in memory."""

    images: list[str | bytes]

    def __call__(self, row):
        return self.images[row]


def chosen_rows(stored, rows):
    """`ImageSource.stored` of some rows, with as little of the others as can be: it may go to another machine."""
    return stored.chosen(rows) if hasattr(stored, "chosen") else ChosenRows(stored, rows)


class ChosenRows(NamedTuple):
    """`ImageSource.stored` of some rows; picklable, as workers need it."""

    stored: Callable[[int], str | bytes]
    rows: list

    def __call__(self, row):
        return self.stored(self.rows[row])

    def chosen(self, rows):
        return chosen_rows(self.stored, [self.rows[row] for row in rows])


class _JoinedRows(NamedTuple):
    """`ImageSource.stored` of several sources."""

    parts: list
    rows: list

    def __call__(self, row):
        part, place = self.rows[row]
        return self.parts[part](place)

    def chosen(self, rows):
        places, mine = {}, []
        for part, place in (self.rows[row] for row in rows):
            mine.append((part, len(places.setdefault(part, []))))
            places[part].append(place)
        numbers = {part: number for number, part in enumerate(places)}
        parts = [chosen_rows(self.parts[part], found) for part, found in places.items()]
        return _JoinedRows(parts, [(numbers[part], place) for part, place in mine])


def joined_source(parts, description):
    """Several sources as one: all splits of a data set. Images that two of them share are there once.

    Args:
        parts: Per split its [`ImageSource`]; those in folders have the same or no `image_root`.
        description: One line on what this is.

    Raises:
        DataError: an image has different classes in two splits.
    """
    parts = _without_copies(parts)
    if len(parts) == 1:
        (only,) = parts.values()
        return dataclasses.replace(only, description=description)
    roots = {part.image_root for part in parts.values()}
    root = os.path.commonpath(roots) if None not in roots else None
    twice = root is None and len({name for part in parts.values() for name in part.ids}) < sum(
        map(len, parts.values())
    )
    class_names = sorted({name for part in parts.values() for name in part.class_names})
    if len({tuple(part.class_names) for part in parts.values()}) == 1:
        class_names = next(iter(parts.values())).class_names  # in their own order
    column_names = list(dict.fromkeys(name for part in parts.values() for name in part.columns))
    rows, classes = {}, {}
    for number, (split, part) in enumerate(parts.items()):
        for row, name in enumerate(part.ids):
            key, own = f"{split}/{name}" if twice else name, part.class_name(row)
            if root is not None:
                key = Path(part.image_root, name).relative_to(root).as_posix()
            if classes.setdefault(key, own) != own:
                raise DataError(f"{description}: {key!r} is of the classes {classes[key]!r} and {own!r}")
            rows.setdefault(key, (number, row))
    sources = list(parts.values())
    numbers = {name: label for label, name in enumerate(class_names)}
    known = [classes[key] for key in rows]
    labels = np.ma.array([numbers.get(name, 0) for name in known], mask=[not name for name in known], dtype=np.int64)
    columns = {
        name: [None if name not in sources[n].columns else sources[n].columns[name][row] for n, row in rows.values()]
        for name in column_names
    }
    stored = _JoinedRows([source.stored for source in sources], list(rows.values()))
    return ImageSource(list(rows), labels, class_names, stored, description, root, columns)


def _without_copies(parts):
    """The parts, but for those that hold the same images as an earlier one, as a gallery may."""
    kept = {}
    for split, part in parts.items():
        if not any(part.ids == other.ids and part.image_root == other.image_root and split == "gallery"
                   for other in kept.values()):  # fmt: skip
            kept[split] = part
    return kept


__all__ = [
    "ChosenRows",
    "GivenImages",
    "ImageSource",
    "StoredFiles",
    "chosen_rows",
    "classes_of_places",
    "folder_source",
    "joined_source",
    "labels_of_names",
    "list_source",
    "say_one_class",
]
