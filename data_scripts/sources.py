"""What the benchmarks have in common: finding the data set, matching its lists with its images, making the listing.

Nothing here imports torch or `datasets`.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .class_folders import existing_folder, visible_folders
from .data_errors import DataError, some
from .image_files import ImageFile, LeftOut, is_image_name, list_images, relative_parts
from .listing import GROUP_SPLITS, FileRow, SplitCounts, SplitListing, make_row_listing, verify_split_counts
from .paths import usable_path


__all__ = [
    "Entry",
    "ImageSource",
    "archive_images",
    "find_file",
    "find_list",
    "folder_images",
    "list_benchmark",
    "list_path",
    "locate",
    "parse_list",
    "refuse_repeats",
    "tar_names",
]

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
_MAX_HINT_FOLDERS = 50


# ---- where the data set lies


def locate(
    data_dir: str | Path | None,
    in_folder: Callable[[Path], Found | None],
    of_archive: Callable[[Path], Found],
    expected: str,
) -> Found:
    """Find a data set.

    Args:
        data_dir: Its folder, the folder that holds its archive, or the archive.
        in_folder: Looks into a folder, quickly; None where the data set is not there, a `DataError` where only a part
            of it is.
        of_archive: What to make of `data_dir` where it is a file.
        expected: What `in_folder` looks for, for the error.

    Raises:
        DataError: it is not there. Where a folder above or below has it, the message says which was meant.
    """
    if data_dir and usable_path(data_dir).is_file():
        return of_archive(Path(os.path.realpath(usable_path(data_dir))))
    root = existing_folder(data_dir)
    incomplete = None
    try:
        found = in_folder(root)
        if found is not None:
            return found
    except DataError as error:
        incomplete = error
    folders = visible_folders(root)
    for folder in list(folders.values())[:_MAX_HINT_FOLDERS]:
        if _is_there(in_folder, folder):
            raise DataError(f"{root} is too high: did you mean {folder}?")
    for folder in list(root.parents)[:3]:
        if _is_there(in_folder, folder):
            raise DataError(f"{root} is too low: did you mean {folder}?")
    if incomplete is not None:
        raise incomplete
    raise DataError(f"expected {expected} in {root}; found {some(folders) if folders else 'no folders'}")


def _is_there(in_folder: Callable[[Path], Any], folder: Path) -> bool:
    try:
        return in_folder(folder) is not None
    except DataError:
        return False


def find_file(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The first of some files that exists, or None."""
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def find_list(root: Path, names: Sequence[str], usual: Sequence[str] = ()) -> Path | None:
    """A list of a data set: in its folder, in one of the usual folders there, or in any other one there.

    Args:
        root: Folder of the data set.
        names: What the list may be called.
        usual: Names of folders.

    Returns:
        The file, or None.

    Raises:
        DataError: it lies in several folders, none of them a usual one.
    """
    found = find_file([root, *(root / name for name in usual)], names)
    if found is not None:
        return found
    others = [file for folder in visible_folders(root).values() if (file := find_file([folder], names)) is not None]
    if len(others) > 1:
        raise DataError(f"{root} holds {others[0].name} in several folders ({others[0]} and {others[1]}): leave one")
    return others[0] if others else None


def tar_names(name: str) -> tuple[str, ...]:
    """What the tar file of a data set may be called."""
    return tuple(f"{name}{ending}" for ending in (".tgz", ".tar.gz", ".tar"))


# ---- its images


