"""Which files of a folder are its images, and what is said of the others.

Nothing here imports torch or `datasets`.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from ..files.marks import written_as
from .data_errors import DataError, some
from .image_formats import HEIF_EXTENSIONS, IMAGE_EXTENSIONS


__all__ = [
    "SLOW_SECONDS",
    "ImageFile",
    "LeftOut",
    "has_images",
    "is_hidden",
    "is_image_name",
    "list_images",
    "refuse_own_folder",
    "relative_parts",
    "say_shared_files",
]

logger = logging.getLogger(__name__)

_DRIVE = re.compile(r"[A-Za-z]:")
SLOW_SECONDS = 2.0
"""A progress bar shows up only where listing takes longer than this."""


class ImageFile(NamedTuple):
    """One image file, as found by `list_images`.

    Attributes:
        path: Relative to the folder that was listed, with `/` between the parts.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int


@dataclass
class LeftOut:
    """What a listing passes over, so that it can be said once.

    Attributes:
        endings: How many files with which ending are no images that can be read.
        links: Links to folders, which are not followed.
        own: Folders that this package wrote, and what they are.
    """

    endings: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)

    def takes(self, folder: str | Path) -> bool:
        """Whether a folder was written by this package and so is passed over; it is noted."""
        what = written_as(folder)
        if what:
            self.own.append(f"{folder} is {what}")
        return what is not None

    def add(self, names: Iterable[str]) -> None:
        """Count those of some files that are no images; hidden ones and the litter of macOS don't count."""
        for name in names:
            if not is_hidden(name) and not is_image_name(name):
                self.endings[PurePath(name).suffix.lower() or "no ending"] += 1

    def say(self, where: str | Path) -> None:
        """Log what there is to say of a folder or an archive, if there is anything."""
        if self.endings:
            counts = ", ".join(f"{ending} {count:,}" for ending, count in self.endings.most_common())
            heif = (HEIF_EXTENSIONS - IMAGE_EXTENSIONS) & self.endings.keys()
            hint = f"; the extra 'heic' (pillow-heif) reads {', '.join(sorted(heif))}" if heif else ""
            total = sum(self.endings.values())
            logger.warning("%s: %d files are no images that can be read, left out: %s%s", where, total, counts, hint)
        if self.links:
            links = some(self.links, 20)
            logger.warning("%s: %d links to folders are not followed, left out: %s", where, len(self.links), links)
        if self.own:
            own = "; ".join(self.own[:5]) + ("; ..." if len(self.own) > 5 else "")
            logger.warning("%s: %d folders are no data and are left out: %s", where, len(self.own), own)


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is to be passed over: hidden, or litter that macOS leaves (`._*`, `__MACOSX`)."""
    return name.startswith(".") or name == "__MACOSX"


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image: an ending of a kind that is read, in any case, and not hidden."""
    return not is_hidden(name) and PurePath(name).suffix.lower() in IMAGE_EXTENSIONS


def list_images(folder: str | Path, left_out: LeftOut | None = None, follow_links: bool = False) -> list[ImageFile]:
    """List the images in a folder, however deep they lie.

    Links to files are followed. Links to folders are not: they may lead to a folder above, to images that are listed
    already, or out of the data set.

    Args:
        folder: Where to look.
        left_out: Gets what is passed over; None: it is logged.
        follow_links: Follow links to folders too, but for those that lead round; for data sets whose lists say which
            images are theirs.

    Returns:
        The images, sorted by relative path (by code point, so `B` comes before `a`).

    Raises:
        DataError: a folder can't be read, this one was written by this package, an image is a broken link, or a name
            is not valid Unicode.
    """
    refuse_own_folder(folder)
    found = LeftOut() if left_out is None else left_out
    above = frozenset(map(_identity, Path(folder).absolute().parents)) if follow_links else None
    images = sorted(_walk_images(os.fspath(folder), "", found, above))
    if left_out is None:
        found.say(folder)
    return images


def refuse_own_folder(folder: str | Path) -> None:
    """Check that a folder of data is not one that this package wrote: its pictures and copies are no data.

    Raises:
        DataError: it is.
    """
    if what := written_as(folder):
        raise DataError(f"{folder} is {what}, whose pictures would be taken for data: give the images' own folder")


def has_images(folder: str | Path) -> bool:
    """Whether there is an image in a folder, however deep; it stops at the first."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        if any(map(is_image_name, names)):
            return True
    return False


def say_shared_files(where: str | Path, train: Iterable[str], test: Iterable[str]) -> None:
    """Warn of test images that are training images, by links to files under other names.

    Args:
        where: Folder or table, for the warning.
        train, test: Absolute paths of the images of each side.
    """
    folders: dict[str, str] = {}

    def real(path: str) -> str:  # only links are resolved: that of every file would take as long as listing them
        folder, name = os.path.split(path)
        if Path(path).is_symlink():
            return os.path.realpath(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return f"{folders[folder]}/{name}"

    trained = {real(path): path for path in train}
    shared = [f"{path} is {trained[file]}" for path in test if (file := real(path)) in trained]
    if shared:
        logger.warning("%s: %d test images are files that train too, by links: %s", where, len(shared), some(shared))


def _walk_images(
    folder: str, prefix: str, left_out: LeftOut, above: frozenset[tuple[int, int]] | None
) -> Iterator[ImageFile]:
    """The images of a folder; `above` are the folders that hold it, None where links are not followed."""
    try:
        here = _identity(Path(folder))
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"can't list the folder {folder}: {error.strerror or error}") from error
    above = None if above is None else above | {here}
    for entry in entries:
        if is_hidden(entry.name):
            continue
        kind = _kind(entry)
        if kind == "folder":
            if entry.is_symlink() and (above is None or _identity(entry) in above):
                left_out.links.append(f"{entry.path} -> {Path(entry.path).readlink()}")
            elif not left_out.takes(entry.path):
                yield from _walk_images(entry.path, f"{prefix}{entry.name}/", left_out, above)
        elif is_image_name(entry.name):
            if kind is None:
                what = f"a broken link to {Path(entry.path).readlink()}" if entry.is_symlink() else "no regular file"
                raise DataError(f"{entry.path} is {what}")
            status = entry.stat()
            path = prefix + entry.name
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"the file name {entry.path!r} is not valid UTF-8, and can't be stored in a table: rename it"
                ) from error
            yield ImageFile(path, status.st_size, status.st_mtime_ns)
        else:
            left_out.add([entry.name])


def _kind(entry: os.DirEntry) -> str | None:
    """`folder` or `file`; None of anything else, such as a link that leads nowhere or back to itself."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError:
        return None


def _identity(place: os.DirEntry | Path) -> tuple[int, int]:
    status = place.stat()
    return status.st_dev, status.st_ino


def relative_parts(path: str) -> list[str] | None:
    """The parts of a path as a list or an archive names it; None where it is absolute, or leads out by `..`."""
    path = path.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return None if path.startswith("/") or _DRIVE.match(path) or ".." in parts else parts
