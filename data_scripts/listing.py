"""What a data set holds, before a row is written: splits, files, labels, class names and a fingerprint.

Every builder makes one `SplitListing`. Nothing here imports torch or `datasets`.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .data_errors import DataError
from .image_files import ImageFile


__all__ = [
    "GROUP_SPLITS",
    "FileRow",
    "SplitCounts",
    "SplitListing",
    "SplitRows",
    "make_listing",
    "make_row_listing",
    "verify_split_counts",
]

GROUP_SPLITS = {"train": ("train",), "test": ("test", "query", "gallery")}
"""Splits that share one set of classes, and so one numbering of labels."""


class FileRow(NamedTuple):
    """One image of a split, and its class.

    Attributes:
        class_name: As in the class names of the split's group.
        file: Absolute path; of a member of an archive, the archive's path, `/` and the member's name.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds; 0 for members of an archive.
    """

    class_name: str
    file: str
    size: int
    mtime_ns: int


class SplitRows(NamedTuple):
    """The rows of one split.

    Attributes:
        files: n paths, as `FileRow.file`.
        labels: n ints in 0..C-1, C the number of classes of the split's group.
    """

    files: list[str]
    labels: list[int]


class SplitCounts(NamedTuple):
    """How many images and classes a split has."""

    images: int
    classes: int


@dataclass(frozen=True)
class SplitListing:
    """All splits of a data set.

    Attributes:
        class_names: Per group (`train`, `test`) the class names, position = label.
        splits: Per split (`train`, and `test` or `query` and `gallery`) its rows.
        fingerprint: Hex digest of the rows, of each file's size and time of change (of an archive: its size, time of
            change, and the names and sizes of its members), and of the options. Prepared data is found by it, so it
            can't be stale.
        archives: Paths of the archives that hold the files; none for files on disk.
        num_bytes: Per split, the size of its files.
    """

    class_names: Mapping[str, list[str]]
    splits: Mapping[str, SplitRows]
    fingerprint: str
    archives: tuple[str, ...] = ()
    num_bytes: Mapping[str, int] = field(default_factory=dict)

    def group_splits(self, group: str) -> dict[str, SplitRows]:
        """The splits of one group that this data set has."""
        return {name: self.splits[name] for name in GROUP_SPLITS[group] if name in self.splits}

    def counts(self, split: str) -> SplitCounts:
        """Images, and classes that have an image, of a split."""
        rows = self.splits[split]
        return SplitCounts(len(rows.labels), len(set(rows.labels)))

    def archive_member(self, file: str) -> tuple[str | None, str]:
        """Take the path of a row apart: archive and member, or None and the path of a file on disk."""
        for archive in self.archives:
            if file.startswith(f"{archive}/"):
                return archive, file[len(archive) + 1 :]
        return None, file


def make_listing(
    folders: Mapping[str, tuple[str, Mapping[str, Sequence[ImageFile]]]],
    class_names: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
) -> SplitListing:
    """Build a `SplitListing` from class folders on disk.

    Args:
        folders: Per split, the absolute path of the folder above its class folders, and per class folder (named as
            the class) its files.
        class_names: Per group, the classes in label order. Classes of a split that are not in here are left out.
        options: What else the prepared data depends on (JSON values).

    Returns:
        The listing; rows in class order, then as the files are given.
    """

    def rows(group: str, split: str) -> Iterator[FileRow]:
        root, classes = folders[split]
        for class_name in class_names[group]:
            for file in classes.get(class_name, ()):
                yield FileRow(class_name, f"{root}/{class_name}/{file.path}", file.size, file.mtime_ns)

    split_rows = {
        split: rows(group, split) for group, splits in GROUP_SPLITS.items() for split in splits if split in folders
    }
    return make_row_listing(split_rows, class_names, options)


def make_row_listing(
    rows: Mapping[str, Iterable[FileRow]],
    class_names: Mapping[str, Sequence[str]],
    options: Mapping[str, Any],
    archives: Sequence[str] = (),
) -> SplitListing:
    """Build a `SplitListing` from rows in any order.

    Args:
        rows: Per split, its rows.
        class_names: Per group, the classes in label order; every row's class is in here.
        options: What else the prepared data depends on (JSON values).
        archives: Paths of the archives that rows lie in.

    Returns:
        The listing; rows in class order, within a class as they are given.
    """
    digest = hashlib.sha256(json.dumps({"options": dict(options)}, sort_keys=True, default=str).encode())
    for archive in archives:
        status = Path(archive).stat()
        digest.update(f"\0archive {Path(archive).name} {status.st_size} {status.st_mtime_ns}".encode())
    folders = {archive: len(str(Path(archive).parent)) for archive in archives}
    splits, num_bytes = {}, {}
    for group, split_names in GROUP_SPLITS.items():
        labels = {name: label for label, name in enumerate(class_names[group])}
        digest.update("\0".join([f"\0group {group}", *labels]).encode())
        for split in split_names:
            if split not in rows:
                continue
            ordered = sorted(((labels[row.class_name], row) for row in rows[split]), key=lambda pair: pair[0])
            splits[split] = SplitRows([row.file for _, row in ordered], [label for label, _ in ordered])
            num_bytes[split] = sum(row.size for _, row in ordered)
            digest.update(f"\0split {split}\0".encode())
            for label, row in ordered:
                # an archive may move to another folder: its rows hold bytes, and its name only
                start = next((n for archive, n in folders.items() if row.file.startswith(f"{archive}/")), 0)
                digest.update(f"{label}\0{row.file[start:]}\0{row.size}\0{row.mtime_ns}\0".encode())
    names = {group: list(names) for group, names in class_names.items()}
    return SplitListing(names, splits, digest.hexdigest()[:32], tuple(archives), num_bytes)


def verify_split_counts(listing: SplitListing, expected: Mapping[str, SplitCounts], dataset: str, where: str) -> None:
    """Check the size of every split against the published one.

    Args:
        listing: What was found.
        expected: Published counts per split.
        dataset: Name, for the error.
        where: Folder, for the error.

    Raises:
        DataError: a count differs; the message gives found and expected per split, and the way round.
    """
    wrong = []
    for split, want in expected.items():
        found = listing.counts(split) if split in listing.splits else SplitCounts(0, 0)
        if found != want:
            wrong.append(
                f"{split}: found {found.images:,} images of {found.classes:,} classes, "
                f"expected {want.images:,} of {want.classes:,}"
            )
    if wrong:
        raise DataError(
            f"{dataset} in {where} is not complete, or holds files that are not part of it: {'; '.join(wrong)}. "
            "Unpack the official archive again, or give verify_counts=False to use a subset"
        )