@dataclass(frozen=True)
class ImageSource:
    """Images in one folder or one archive.

    Attributes:
        where: Absolute path of the folder, or of the archive with the folder in it; for rows and for errors.
        files: By path relative to `where`.
        archive: Path of the archive; None for a folder.
    """

    where: str
    files: Mapping[str, ImageFile]
    archive: str | None = None

    @cached_property
    def _composed(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", path): path for path in self.files}

    def find(self, path: str) -> tuple[str, ImageFile] | None:
        """The row's file name and the file of a relative path (accents may be written either way), or None."""
        file = self.files.get(path)
        if file is None and not path.isascii():
            file = self.files.get(self._composed.get(unicodedata.normalize("NFC", path), ""))
        return None if file is None else (f"{self.where}/{file.path}", file)


def folder_images(folder: Path, own_endings: Sequence[str] = (), follow_links: bool = True) -> ImageSource:
    """The images in a folder, however deep.

    Args:
        folder: The folder.
        follow_links: As for `list_images`; not to be done where no list says which images are those of the data set.
        own_endings: Of what the data set itself has beside its images, such as `.txt`: no word is said of such files.
    """
    left_out = LeftOut()
    files = {file.path: file for file in list_images(folder, left_out, follow_links)}
    _say(left_out, folder, own_endings)
    return ImageSource(str(folder), files)


def _say(left_out: LeftOut, where: str | Path, own_endings: Sequence[str]) -> None:
    for ending in own_endings:
        del left_out.endings[ending]
    left_out.say(where)


def archive_images(
    archive: Path, members: Sequence[ImageFile], anchor: str, own_endings: Sequence[str] = ()
) -> ImageSource:
    """The images that lie in a certain folder of an archive.

    Args:
        archive: The file.
        members: What `list_members` gives.
        anchor: Name of the folder, at the top of the archive or further down.
        own_endings: As for `folder_images`.

    Raises:
        DataError: there is none.
    """
    others = [file.path for file in members if not is_image_name(file.path)]
    members = [file for file in members if is_image_name(file.path)]
    start = re.compile(rf"(?:.*?/)??{re.escape(anchor)}/")
    matches = [(match.group(), file) for file in members if (match := start.match(file.path))]
    if not matches:
        tops = sorted({file.path.partition("/")[0] for file in members})
        raise DataError(
            f"{archive} holds no images in a folder {anchor!r}; found "
            f"{f'images in {some(tops)}' if tops else 'no images at all'}"
        )
    prefix = min((prefix for prefix, _ in matches), key=len)
    files = {
        file.path[len(prefix) :]: file._replace(path=file.path[len(prefix) :])
        for found, file in matches
        if found == prefix
    }
    where, left_out = f"{archive}/{prefix.rstrip('/')}", LeftOut()
    left_out.add(path for path in others if path.startswith(prefix))
    _say(left_out, where, own_endings)
    return ImageSource(where, files, str(archive))


# ---- its lists


class Entry(NamedTuple):
    """One line of a list.

    Attributes:
        class_key: Sorts as the official class order.
        class_name: Unique.
        path: Of the image, relative to the source's folder.
        where: File and line, for errors.
    """

    class_key: Any
    class_name: str
    path: str
    where: str


def parse_list(content: bytes, where: str) -> Iterator[tuple[str, str]]:
    """Go through the lines of a list.

    Blank lines don't count; a byte order mark and either kind of line end are fine.

    Args:
        content: The file.
        where: Its name.

    Yields:
        `(file:line, line)`, the line stripped.

    Raises:
        DataError: a line is not valid UTF-8.
    """
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}:{number}: the line is not valid UTF-8 ({error.reason}): {line[:80]!r}") from None
        if text:
            yield f"{where}:{number}", text


def list_path(text: str, where: str) -> str:
    """The path that a list names, with `/` between its parts.

    Raises:
        DataError: it is absolute, or leads out of the data set by `..`.
    """
    parts = relative_parts(text)
    if not parts:
        raise DataError(f"{where}: expected a path within the data set, got {text!r}")
    return "/".join(parts)


def refuse_repeats(entries: Mapping[str, Sequence[Entry]]) -> None:
    """Check that no image is named twice and that training and test classes are disjoint.

    Raises:
        DataError: the message names both lines, or the classes.
    """
    seen: dict[str, str] = {}
    for rows in entries.values():
        for entry in rows:
            if entry.path in seen:
                raise DataError(f"{entry.where}: the image {entry.path!r} was named before, at {seen[entry.path]}")
            seen[entry.path] = entry.where
    train = {entry.class_name for entry in entries["train"]}
    for split, rows in entries.items():
        shared = None if split == "train" else next((entry for entry in rows if entry.class_name in train), None)
        if shared is not None:
            raise DataError(
                f"{shared.where}: the class {shared.class_name!r} is in the training list too; training and test "
                "classes must be disjoint"
            )


# ---- the listing


def list_benchmark(
    entries: Mapping[str, Sequence[Entry]],
    sources: Sequence[ImageSource],
    *,
    dataset: str,
    title: str,
    counts: Mapping[str, SplitCounts] | None,
    version: str,
) -> SplitListing:
    """Match lists with images, check the counts, and make the listing.

    Args:
        entries: Per split.
        sources: Where the images are; each entry's image is looked up in turn.
        dataset: Short name.
        title: Name for errors.
        counts: Published counts per split; None not to check them (and to leave out, with a warning, images that are
            named but not there).
        version: Of the builder.

    Returns:
        The listing; only classes that have an image get a label.

    Raises:
        DataError: images are missing, counts differ, or a group has no class.
    """
    where = " and ".join(source.where for source in sources)
    rows, keys, missing = {}, {group: {} for group in GROUP_SPLITS}, []
    for group, splits in GROUP_SPLITS.items():
        for split in splits:
            if split not in entries:
                continue
            rows[split] = []
            for entry in entries[split]:
                found = next((hit for source in sources if (hit := source.find(entry.path)) is not None), None)
                if found is None:
                    missing.append(entry)
                    continue
                rows[split].append(FileRow(entry.class_name, found[0], found[1].size, found[1].mtime_ns))
                keys[group][entry.class_name] = entry.class_key
    if missing:
        total = sum(map(len, entries.values()))
        message = (
            f"{len(missing):,} of the {total:,} images that {title} names are missing in {where}: "
            f"{some([entry.path for entry in missing], 3)} (named at {missing[0].where})"
        )
        if counts is not None:
            raise DataError(f"{message}. verify_counts=False leaves them out")
        logger.warning("%s; they are left out", message)
    class_names = {group: sorted(names, key=names.get) for group, names in keys.items()}
    listing = make_row_listing(
        rows,
        class_names,
        {"dataset": dataset, "version": version},
        list(dict.fromkeys(source.archive for source in sources if source.archive is not None)),
    )
    if counts is not None:
        verify_split_counts(listing, counts, title, where)
    for group, names in class_names.items():
        if not names:
            raise DataError(f"{where} holds no {'training' if group == 'train' else 'test'} class of {title}")
    return listing
