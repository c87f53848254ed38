"""Where images to embed come from: a folder, a list of files, or a split of a data set; with ids and classes.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data_scripts.class_folders import class_of_path, say_loose, split_folders, visible_folders
from ..data_scripts.data_errors import DataError, some
from ..data_scripts.data_fingerprint import content_digest
from ..data_scripts.image_files import has_images, list_images
from ..data_scripts.labels import check_labels


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

    Raises:
        DataError: there are no images, two have the same id, an id or class is not valid UTF-8, or a label is none of
            0..C-1.
    """

    ids: list[str]
    labels: np.ma.MaskedArray
    class_names: list[str]
    stored: Callable[[int], str | bytes]
    description: str
    image_root: str | None = None

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

    def __len__(self):
        return len(self.ids)

    def class_name(self, row):
        """Name of the class of a row, empty if it has none."""
        label = self.labels[row]
        return "" if label is np.ma.masked else self.class_names[label]

    def fingerprint(self, progress=lambda iterable, total: iterable):
        """Digest of the data: ids, classes and all bytes of all images, in order.

        It reads every file once (about a second per gigabyte, beside what the disk takes), so it knows a changed image
        whatever its date says, and knows an unchanged one on another machine.

        Args:
            progress: Wraps the iteration over the rows, for a progress bar.

        Returns:
            64 hexadecimal digits.

        Raises:
            DataError: a file can't be read; the message names it.
        """
        digest = hashlib.blake2b(digest_size=32)
        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for row, content in enumerate(progress(threads.map(self._content_digest, range(len(self))), len(self))):
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
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return _file_source([file.path for file in list_images(folder)], folder, folder, f"images in {folder}")


def list_source(path):
    """The images that a text file names, one path per line, relative to the file's own folder.

    The class of each is the one that training would give it: on the way from the list's own folder down to the images,
    the first folder with images in several folders is that of the class folders (the description speaks of it).
    Without such a folder it is the deepest one that holds all images; where some lie in that folder itself, and it
    isn't the list's own, it is a class folder. Empty lines and lines that begin with `#` are passed over.

    Raises:
        DataError: the list or a file in it is not there, or the list names none or one twice.
    """
    path = Path(path).expanduser().absolute()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of images {path} can't be read: {error}") from error
    files = [os.path.normpath(path.parent / line) for line in lines if line and not line.startswith("#")]
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise DataError(f"{path} names {len(missing)} files that are not there: {some(missing)}")
    root = _common_root(files, path.parent)
    class_root = _common_root(files, None) or path.parent
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
    splits = split_folders([] if not paths else visible_folders(class_root))
    classes = [class_of_path(Path(root, path).relative_to(class_root).as_posix(), splits) for path in paths]
    class_names = sorted(set(classes) - {None})
    numbers = {name: number for number, name in enumerate(class_names)}
    known = [name is not None for name in classes]
    if class_names:
        loose = [path for path, name in zip(paths, classes, strict=True) if name is None]
        say_loose(class_root, loose, "the class folders and have no class")
    labels = np.ma.array([numbers.get(name, 0) for name in classes], mask=np.logical_not(known), dtype=np.int64)
    return ImageSource(paths, labels, class_names, _Files(str(root), paths), description, str(root))


class _Files(NamedTuple):
    """`ImageSource.stored` of files; picklable, as workers need it."""

    root: str
    paths: list[str]

    def __call__(self, row):
        return f"{self.root}/{self.paths[row]}"


class _TableRows(NamedTuple):
    """`ImageSource.stored` of rows of `datasets`."""

    table: object
    description: str

    def __call__(self, row):
        from ..data_scripts.torch_dataset import stored_image

        return stored_image(self.table[row]["image"], f"{self.description}, row {row}", "image")[0]


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
    table = (
        split.with_format(None).select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
    )
    arrow = table.with_format("arrow")[:]
    names = columns.class_names
    labels = check_labels(arrow.column("label"), None if names is None else len(names), description)
    images = arrow.column("image").chunks
    paths = [path for chunk in images for path in chunk.field("path").to_pylist()]
    on_disk = all(chunk.field("bytes").null_count == len(chunk) for chunk in images)
    class_names = names or [str(number) for number in range(int(labels.max(initial=-1)) + 1)]
    root = None
    if on_disk and paths and None not in paths:
        root = _common_root(paths, data_dir)
        ids = [Path(path).relative_to(root).as_posix() for path in paths]
    elif None not in paths and len(set(paths)) == len(paths):
        ids = paths
    else:
        ids = [f"row {row}" for row in range(len(paths))]
    stored = _TableRows(table, description)
    return ImageSource(ids, labels, class_names, stored, description, None if root is None else str(root))


def _common_root(files, preferred):
    """`preferred` if all files lie in it, else the deepest folder that they share."""
    preferred = None if preferred is None else Path(preferred).expanduser().absolute()
    if preferred is not None and all(preferred in Path(file).parents for file in files):
        return preferred
    return Path(os.path.commonpath([os.path.dirname(file) for file in files])) if files else preferred  # noqa: PTH120


__all__ = ["ImageSource", "folder_source", "list_source", "split_source"]
